"""The arguments that every head function shares: checked and brought into one form here, once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..device import architecture
from ..logits import kept_ids
from ..torch_func import requires_grad
from .gpu.device import no_screen
from .gpu.plan import GpuCall, screen_refusal
from .low_rank import ThinProduct, thin_product
from .options import HeadOptions, check_no_screen
from .plan import TileCall, select_mode
from .sharded_agreement import OfCall, compared_ids
from .sharded_inputs import local_head


class HeadInputs(NamedTuple):
    """What a head computes from."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H], of hidden's dtype or fp32; of a sharded head the rows of this rank
    ids: Tensor  # [N] int64, -1 where ignored
    bias: Tensor | None  # [V], of hidden's dtype or fp32; likewise
    options: HeadOptions
    lora_hidden: Tensor | None = None  # [N, r] fp32 (fp64 for fp64), of a LoRA adapter (low_rank.py)
    lora_weight: Tensor | None = None  # [V, r], of hidden's dtype or fp32
    group: str = ""  # the name of the process group of a sharded head

    @property
    def vocab_size(self) -> int:
        """The size V of the vocabulary of all ranks."""
        shards = self.options.shards
        return self.weight.shape[0] if shards is None else shards.vocab_size

    @property
    def planned_rows(self) -> int:
        """Rows of the weight for which chunks are planned: the largest shard's, so that all ranks have the
        same chunks."""
        shards = self.options.shards
        return self.weight.shape[0] if shards is None else shards.largest

    def local_ids(self, ids: Tensor) -> Tensor:
        """Ids as rows of `weight`."""
        shards = self.options.shards
        return ids if shards is None else shards.local_ids(ids)

    @property
    def lora(self) -> ThinProduct | None:
        """What a LoRA adapter adds to the raw logits."""
        if self.lora_hidden is None or self.lora_weight is None:
            return None
        return ThinProduct(self.lora_hidden, self.lora_weight)

    def lean(self) -> HeadInputs:
        """A copy that computes neither MEAN_LOGP nor ENTROPY."""
        return self._replace(options=self.options._replace(lean=True))

    def needs_grad(self) -> NeedsGrad:
        """Which gradients autograd will ask for."""
        if not torch.is_grad_enabled():
            return NeedsGrad()
        of_inputs = (self.hidden, self.weight, self.bias, self.lora_hidden, self.lora_weight)
        return NeedsGrad(*[x is not None and requires_grad(x) for x in of_inputs])

    def gpu_call(
        self,
        needs: NeedsGrad,
        workspace_mib: float,
        *,
        saved_mib: float | None = None,
        architecture: int = 0,
    ) -> GpuCall:
        """What the plan on a GPU depends on; workspace_mib, saved_mib: if the call does not say."""
        hidden, bias, options = self.hidden, self.bias, self.options
        mib = options.workspace_mib
        return GpuCall(
            n_tokens=hidden.shape[0],
            hidden_size=hidden.shape[1],
            vocab_size=self.planned_rows,
            dtype=hidden.dtype,
            workspace_mib=workspace_mib if mib is None else mib,
            hidden_grad=needs.hidden,
            head_grad=needs.head,
            tail=options.tail_eps is not None,
            cap=options.softcap / options.temperature,
            bias=bias is not None,
            architecture=architecture,
            saved_mib=saved_mib if mib is None else None,
            low_logits=options.logits_dtype is not None,
            lora_rank=0 if self.lora_weight is None else self.lora_weight.shape[1],
            lora_grad=needs.lora,
            screen=options.screen,
        )

    def tile_call(self, needs: NeedsGrad) -> TileCall:
        """What the chunks of token tiles depend on."""
        options = self.options
        return TileCall(
            vocab_size=self.planned_rows,
            dtype=self.hidden.dtype,
            kind=self.hidden.device.type,
            hidden_grad=needs.hidden or needs.lora,
            weight_grad=needs.head,
            tail_eps=options.tail_eps,
            workspace_mib=options.workspace_mib,
            screen=options.screen,
        )

    def mode(self, upstream: str) -> str:
        """How the call runs; `upstream` as in `plan_head`."""
        needs = self.needs_grad()
        return select_mode(self.hidden.dtype, needs.hidden, needs.head or needs.lora, upstream)


class NeedsGrad(NamedTuple):
    """Which of the head's inputs need a gradient."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    lora_hidden: bool = False  # U of `ThinProduct`
    lora_weight: bool = False  # B

    @property
    def head(self) -> bool:
        """Whether the weight or the bias is trained."""
        return self.weight or self.bias

    @property
    def lora(self) -> bool:
        """Whether a gradient reaches the adapter's product."""
        return self.lora_hidden or self.lora_weight


HEAD = NeedsGrad._fields  # the names of what gets a gradient


def local_tensors(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Callable[[], Tensor],
    options: HeadOptions,
) -> tuple[Tensor, Tensor, Tensor | None, HeadOptions]:
    """The tensors of a head on this rank, and options that know its shards; see `local_head`."""
    if isinstance(options.group, str):  # already local
        return hidden, weight, bias, options
    checks.shardable(hidden=hidden, weight=weight)
    checks.optional_tensors(bias=bias)
    adapter = None if options.lora is None else (options.lora.A, options.lora.B)
    reduction, *numbers = options.loss
    of_head = (*options.transform, options.workspace_mib, options.tail_eps)
    of_call = OfCall(options.group, (*of_head, *numbers), reduction, adapter)
    head = local_head(hidden, weight, bias, ids, of_call)
    return head.hidden, head.weight, head.bias, options._replace(shards=head.shards, group=head.group)


