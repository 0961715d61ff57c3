"""verl's fused head and its PPO loss through fastalign.

    from fastalign.integrations import verl
    verl.patch()

verl trains in worker processes. Each of them imports what the environment variable VERL_USE_EXTERNAL_MODULES
names, so `VERL_USE_EXTERNAL_MODULES=fastalign.integrations.verl_worker` patches all of them. Also set
`actor_rollout_ref.model.use_fused_kernels=True`: only then does verl call the functions that are replaced,
with any of its backends. verl's functions still run, with one warning, for a vocabulary that is sharded over
tensor-parallel ranks, for a temperature in a tensor, and on devices other than CPUs and CUDA.

That module does not call `patch_policy_loss`. A module of your own that does goes into the same variable,
after a comma.
"""

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastalign_kernels import linear_token_stats, ppo_loss

from . import hosts
from .head_adapter import HeadAdapter
from .hosts import PatchedHost
from .published import VERL, VERL_POLICY_LOSS

HOST = "verl"
POLICY_LOSS = "verl's policy loss"
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
USE_FUSED_KERNELS = (
    "Set actor_rollout_ref.model.use_fused_kernels=True and use an engine of FSDP or Megatron: those of "
    "VeOmni, torchtitan and AutoModel do not call verl's fused kernels."
)


def patch(*, tail_eps: float | None = None, workspace_mib: float | None = None) -> PatchedHost:
    """Let verl's fused kernels score tokens by fastalign's head. Patching twice changes nothing.

    Args:
        tail_eps, workspace_mib: those of `linear_token_stats`, for every call.
    Returns:
        A handle: `calls` counts verl's calls, `unpatch()` or the end of a `with` block undoes the patch.
    Raises:
        UnsupportedHostError: a version of verl that fastalign was not tested with, or other parameters.
        ModuleNotFoundError: verl is not installed.
    """
    options = {"tail_eps": tail_eps, "workspace_mib": workspace_mib}
    if (handle := PatchedHost.current(HOST, options)) is not None:
        return handle
    hosts.check_published(VERL)
    kernel: Any = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    torch_functional: Any = importlib.import_module("verl.utils.experimental.torch_functional")
    engines: Any = importlib.import_module("verl.workers.engine.base")

    handle = PatchedHost(HOST, options)
    adapter = HeadAdapter("verl", "verl's fused kernels", "use_fused_kernels=False")
    of_triton = _linear_cross_entropy(handle, adapter, kernel.linear_cross_entropy)
    handle.replace_function(kernel, "linear_cross_entropy", of_triton)
    module_class = torch_functional.FusedLinearForPPO
    handle.replace(module_class, "forward", _fused_linear_for_ppo(handle, adapter, module_class.forward))
    handle.warn_without_calls(
        engines.BaseEngine,
        "train_batch",
        USE_FUSED_KERNELS,
        applies=lambda engine, *_: "ValueHead" not in type(engine).__name__,
    )
    for name in ("train_batch", "infer_batch"):
        handle.replace(engines.BaseEngine, name, adapter.noted(getattr(engines.BaseEngine, name), "module"))
    return handle


def patch_policy_loss() -> PatchedHost:
    """Let verl's policy loss "vanilla" be `fastalign.ppo_loss`. Patching twice changes nothing.

    So is the one of "bypass_mode" with loss_type "ppo_clip", which calls it. The value and the gradient are
    verl's, except that a batch without tokens gives 0 and not NaN. The metrics are computed by verl's
    function. verl's other policy losses run as before.

    Returns:
        A handle of its own, as `patch` does.
    Raises:
        UnsupportedHostError, ModuleNotFoundError: as in `patch`.
    """
    if (handle := PatchedHost.current(POLICY_LOSS)) is not None:
        return handle
    hosts.check_published(VERL_POLICY_LOSS)
    algorithms: Any = importlib.import_module("verl.trainer.ppo.core_algos")
    handle = PatchedHost(POLICY_LOSS)
    losses = algorithms.POLICY_LOSS_REGISTRY
    original = algorithms.compute_policy_loss_vanilla
    if losses["vanilla"] is not original:
        raise hosts.UnsupportedHostError(
            f"verl: got {losses['vanilla'].__qualname__} registered as the policy loss vanilla, expected "
            "verl's: give it another name"
        )
    vanilla = _vanilla(handle, original)
    handle.replace_function(algorithms, "compute_policy_loss_vanilla", vanilla)  # bypass_mode calls it
    handle.replace_item(losses, "vanilla", vanilla)
    return handle


def unpatch() -> None:
    """Give verl its own functions back. Does nothing if verl is not patched."""
    hosts.unpatch(HOST)
    hosts.unpatch(POLICY_LOSS)


