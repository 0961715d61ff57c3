"""TRL's trainers through fastalign's head.

    from fastalign.integrations import trl
    trl.patch()

TRL's SFT, DPO, KTO, GRPO and RLOO trainers score tokens by one function, which `patch()` replaces. The reward
trainer has no head over the vocabulary and runs as before. TRL scores ignored positions too, on a CPU, and
sets what it logs of them to 0. They are skipped here, so the logged numbers are the same.

TRL refuses a LoRA adapter on lm_head, because its function reads `lm_head.weight` alone. Patched, its
trainers take one: it is in the logits and gets its gradients.

TRL's own function still runs, with one warning, on a device that fastalign has no kernels for, and for a
weight that DeepSpeed's ZeRO-3 shards, which is whole in the forward pass only.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastalign_kernels import LowRank
from fastalign_kernels.linear.token_outputs import linear_token_outputs

from . import hosts
from .hosts import PatchedHost

HOST = "trl"
TESTED = ("1.16",)
PARAMETERS = (
    "ctx",
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)
OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
TRAINERS = ("sft", "dpo", "kto", "grpo", "rloo")  # modules of those that score tokens
# Their arguments.
CONFIGS = ("SFTConfig", "DPOConfig", "KTOConfig", "GRPOConfig", "RLOOConfig")


def patch(*, tail_eps: float | None = None, workspace_mib: float | None = None) -> PatchedHost:
    """Let TRL's trainers score tokens by fastalign's head. Patching twice changes nothing.

    Args:
        tail_eps, workspace_mib: those of `linear_token_stats`, for every call.
    Returns:
        A handle: `calls` counts TRL's calls, `unpatch()` or the end of a `with` block undoes the patch.
    Raises:
        UnsupportedHostError: a version of TRL that fastalign was not tested with, or other parameters.
        ModuleNotFoundError: TRL is not installed.
    """
    options = {"tail_eps": tail_eps, "workspace_mib": workspace_mib}
    if (handle := PatchedHost.current(HOST, options)) is not None:
        return handle
    hosts.check_version(HOST, TESTED)
    utils: Any = importlib.import_module("trl.trainer.utils")
    hosts.check_parameters(HOST, "_ChunkedLogProbFunction.forward", utils, PARAMETERS)
    uses_triton = hosts.check_parameters(HOST, "_use_triton", utils, ("device",))

    from .trainer_end import warn_if_unused

    handle = PatchedHost(HOST, options)
    scorer = _LogProbs(handle, utils._ChunkedLogProbFunction)
    handle.replace(utils, "_ChunkedLogProbFunction", scorer)
    for name in TRAINERS:
        trainer: Any = importlib.import_module(f"trl.trainer.{name}_trainer")
        if hasattr(trainer, "BaseTunerLayer"):  # PEFT is installed
            handle.replace(trainer, "BaseTunerLayer", _refused_layers(trainer.BaseTunerLayer, scorer))
    # TRL asks this only to know whether to score all positions or those that are not ignored.
    handle.replace(utils, "_use_triton", lambda device: device.type in hosts.DEVICES or uses_triton(device))
    warn_if_unused(handle, CONFIGS)
    return handle


def unpatch() -> None:
    """Give TRL its own function back. Does nothing if TRL is not patched."""
    hosts.unpatch(HOST)


class _LogProbs:
    """Stands in for TRL's autograd function."""

    def __init__(self, handle: PatchedHost, original: Any) -> None:
        self.handle = handle
        self.original = original
        self.has_adapter = False  # whether a trainer has an adapter on lm_head

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Sequence[str] = OPTIONAL_OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """TRL's five outputs [N] of hidden [N, H], weight [V, H], bias [V], targets [N]."""
        if (reason := hosts.unserved(hidden, weight)) is not None:
            self.handle.warn_unserved(reason)
            return self.original.apply(
                hidden,
                weight,
                bias,
                targets,
                temperature,
                chunk_size,
                final_logit_softcapping,
                logit_scale,
                outputs,
            )
        lora = None
        if self.has_adapter or not torch.compiler.is_compiling():  # the compiler cannot trace _adapter
            lora = _adapter(hidden, expected=self.has_adapter)
        self.handle.count()
        if weight.dtype not in (hidden.dtype, torch.float32):  # TRL casts each tile of it
            weight = weight.to(hidden.dtype)
            bias = None if bias is None else bias.to(hidden.dtype)
        scored = linear_token_outputs(
            hidden,
            weight,
            targets,
            bias,
            entropy="entropy" in outputs,
            log_sum_sq_probs="log_sum_sq_probs" in outputs,
            mean_logit="mean_logits" in outputs,
            top1="is_top1" in outputs,
            temperature=temperature,
            softcap=final_logit_softcapping,
            logit_scale=logit_scale,
            lora=lora,
            **self.handle.options,
        )
        return scored.logp, scored.entropy, scored.log_sum_sq_probs, scored.mean_logit, scored.top1


def _refused_layers(peft_layer: type, scorer: _LogProbs) -> type:
    """What TRL's trainers ask whether lm_head is one of: PEFT's layers, but those that the head serves.

    GRPO's cast_lm_head_to_fp32 asks too, in a function of its own. It forgets adapters in generation, so they
    are still refused there.
    """

    from ..peft_heads import explain_adapters, is_lora

    class Refused(type):
        def __instancecheck__(cls, module: Any) -> bool:
            by_constructor = sys._getframe(1).f_code.co_name == "__init__"
            served = by_constructor and is_lora(module) and explain_adapters(module) is None
            scorer.has_adapter |= served
            return isinstance(module, peft_layer) and not served

    return Refused(peft_layer.__name__, (), {})


def _adapter(hidden: Tensor, *, expected: bool) -> LowRank | None:
    """The LoRA adapter on the lm_head that TRL's forward scores with.

    TRL passes the weight alone, so the module is read from its forward's frame. In a compiled forward there
    is no such frame, which is an error if a trainer has an adapter there (`expected`).
    """
    from ..peft_heads import explain_adapters, is_lora, lora_of
    from ..probe import UnsupportedModelError

    head = sys._getframe(2).f_locals.get("lm_head")
    if expected and not isinstance(head, nn.Module):
        raise ValueError("trl: got an adapter on lm_head in a compiled forward, expected no torch_compile")
    if not isinstance(head, nn.Module) or not is_lora(head):
        return None
    if (reason := explain_adapters(head)) is not None:
        raise UnsupportedModelError(f"trl: got a model that {reason}, expected one plain LoRA adapter there")
    lora = lora_of(head, hidden)
    if lora is None or lora.B.dtype in (hidden.dtype, torch.float32):
        return lora
    return lora._replace(A=lora.A.to(hidden.dtype), B=lora.B.to(hidden.dtype))