def check_weight_shape(weight: Tensor, options: HeadOptions) -> None:
    """The weight is floating point and [V, H], neither of them 0. A shard may have no row."""
    if weight.dim() != 2 or weight.shape[1] == 0 or (weight.shape[0] == 0 and options.shards is None):
        remedy = "; gather one that FSDP1 or ZeRO-3 has partitioned" if weight.dim() == 1 else ""
        raise ValueError(f"weight: got shape {list(weight.shape)}, expected [V, H]{remedy}")
    if not weight.is_floating_point():
        raise ValueError(
            f"weight: got {weight.dtype}, expected floating point; dequantise a quantised weight"
        )


def head_inputs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    options: HeadOptions,
    *,
    ids_name: str = "ids",
    mask: Tensor | None = None,
) -> HeadInputs:
    """Check the tensors of a head call and flatten their leading dimensions.

    Args:
        hidden: [..., H]. Under autocast it is cast to the autocast dtype.
        weight, bias: [V, H], [V], or with options.group or as DTensors the rows of this rank.
        ids: [...] in [0, V), or options.ignore_index.
        ids_name: the public function's name for ids.
        mask: [...] bool. Ids outside it may be anything and are ignored.
    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range.
    """
    ignore_index = options.ignore_index
    checks.shardable(hidden=hidden, weight=weight)
    checks.tensor(ids_name, ids)

    def counted() -> Tensor:
        return ids if mask is None else torch.where(mask, ids, ignore_index)

    hidden, weight, bias, options = local_tensors(hidden, weight, bias, counted, options)
    shards = options.shards
    check_weight_shape(weight, options)
    rows, H = weight.shape
    V = rows if shards is None else shards.vocab_size
    if hidden.dim() < 1 or hidden.shape[-1] != H:
        raise ValueError(
            f"hidden: got shape {list(hidden.shape)}, expected [..., H] = [..., {H}] as in weight"
        )
    checks.supported_device("hidden", hidden)
    device_type = hidden.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(device_type))
    checks.dtype("hidden", hidden, checks.FLOATS)
    if options.logits_dtype not in (None, hidden.dtype):
        raise ValueError(
            f"logits_dtype: got {options.logits_dtype} with {hidden.dtype} hidden states, expected None: "
            "logits in bf16 are those of bf16 hidden states"
        )
    if options.screen:
        if shards is not None:
            check_no_screen(options, "a head with a sharded vocabulary")
        _check_screen(no_screen(hidden.device, hidden.dtype))
    low_precision = hidden.dtype not in (torch.float32, torch.float64)
    allowed = (hidden.dtype, torch.float32) if low_precision else (hidden.dtype,)
    checks.dtype("weight", weight, allowed)
    checks.device("weight", weight, "hidden", hidden)
    checks.dtype(ids_name, ids, checks.INTEGERS)
    checks.shape(ids_name, ids, tuple(hidden.shape[:-1]), "hidden's leading shape")
    checks.device(ids_name, ids, "hidden", hidden)
    checks.ids(ids_name, ids if mask is None else torch.where(mask, ids, 0), V, ignore_index, options.check)
    if bias is not None:
        checks.tensor("bias", bias)
        checks.shape("bias", bias, (rows,), "[V]")
        checks.dtype("bias", bias, allowed)
        checks.device("bias", bias, "hidden", hidden)
        bias = bias.contiguous()  # the row kernels read it with a stride of 1
    checks.allocated(weight=weight, bias=bias)
    kept = kept_ids(ids, ignore_index)
    if mask is not None:
        kept = torch.where(mask.reshape(-1), kept, -1)
    hidden = hidden.reshape(-1, H)
    group = options.group if isinstance(options.group, str) else ""
    if shards is not None:
        checked = {}
        if options.check or checks.everywhere():
            adapter = {} if options.lora is None else {"lora's A": options.lora.A}
            checked = {"ids": kept, "hidden": hidden, **adapter}
        kept = compared_ids(kept, weight, checked, shards, group)
    inputs = HeadInputs(hidden, weight, kept, bias, options._replace(lora=None), group=group)
    _check_inference(inputs, {"hidden": hidden, ids_name: ids})
    if options.screen and options.lora is not None:
        check_no_screen(options, "a head with lora")
    if options.screen and hidden.is_cuda:
        call = inputs.gpu_call(inputs.needs_grad(), 0.0, architecture=architecture(hidden.device.index))
        _check_screen(screen_refusal(call))
    if options.lora is None:
        return inputs
    if shards is not None and not shards.reduces_hidden:
        raise ValueError(
            "lora: got an adapter with a DTensor as hidden, expected plain hidden states: their gradient is "
            "then summed here"
        )
    U, B = thin_product(options.lora, hidden, kept, weight, allowed)
    return inputs._replace(lora_hidden=U, lora_weight=B)


def _check_inference(inputs: HeadInputs, given: dict[str, Tensor]) -> None:
    """Refuse tensors of inference mode where a backward pass will read them."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    for name, x in given.items():
        if x.is_inference() and any(inputs.needs_grad()):
            raise ValueError(
                f"{name}: got a tensor that was made in inference mode, which no backward pass may read, "
                f"expected another: {name}.clone()"
            )


def _check_screen(refused: str) -> None:
    if refused:
        raise ValueError(f"screen: got True, expected None: {refused}")
