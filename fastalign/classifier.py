"""Scores of packed sequences, from a transformers sequence classifier's own forward.

transformers scores one token per row: the last that is not the padding id. `score_packed` lets the caller
name the tokens instead. It is still the model's forward, so hooks of DDP and FSDP2 run. Without `ends` the
model saves, loads and runs as before.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from .finite import find_not_finite
from .probe import probing, unsupported
from .versions import noting_newer_packages


@noting_newer_packages()
def score_packed(model: PreTrainedModel, *, verify: bool = True) -> PreTrainedModel:
    """Let a sequence classifier score given tokens of packed sequences.

    Called with `ends`, int64 [S], it returns `logits` [S, labels] at these of the [B·T] tokens.

    The same object is returned. With `verify`, six tokens go through both forwards, in evaluation mode.
    Raises UnsupportedModelError where they differ, or where the model has no linear layer `score` on a
    backbone.
    """
    if not isinstance(getattr(model, "score", None), torch.nn.Linear) or model.base_model is model:
        raise unsupported(
            model,
            "has no linear layer `score` on a backbone",
            expected="one of transformers' classifiers of decoders",
        )
    model.__dict__["forward"] = MethodType(_forward, model)
    if not verify:
        return model
    padding = model.config.get_text_config().pad_token_id
    tokens = torch.tensor([[token for token in range(7) if token != padding][:6]], device=model.device)
    with probing(model):
        plain = model(input_ids=tokens, use_cache=False).logits
        packed = model(input_ids=tokens, use_cache=False, ends=torch.tensor([5], device=model.device)).logits
    allowed = torch.finfo(plain.dtype).eps ** 0.5 * plain.abs().max()
    if not (plain - packed).abs().max() <= allowed:
        del model.__dict__["forward"]
        if wrong := find_not_finite(model.state_dict().items()):
            raise ValueError(f"model: got {type(model).__name__}, of which {wrong}, expected finite numbers")
        raise unsupported(
            model,
            f"scores a sequence as {plain.tolist()}",
            expected=f"the output of its layer `score` at the last token, {packed.tolist()}",
        )
    return model


def _forward(self: PreTrainedModel, *args: Any, ends: Tensor | None = None, **kwargs: Any) -> Any:
    if ends is None:
        return type(self).forward(self, *args, **kwargs)
    # PEFT passes all arguments that a classifier may have, as None.
    arguments = {name: value for name, value in kwargs.items() if value is not None}
    hidden = self.base_model(*args, **arguments | {"return_dict": True}).last_hidden_state
    return SequenceClassifierOutput(logits=self.score(hidden.flatten(0, 1)[ends]))
