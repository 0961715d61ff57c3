"""What the integrations share that fuse the model of a host."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from fastalign.causal_lm import fuse_head, unfuse_head
from fastalign.probe import UnsupportedModelError
from fastalign.servable_heads import causal_lm_of

from . import hosts
from .hosts import PatchedHost


def fuse_served(handle: PatchedHost, model: Any) -> bool:
    """Fuse the head of the model that a host trains; False, with one warning, if it cannot be served.

    `unpatch` gives the model its own forward back, unless it was fused before.

    Args:
        handle: its option tail_eps is `fuse_head`'s.
        model: a causal LM of transformers, also in PEFT's, DDP's or DeepSpeed's wrapper.
    """
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    try:
        base = causal_lm_of(model)
        head = base.get_output_embeddings()
        parameter = next(model.parameters())
        reason = hosts.unserved(parameter, getattr(head, "weight", None))
        if reason is None:
            fused_before = "_fastalign_transform" in base.__dict__
            fuse_head(model, tail_eps=handle.options["tail_eps"])
            if not fused_before:
                handle.on_unpatch(_unfusing(base))
    except UnsupportedModelError as error:
        reason = str(error)
    if reason is not None:
        handle.warn_unserved(reason)
    return reason is None


def _unfusing(model: nn.Module) -> Callable[[], None]:
    """Unfuse `model` if it still exists."""
    reference = weakref.ref(model)

    def unfuse() -> None:
        if (alive := reference()) is not None:
            unfuse_head(alive)

    return unfuse