def _linear_cross_entropy(handle: PatchedHost, adapter: HeadAdapter, original: Any) -> Any:
    """Stands in for verl's Triton kernel."""

    def linear_cross_entropy(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float = 1.0,
        reduction: str = "none",
        dist_process_group: ProcessGroup | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probability and entropy [N] of labels with N elements, hidden [..., H] and weight [V, H]."""
        adapter.refuse()
        reason = _unserved(hidden, weight, temperature)
        if dist_process_group is not None and dist_process_group.size() > 1:
            reason = f"a vocabulary sharded over {dist_process_group.size()} ranks, expected a whole lm_head"
        elif reduction != "none":
            reason = f"reduction={reduction!r}, expected 'none'"
        if reason is not None:
            handle.warn_unserved(reason)
            return original(hidden, weight, labels, temperature, reduction, dist_process_group)
        handle.count()
        hidden = hidden.reshape(-1, hidden.shape[-1])
        stats = linear_token_stats(
            hidden, weight, labels.reshape(-1), temperature=temperature, **handle.options
        )
        return stats.logp, stats.entropy

    return linear_cross_entropy


def _unserved(hidden: Tensor, weight: Tensor, temperature: Any) -> str | None:
    if isinstance(temperature, Tensor):
        return "a temperature in a tensor, expected a number"
    return hosts.unserved(hidden, weight)


def _fused_linear_for_ppo(handle: PatchedHost, adapter: HeadAdapter, original: Any) -> Any:
    """Stands in for the forward of the module behind verl's backends "torch" and "liger"."""

    def forward(
        self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probability and entropy [...] of input_ids [...], hidden_states [..., H], vocab_weights."""
        adapter.refuse()
        if (reason := _unserved(hidden_states, vocab_weights, temperature)) is not None:
            handle.warn_unserved(reason)
            return original(self, hidden_states, vocab_weights, input_ids, temperature)
        handle.count()
        stats = linear_token_stats(
            hidden_states, vocab_weights, input_ids, temperature=temperature, **handle.options
        )
        return stats.logp, stats.entropy

    return forward


def _vanilla(handle: PatchedHost, original: Any) -> Any:
    """Stands in for compute_policy_loss_vanilla."""

    def compute_policy_loss_vanilla(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss, and verl's metrics. All tensors are [B, T]."""
        arguments = (
            *(old_log_prob, log_prob, advantages, response_mask),
            *(loss_agg_mode, config, rollout_is_weights),
        )
        with torch.no_grad():  # verl's own metrics; it also refuses what it does not take
            _, metrics = original(*arguments)
        low, high = config.clip_ratio_low, config.clip_ratio_high
        low, high = (config.clip_ratio if bound is None else bound for bound in (low, high))
        aggregation = _aggregation(loss_agg_mode, response_mask, config)
        if aggregation is None or min(low, high) < 0:
            handle.warn_once(
                f"verl: got loss_agg_mode={loss_agg_mode!r} with clips {low} and {high}, expected one of "
                f"{', '.join(MODES)} with clips of at least 0: verl's own policy loss runs"
            )
            return original(*arguments)
        handle.count()
        if rollout_is_weights is not None:  # >= 0, so they pass through the minima and maxima
            advantages = advantages * rollout_is_weights
        scored = ppo_loss(
            log_prob,
            old_log_prob,
            advantages,
            response_mask,
            clip=low,
            clip_high=high,
            dual_clip=config.get("clip_ratio_c", 3.0),
            **aggregation,
        )
        return scored.loss, metrics

    return compute_policy_loss_vanilla


def _aggregation(mode: str, mask: Tensor, config: Any) -> dict[str, Any] | None:
    """`ppo_loss`'s aggregation and normalizer for verl's mode; None for a mode that is not in MODES.

    The totals are those of all ranks, whose gradients verl averages. A total of 0 leaves nothing to divide.
    """
    batch = config.global_batch_info
    ranks = batch.get("dp_size", 1)
    tokens, sequences = batch.get("batch_num_tokens"), batch.get("global_batch_size")
    if mode not in MODES:
        return None
    if mode == "token-sum":
        return {"aggregation": "sum", "normalizer": 1 / ranks}
    total = tokens if mode == "token-mean" else sequences
    divisor = None if total is None or total == 0 else total / ranks
    if mode == "token-mean":
        return {"aggregation": "token_mean", "normalizer": divisor}
    if mode == "seq-mean-token-mean":
        return {"aggregation": "sequence_mean", "normalizer": divisor}
    if divisor is None:
        divisor = (mask != 0).any(-1).sum().clamp(min=1)
    if mode == "seq-mean-token-sum-norm":
        length = batch.get("loss_scale_factor")
        divisor = divisor * (mask.shape[-1] if length is None else length)
    return {"aggregation": "sum", "normalizer": divisor}
