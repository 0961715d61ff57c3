"""A fused head inside a transformers causal LM's own forward: the loss without full logits.

`fuse_head(model)` replaces two `forward` methods on the instances: the model's and its output embeddings'.
With `labels` or `shift_labels`, the model runs its backbone and calls its `lm_head` module with the
targets, and the head's kernels run inside that call. So whatever hooks modules sees an ordinary forward:
DDP and FSDP2 find the loss and the statistics in the returned `ModelOutput`, FSDP2 gathers the head's
weight before it is read, and PEFT dispatches to the active copy. Without labels the model's own forward
runs, so `generate` is unaffected. It also runs when the fused head cannot give what is asked for; see
full_logits.py.

The config declares what lies between `lm_head` and the loss (logit scale, softcap). By default it is proven
on ten tokens when the head is fused. A model that cannot be served exactly is refused by name.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from fastalign_kernels import (
    PolicyLoss,
    checks,
    linear_cross_entropy_stats,
    linear_logprobs,
    linear_ppo_loss,
    linear_token_stats,
)
from fastalign_kernels.ordered_sum import ordered_sum

from .full_logits import LOSS_FUNCTION, needs_full_logits, warn_if_trl_scores
from .fused_options import checked_options, options_of, set_options
from .parallel_heads import keep_forward, plain_logits, refuse_shards, restore_forward
from .peft_heads import ReplacedRows, adapter_forward
from .probe import (
    LogitTransform,
    check_fused,
    declared_transforms,
    explain_loss,
    probing,
    unsupported,
)
from .probe import UnsupportedModelError as UnsupportedModelError
from .rebinding import Rebound
from .servable_heads import (
    adapted_head,
    backbone_of,
    causal_lm_of,
    explain_unservable,
    heads_of,
    plain_heads,
    refuse_router_loss,
    refuse_unservable,
)
from .servable_heads import backbone as backbone
from .transformers_names import CACHE
from .versions import noting_newer_packages

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class FusedCausalLMOutput(CausalLMOutputWithPast):
    """What a fused model returns with labels: a plain model's output and the fields below.

    `loss` is a scalar in nats. `logits` is always None. The cache, `hidden_states` and `attentions` are the
    backbone's. The cache has the name of this transformers version (`past_key_values` up to 5.23, `cache`
    since 5.24).

    `logp`, `entropy`, `lse` (fp32, or fp64 for fp64; nats) and `top1` (bool) are [B, T] and aligned with
    `shift_labels`: position t describes token t + 1. Ignored positions hold 0 or False. With PPO's loss,
    `policy` replaces the statistics. `last_hidden_state` is the input of lm_head.
    """

    logp: Tensor | None = None
    entropy: Tensor | None = None
    lse: Tensor | None = None
    top1: Tensor | None = None
    policy: PolicyLoss | None = None
    last_hidden_state: Tensor | None = None


@noting_newer_packages()
def fuse_head(
    model: Model,
    *,
    verify: bool = True,
    tail_eps: float | None = None,
    screen: bool | None = None,
    logits_dtype: torch.dtype | None = None,
) -> Model:
    """Let a transformers causal LM (or the one in a PeftModel) compute its loss through the fused head.

    Afterwards `model(..., labels=[B, T])` (shifted inside) or `model(..., shift_labels=[B, T])` (already
    shifted; it wins if both are given) returns a `FusedCausalLMOutput`. Further keywords of that call:

    - `num_items_in_batch` (int or tensor) divides the loss, which is a sum over targets. Default: the
      number of targets that are not `ignore_index` (-100).
    - `token_stats=True` makes logp, entropy and lse differentiable; the loss is -Σ logp divided by their
      number. By default the loss computes its gradient in the forward pass, and the statistics have none.
      With `kept`, as in `linear_logprobs` over the B T positions of `shift_labels`, logp is over each
      position's kept ids, and the other statistics are None.
    - `ppo` holds arguments of `linear_ppo_loss` from `old_logp` on, [B, T] as `shift_labels`. The loss is
      PPO's, the output's `policy` is what that function returns, and there are no other statistics. With
      `cu_seqlens`, over the B T positions, its tensors are [B T].
    - `temperature` (1.0) divides the logits. `workspace_mib` bounds the head's memory.
    - `keep_hidden=True` returns the backbone's `last_hidden_state`, for a head of another kind.

    `tail_eps`, `screen` and `logits_dtype` are those of `linear_cross_entropy`. They hold for all losses of
    the model until it is fused with others.

    The same object is returned, and fusing twice changes nothing else. Fuse before DDP or
    torch.compile wraps the model; FSDP2's `fully_shard` may come before or after. A deep copy of a fused
    model is fused, and so is a pickled one (torch.save). A model that transformers sharded by its
    `tp_plan` keeps its shards: every rank passes the same rows, and no rank gathers logits.

    The model's own forward runs, with logits, when transformers' Trainer collects predictions
    (`compute_metrics`, `predict`). It runs with one warning in training without labels, after
    `model.loss_function` was set, and while lm_head has adapters that cannot be served.

    PEFT's LoRA on lm_head is served, and so are `trainable_token_indices` of tied embeddings: the sum of
    weight and adapter is never formed. The adapter may come before or after fusing. Dropout, rsLoRA,
    `disable_adapter` and merging act as in PEFT.

    With `verify`, the model's own forward runs on ten tokens (evaluation mode, no gradient, RNG state
    kept), and its logits and loss are compared with the fused head's from the same hidden states. Without it,
    what an earlier fusing found holds, or else the config.

    Raises:
        UnsupportedModelError: an encoder-decoder, no output embeddings, an lm_head that is not a plain
            nn.Linear (quantised), several active adapters or DoRA on it, an auxiliary router loss, a forward
            that is already replaced, or a mismatch found by `verify`.
        ValueError: `verify` with weights on the meta device, a tail_eps outside (0, 1), another logits_dtype
            than None, torch.float32 or torch.bfloat16, or a screen beside it or where the head's device or
            dtype has none.
    """
    base = causal_lm_of(model)
    heads = heads_of(base)
    options = checked_options(heads[0], tail_eps=tail_eps, screen=screen, logits_dtype=logits_dtype)
    if (
        all(_is_ours(module) for module in (base, *heads))
        and base.loss_function is base.__dict__[LOSS_FUNCTION]
    ):
        set_options(base, options)
        return model
    known = base.__dict__.get("_fastalign_transform")
    unfuse_head(base)  # the lm_head or the loss_function was replaced after fusing, so fuse again
    refuse_unservable(base, heads)
    if not verify:
        _patch(base, heads, known or declared_transforms(base)[0])
    elif any(parameter.is_meta for parameter in base.parameters()):
        raise ValueError(
            f"model: got {type(base).__name__} with weights on the meta device, expected values, to verify "
            "its logits: materialise it first or pass verify=False"
        )
    else:
        with probing(base), ExitStack() as undo:
            explained = explain_loss(base, plain_heads(base)[0])
            undo.callback(unfuse_head, base)
            _patch(base, heads, explained.transform)
            check_fused(base, explained)
            undo.pop_all()
    set_options(base, options)  # after the check, which needs exact logits and gradients
    return model


def unfuse_head(model: Model) -> Model:
    """Give a fused model its own forwards back. A model that is not fused stays as it is.

    Raises:
        ValueError: something (accelerate's mixed precision, for example) wrapped the fused forward
            afterwards.
    """
    base = causal_lm_of(model)
    if "_fastalign_transform" in base.__dict__ and not _is_ours(base):
        raise ValueError(
            f"model: got {type(base).__name__}, whose forward was replaced after fuse_head, expected the "
            "fused forward: undo that first (accelerate: unwrap_model(model, keep_fp32_wrapper=False))"
        )
    for module in base.modules():
        if _is_ours(module):
            for name in ("forward", "__reduce_ex__", "get_output_embeddings"):
                module.__dict__.pop(name, None)
            restore_forward(module)
    for name in [name for name in base.__dict__ if name.startswith("_fastalign_")]:
        del base.__dict__[name]
    return model


# The two forwards are bound methods that close over no instance, so copy.deepcopy rebinds them to the copy.


@cache
def _fused_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a fused model whose class has `original`. `generate` and Trainer see its signature."""
    signature = inspect.signature(original)
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    _, *positional = (name for name, p in signature.parameters.items() if p.kind in by_position)

    def _fastalign_model_forward(
        self: PreTrainedModel,
        *args: Any,
        token_stats: bool = False,
        kept: tuple[Tensor, Tensor] | None = None,
        ppo: Mapping[str, Any] | None = None,
        keep_hidden: bool = False,
        temperature: float = 1.0,
        workspace_mib: float | None = None,
        **kwargs: Any,
    ) -> Any:
        given = dict(zip(positional, args, strict=False))
        if len(args) > len(positional) or any(name in kwargs for name in given):
            return original(self, *args, **kwargs)  # raises Python's own TypeError
        arguments = given | kwargs
        if kept is not None and not token_stats:
            raise ValueError("kept: got sets without token_stats, expected token_stats=True; ppo has its own")
        unlabelled = arguments.get("labels") is None and arguments.get("shift_labels") is None
        options_given = (
            token_stats or ppo is not None or keep_hidden or temperature != 1.0 or workspace_mib is not None
        )
        if unlabelled and options_given:
            asked = f"token_stats={token_stats}, ppo={ppo and sorted(ppo)}, keep_hidden={keep_hidden}"
            raise ValueError(
                f"labels: got None with {asked}, temperature={temperature}, workspace_mib={workspace_mib}, "
                "expected labels or shift_labels"
            )
        _adopt_adapter(self)
        if not options_given and needs_full_logits(
            self, labelled=not unlabelled, unservable_head=explain_unservable(self)
        ):
            return original(self, *args, **kwargs)
        if token_stats and ppo is not None:
            raise ValueError("token_stats: got both token_stats and ppo, expected one of them")
        return_dict = arguments.pop("return_dict", None)
        options: dict[str, Any] = {"temperature": temperature, "workspace_mib": workspace_mib}
        options |= {} if kept is None else {"kept": kept}
        output = _run(self, arguments, token_stats, ppo, keep_hidden, options)
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()

    _fastalign_model_forward.__signature__ = signature  # type: ignore[attr-defined]
    _fastalign_model_forward.__doc__ = original.__doc__
    return _fastalign_model_forward


def _fastalign_head_forward(
    self: nn.Linear,
    hidden: Tensor,
    targets: Tensor | None = None,
    head: Callable[..., Any] = linear_token_stats,
    replaced_rows: ReplacedRows | None = None,
    **options: Any,
) -> Any:
    """lm_head's forward: logits without targets, else the named tuple of `head`, a kernel's function.

    replaced_rows: rows in place of some of the weight's. They are read here, where FSDP2 has gathered it.
    """
    if targets is None:
        return plain_logits(self, hidden)
    refuse_shards(self, served=replaced_rows is None)
    if replaced_rows is not None:
        options["lora"] = replaced_rows.low_rank(self.weight)
    return head(hidden, self.weight, targets, bias=self.bias, **options)


def _adopt_adapter(model: PreTrainedModel) -> None:
    """Fuse the adapters that PEFT put on a fused lm_head after fuse_head."""
    wrapper = adapted_head(model)
    if wrapper is not None and not _is_ours(wrapper) and not torch.compiler.is_compiling():
        _patch_module(wrapper)


def _fastalign_output_embeddings(self: PreTrainedModel) -> Any:
    """The model's output embeddings. Whoever replaced the fused forward and reads them is noticed here."""
    if not torch.compiler.is_compiling():
        warn_if_trl_scores(self)
    return type(self).get_output_embeddings(self)


def _run(
    model: PreTrainedModel,
    arguments: dict[str, Any],
    token_stats: bool,
    ppo: Mapping[str, Any] | None,
    keep_hidden: bool,
    options: dict[str, Any],
) -> FusedCausalLMOutput:
    """Run the backbone, then lm_head with the targets. `arguments` are the call's, by name."""
    labels, targets = arguments.pop("labels", None), arguments.pop("shift_labels", None)
    num_items = arguments.pop("num_items_in_batch", None)
    ignore_index = checks.ignore_index(arguments.pop("ignore_index", None))
    logits_to_keep = arguments.pop("logits_to_keep", 0)
    if isinstance(logits_to_keep, Tensor) or logits_to_keep != 0:
        raise ValueError(
            f"logits_to_keep: got {logits_to_keep} with labels, expected 0; ignore targets with -100"
        )
    refuse_router_loss(model, arguments.get("output_router_logits"))
    if not all(_is_ours(head) for head in heads_of(model)):
        raise unsupported(
            model,
            "had its lm_head replaced after fuse_head",
            expected="the same lm_head: call fuse_head again",
        )
    if targets is None:
        targets = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    ids = arguments.get("input_ids")
    shape = ids.shape if ids is not None else arguments["inputs_embeds"].shape[:-1]
    if targets.shape != shape:
        raise ValueError(
            f"labels: got shape {list(targets.shape)}, expected {list(shape)}, the shape of the tokens"
        )

    inner = backbone_of(model)(**arguments, return_dict=True)
    hidden = inner.last_hidden_state
    targets = targets.to(hidden.device)
    if isinstance(num_items, Tensor):
        num_items = num_items.to(hidden.device)
    transform: LogitTransform = model.__dict__["_fastalign_transform"]
    options |= {"ignore_index": ignore_index, **options_of(model), **transform._asdict()}
    kept = {name: getattr(inner, name, None) for name in (CACHE, "hidden_states", "attentions")}
    kept |= {"last_hidden_state": hidden} if keep_hidden else {}
    head = model.get_output_embeddings()
    if ppo is not None:
        if ppo.get("cu_seqlens") is not None:
            hidden, targets = hidden.flatten(0, 1), targets.flatten()
        policy = head(hidden, targets, head=linear_ppo_loss, **options, **ppo)
        return FusedCausalLMOutput(loss=policy.loss, policy=policy, **kept)
    if token_stats:
        divisor = (targets != ignore_index).sum() if num_items is None else num_items
        if "kept" in options:
            logp = head(hidden, targets, head=linear_logprobs, **options)
            return FusedCausalLMOutput(loss=-ordered_sum(logp) / divisor, logp=logp, **kept)
        stats = head(hidden, targets, head=linear_token_stats, **options)
        loss = -ordered_sum(stats.logp) / divisor
    else:
        stats = head(hidden, targets, head=linear_cross_entropy_stats, **options, num_items=num_items)
        loss = stats.loss
    return FusedCausalLMOutput(
        loss=loss, logp=stats.logp, entropy=stats.entropy, lse=stats.lse, top1=stats.top1, **kept
    )


def _patch(model: PreTrainedModel, heads: Sequence[nn.Module], transform: LogitTransform) -> None:
    model.__dict__["_fastalign_transform"] = transform
    model.__dict__[LOSS_FUNCTION] = model.loss_function
    model.__dict__["get_output_embeddings"] = _embeddings_of(model)
    for module in (model, *heads):
        _patch_module(module)


def _patch_module(module: nn.Module) -> None:
    keep_forward(module)
    module.__dict__["forward"] = _forward_of(module)
    module.__dict__["__reduce_ex__"] = _reduce_of(module)


def _forward_of(module: nn.Module) -> MethodType:
    """Our forward, bound to the module: a model's, an lm_head's, or that of PEFT's wrapper of one."""
    if isinstance(module, PreTrainedModel):
        return MethodType(_fused_forward(type(module).forward), module)
    return MethodType(adapter_forward(module) or _fastalign_head_forward, module)


def _embeddings_of(model: nn.Module) -> MethodType:
    return MethodType(_fastalign_output_embeddings, model)


def _reduce_of(module: nn.Module) -> MethodType:
    return MethodType(_reduce, module)


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """Pickle or copy a fused module.

    Python pickles a bound method by its name, which the module's class does not have.
    """
    reduced: Any = type(self).__reduce_ex__(self, protocol)
    made, arguments, state, *rest = reduced
    ours = {"forward": Rebound(_forward_of, self)} if _is_ours(self) else {}
    if "get_output_embeddings" in state:
        ours["get_output_embeddings"] = Rebound(_embeddings_of, self)
    return made, arguments, state | ours | {"__reduce_ex__": Rebound(_reduce_of, self)}, *rest


def _is_ours(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    # torch.compile traces this. The compiler of torch 2.11 does not read a bound method's own __name__.
    return isinstance(forward, MethodType) and forward.__func__.__name__.startswith("_fastalign_")
