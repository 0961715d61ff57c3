"""What the integrations share that fuse the model of a host."""

from typing import Any

from torch import nn

from fastalign.causal_lm import fuse_head
from fastalign.probe import UnsupportedModelError
from fastalign.servable_heads import causal_lm_of

from . import hosts
from .hosts import PatchedHost


def fuse_served(handle: PatchedHost, model: Any) -> bool:
    """Fuse the head of the model that a host trains; False, with one warning, if it cannot be served.

    Args:
        handle: its option tail_eps is `fuse_head`'s.
        model: a causal LM of transformers, also in PEFT's, DDP's or DeepSpeed's wrapper.
    """
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    try:
        head = causal_lm_of(model).get_output_embeddings()
        parameter = next(model.parameters())
        reason = hosts.unserved(parameter, getattr(head, "weight", None))
        if reason is None:
            fuse_head(model, tail_eps=handle.options["tail_eps"])
    except UnsupportedModelError as error:
        reason = str(error)
    if reason is not None:
        handle.warn_unserved(reason)
    return reason is None
