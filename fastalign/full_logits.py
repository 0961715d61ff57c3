"""When a fused model runs its own forward, which computes full logits.

Two hosts need the logits: training without labels, whose loss lies outside of the model, and transformers'
Trainer when it collects predictions. The fused head also cannot compute a user's loss function, or a head
with an adapter. Each case warns once, except the Trainer's predictions, which the user asked for.
"""

import sys
import warnings

import torch
from transformers import PreTrainedModel

from .fused_options import options_of
from .integrations import hosts
from .servable_heads import scored_by_trl

# The attribute in which a fused model keeps the loss_function that it had when it was fused.
LOSS_FUNCTION = "_fastalign_loss_function"
_WARNED = "_fastalign_warned"


def needs_full_logits(model: PreTrainedModel, *, labelled: bool, unservable_head: str | None) -> bool:
    """Whether a call of a fused model needs the model's own forward.

    The call has no options of the fused head. `unservable_head` says why the fused head cannot read
    lm_head, if it cannot.
    """
    trains = model.training and torch.is_grad_enabled()
    if not labelled:
        if trains:
            _warn(
                model,
                "was called in training without labels (Trainer takes them away for label_smoothing_factor "
                "and for a compute_loss_func; unset these, or call unfuse_head(model))",
            )
        return True
    if unservable_head is not None:
        _warn(model, f"was changed after fuse_head ({unservable_head})")
        return True
    if model.loss_function is not model.__dict__[LOSS_FUNCTION]:
        _warn(
            model,
            "got another loss_function after fuse_head (fuse_head(model) checks whether it can be served)",
        )
        return True
    return (
        not model.training
        and not torch.is_grad_enabled()
        and _trainer_collects_predictions(torch.compiler.is_compiling())
    )


@torch.compiler.assume_constant_result
def _trainer_collects_predictions(compiling: bool) -> bool:
    """Whether a transformers Trainer evaluates the model and will read its logits (compute_metrics, predict).

    The Trainer does not pass this to its model, so we look for the Trainer's frame. A compiled graph is
    reused by evaluations that read only the loss and by others, so a compiled evaluation by a Trainer always
    gets logits.
    """
    host: type | None = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    frame = sys._getframe(1)
    while host is not None and frame is not None:
        if frame.f_code.co_name == "prediction_step" and isinstance(frame.f_locals.get("self"), host):
            return compiling or not frame.f_locals.get("prediction_loss_only")
        frame = frame.f_back  # type: ignore[assignment]
    return False


def warn_if_trl_scores(model: PreTrainedModel) -> None:
    """Warn once if a TRL trainer replaced a fused model's forward and does not score tokens as it would."""
    if not scored_by_trl(model):
        return
    handle = hosts.patched("trl")
    if handle is None:
        _warn_once(
            model,
            f"model: got a fused {type(model).__name__} in a TRL trainer, which scores tokens by a function "
            "of its own, so the fused head does nothing: call fastalign.integrations.trl.patch()",
        )
        return
    for name, value in options_of(model).items():
        held = handle.options.get(name)
        if held != value:
            _warn_once(
                model,
                f"{name}: got {value} from fuse_head, expected {held} as given to "
                "fastalign.integrations.trl.patch(), which holds in a TRL trainer",
            )


def _warn(model: PreTrainedModel, why: str) -> None:
    message = f"model: {type(model).__name__} {why}: it makes full logits, and the fused head does nothing"
    if torch.compiler.is_compiling():
        _say_in_trace(message)
    else:
        _warn_once(model, message)


def _warn_once(model: PreTrainedModel, message: str) -> None:
    if message not in (warned := model.__dict__.setdefault(_WARNED, [])):
        warned.append(message)
        warnings.warn(message, stacklevel=5)


@torch.compiler.assume_constant_result
def _say_in_trace(message: str) -> None:
    """Warn while a compiled call is traced, because a graph holds no warning."""
    warnings.warn(message, stacklevel=2)
