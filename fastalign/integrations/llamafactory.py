"""LLaMA-Factory's v1 trainers through fastalign's head.

    from fastalign.integrations import llamafactory
    llamafactory.patch()

In release 0.9.5 the SFT trainer scores tokens by `BaseTrainer.compute_log_probs`. The fused head takes its
place, and no logits are made. Later commits have a chunked loss of their own (`chunk_loss_size`), whose two
functions are replaced if they are there. LLaMA-Factory's function still runs, with one warning, for a model
that `fuse_head` refuses. The trainers of USE_V1=0 are other code, which is not patched: a training of theirs
ends with a warning.
"""

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastalign_kernels import linear_cross_entropy, linear_logprobs

from . import hosts
from .head_adapter import HeadAdapter
from .hosts import PatchedHost
from .published import LLAMAFACTORY, LLAMAFACTORY_CHUNK_LOSS
from .whole_tensors import whole

HOST = "llamafactory"
V0_ARGUMENTS = ("Fp8Arguments",)  # a base class of the arguments of v0's trainers, and of no others
CHUNK_LOSS = "llamafactory.v1.plugins.model_plugins.chunk_loss"


def patch(*, tail_eps: float | None = None, workspace_mib: float | None = None) -> PatchedHost:
    """Let LLaMA-Factory's v1 trainers score tokens by fastalign's head. Patching twice changes nothing.

    Args:
        tail_eps, workspace_mib: those of `linear_cross_entropy`, for every call.
    Returns:
        A handle: `calls` counts the calls, `unpatch()` or the end of a `with` block undoes the patch.
    Raises:
        UnsupportedHostError: a version that fastalign was not tested with, or other parameters.
        ModuleNotFoundError: LLaMA-Factory is not installed.
    """
    options = {"tail_eps": tail_eps, "workspace_mib": workspace_mib}
    if (handle := PatchedHost.current(HOST, options)) is not None:
        return handle
    hosts.check_version(LLAMAFACTORY.host, LLAMAFACTORY.tested)
    chunked = _has_chunk_loss()
    hosts.check_published(LLAMAFACTORY_CHUNK_LOSS if chunked else LLAMAFACTORY)
    trainer: Any = importlib.import_module("llamafactory.v1.core.base_trainer").BaseTrainer

    from .trainer_end import warn_if_unused

    handle = PatchedHost(HOST, options)
    remedy = "Only v1's SFT trainer uses it."
    if chunked:
        adapter = HeadAdapter("LLaMA-Factory", "its chunked loss", "no chunk_loss_size")
        handle.replace(trainer, "fit", adapter.noted(trainer.fit, "model"))
        interceptor: Any = importlib.import_module(f"{CHUNK_LOSS}.interceptor")
        for name, stand_in in (
            ("chunked_linear_cross_entropy", _chunked_linear_cross_entropy),
            ("chunked_linear_log_probs", _chunked_linear_log_probs),
        ):
            handle.replace(interceptor, name, stand_in(handle, adapter, getattr(interceptor, name)))
        remedy = "Set chunk_loss_size."
    else:
        handle.replace(trainer, "compute_log_probs", _compute_log_probs(handle, trainer.compute_log_probs))
    handle.warn_without_calls(
        trainer, "fit", remedy, applies=lambda trainer: type(trainer).__name__ != "RMTrainer"
    )
    warn_if_unused(handle, V0_ARGUMENTS, ": LLaMA-Factory's v0 is not patched, use v1 (USE_V1=1)")
    return handle


def unpatch() -> None:
    """Give LLaMA-Factory its own functions back. Does nothing if it is not patched."""
    hosts.unpatch(HOST)


def _has_chunk_loss() -> bool:
    """Whether this LLaMA-Factory has the chunked loss of later commits."""
    try:
        importlib.import_module(f"{CHUNK_LOSS}.interceptor")
    except ModuleNotFoundError as missing:
        if not CHUNK_LOSS.startswith(missing.name or "?"):
            raise
        return False
    return True


def _compute_log_probs(handle: PatchedHost, original: Any) -> Any:
    """Stands in for the trainer's method of release 0.9.5."""
    from .fused_models import fuse_served

    def compute_log_probs(self: Any, model: Any, batch: dict[str, Any]) -> Tensor:
        """Log-probability of each label [B, T - 1]; 0 where it is -100."""
        if not fuse_served(handle, model):
            return original(self, model, batch)
        handle.count()
        inputs = _model_inputs(original, self, batch)
        inputs["labels"] = batch["labels"].to(self.device, non_blocking=True)
        workspace_mib = handle.options["workspace_mib"]
        return model(**inputs, token_stats=True, workspace_mib=workspace_mib).logp[:, :-1]

    return compute_log_probs


class _ModelCall(Exception):
    """Ends the trainer's method where it calls its model."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        super().__init__("the model was called")
        self.inputs = inputs


def _model_inputs(compute_log_probs: Any, trainer: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """What the trainer's own method passes to its model. Builds after 0.9.5 drop some position_ids there."""

    def model(**inputs: Any) -> None:
        raise _ModelCall(inputs)

    try:
        compute_log_probs(trainer, model, batch)
    except _ModelCall as call:
        return call.inputs
    raise hosts.UnsupportedHostError(
        "llamafactory: got a compute_log_probs that does not call its model, expected one call: this build "
        "is not the one that fastalign was tested with"
    )


def _chunked_linear_cross_entropy(handle: PatchedHost, adapter: HeadAdapter, original: Any) -> Any:
    def chunked_linear_cross_entropy(
        hidden_states: Tensor,
        head_weight: Tensor,
        head_bias: Tensor | None,
        labels: Tensor,
        loss_weights: Tensor,
        chunk_size: int,
        denominator: Tensor | None = None,
    ) -> Tensor:
        """Sum of loss_weights [B, T] times cross-entropy, over denominator. hidden_states [B, T, H]."""
        adapter.refuse()
        if (reason := hosts.unserved(hidden_states, head_weight)) is not None:
            handle.warn_unserved(reason)
            return original(
                hidden_states, head_weight, head_bias, labels, loss_weights, chunk_size, denominator
            )
        handle.count()
        if denominator is None:
            denominator = loss_weights.float().sum() + 1e-6
        return linear_cross_entropy(
            hidden_states,
            head_weight,
            labels,
            head_bias,
            token_weights=loss_weights,
            num_items=denominator,
            **handle.options,
        )

    return chunked_linear_cross_entropy


def _chunked_linear_log_probs(handle: PatchedHost, adapter: HeadAdapter, original: Any) -> Any:
    def chunked_linear_log_probs(
        hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None, labels: Tensor, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of each label [B, T], and each token's mean logit [B, T] without gradient."""
        adapter.refuse()
        if (reason := hosts.unserved(hidden_states, head_weight)) is not None:
            handle.warn_unserved(reason)
            return original(hidden_states, head_weight, head_bias, labels, chunk_size)
        handle.count()
        logp = linear_logprobs(hidden_states, head_weight, labels, head_bias, **handle.options)
        with torch.no_grad():  # of all positions: the trainer logs those of prompts too
            mean_weight = whole(head_weight.float().mean(0, keepdim=True))
            mean_bias = None if head_bias is None else whole(head_bias.float().mean(0, keepdim=True))
            mean_logit = F.linear(hidden_states.float(), mean_weight, mean_bias).squeeze(-1)
        return logp, mean_logit

    return chunked_linear_log_probs
