"""The arguments that every head function shares: checked and brought into one form here, once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..logits import kept_ids, make_transform
from ..softmax.rows import Transform
from ..torch_func import requires_grad
from .gpu_plan import GpuCall
from .plan import select_mode


class HeadOptions(NamedTuple):
    """The numbers of a head call, checked by `head_options`."""

    logit_scale: float = 1.0
    softcap: float = 0.0  # 0: none
    temperature: float = 1.0
    workspace_mib: float | None = None  # None: the planner's default
    tail_eps: float | None = None  # None: exact gradients
    lean: bool = False  # MEAN_LOGP and ENTROPY are not used: an engine may leave them 0

    @property
    def transform(self) -> Transform:
        """From raw logits to those of the softmax."""
        return Transform(self.logit_scale, self.softcap, self.temperature)

    def numbers(self) -> list[float]:
        """As one `float[]` for an op: each argument of an op costs microseconds a call. 0 stands for None."""
        return [*self[:3], self.workspace_mib or 0.0, self.tail_eps or 0.0, float(self.lean)]

    @classmethod
    def of(cls, numbers: list[float]) -> HeadOptions:
        """From `numbers`."""
        logit_scale, softcap, temperature, workspace_mib, tail_eps, lean = numbers
        return cls(logit_scale, softcap, temperature, workspace_mib or None, tail_eps or None, lean > 0)


class HeadInputs(NamedTuple):
    """What a head computes from."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H], of hidden's dtype or fp32
    ids: Tensor  # [N] int64, -1 where ignored
    bias: Tensor | None  # [V], of hidden's dtype or fp32
    options: HeadOptions

    @classmethod
    def of(
        cls, hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None, numbers: list[float]
    ) -> HeadInputs:
        """From the arguments of an op."""
        return cls(hidden, weight, ids, bias, HeadOptions.of(numbers))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The first arguments of every head op."""
        return self[:4]

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    def lean(self) -> HeadInputs:
        """The same for a loss that uses neither MEAN_LOGP nor ENTROPY."""
        return self._replace(options=self.options._replace(lean=True))

    def needs_grad(self) -> NeedsGrad:
        """Which gradients autograd will ask for."""
        if not torch.is_grad_enabled():
            return NeedsGrad()
        hidden, weight, _, bias, _ = self
        return NeedsGrad(
            requires_grad(hidden), requires_grad(weight), bias is not None and requires_grad(bias)
        )

    def gpu_call(self, needs: NeedsGrad, workspace_mib: float) -> GpuCall:
        """What the plan on a GPU depends on; workspace_mib: if the call does not say."""
        mib = self.options.workspace_mib
        return GpuCall(
            n_tokens=self.hidden.shape[0],
            hidden_size=self.hidden.shape[1],
            vocab_size=self.vocab_size,
            dtype=self.hidden.dtype,
            workspace_mib=workspace_mib if mib is None else mib,
            hidden_grad=needs.hidden,
            head_grad=needs.head,
            tail=self.options.tail_eps is not None,
        )

    def mode(self, upstream: str) -> str:
        """How the call runs; `upstream` as in `plan_head`."""
        needs = self.needs_grad()
        return select_mode(self.hidden.dtype, needs.hidden, needs.head, upstream)


class NeedsGrad(NamedTuple):
    """Which of the head's inputs need a gradient."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False

    @property
    def head(self) -> bool:
        """Whether the head itself is trained."""
        return self.weight or self.bias


def head_options(
    *,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    tail_eps: float | None,
    workspace_mib: float | None,
) -> HeadOptions:
    """Check the numbers that all head functions take.

    Raises:
        ValueError: a number of the wrong kind or range.
    """
    return HeadOptions(
        *make_transform(logit_scale, softcap, temperature),
        workspace_mib=None if workspace_mib is None else checks.above_zero("workspace_mib", workspace_mib),
        tail_eps=None if tail_eps is None else checks.tail_eps(tail_eps),
    )


def head_inputs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    options: HeadOptions,
    *,
    ignore_index: int | None,
    check: bool,
    ids_name: str = "ids",
    mask: Tensor | None = None,
) -> HeadInputs:
    """Check the tensors of a head call and flatten their leading dimensions.

    Args:
        hidden: [..., H]. Under autocast it is cast to the autocast dtype.
        weight, bias: [V, H], [V].
        ids: [...] in [0, V), or ignore_index.
        ids_name: the public function's name for ids.
        mask: [...] bool. Ids outside it may be anything and are ignored.
        check: on CUDA, also check the range of ids, which waits for the device.
    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range.
    """
    ignore_index = checks.ignore_index(ignore_index)
    checks.flags(check=check)
    checks.tensors(**{"hidden": hidden, "weight": weight, ids_name: ids})
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight: got shape {list(weight.shape)}, expected [V, H]")
    V, H = weight.shape
    if hidden.dim() < 1 or hidden.shape[-1] != H:
        raise ValueError(
            f"hidden: got shape {list(hidden.shape)}, expected [..., H] = [..., {H}] as in weight"
        )
    checks.supported_device("hidden", hidden)
    device_type = hidden.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(device_type))
    checks.dtype("hidden", hidden, checks.FLOATS)
    low_precision = hidden.dtype not in (torch.float32, torch.float64)
    allowed = (hidden.dtype, torch.float32) if low_precision else (hidden.dtype,)
    checks.dtype("weight", weight, allowed)
    checks.device("weight", weight, "hidden", hidden)
    checks.dtype(ids_name, ids, checks.INTEGERS)
    checks.shape(ids_name, ids, tuple(hidden.shape[:-1]), "hidden's leading shape")
    checks.device(ids_name, ids, "hidden", hidden)
    checks.ids(ids_name, ids if mask is None else torch.where(mask, ids, 0), V, ignore_index, check)
    if bias is not None:
        checks.tensor("bias", bias)
        checks.shape("bias", bias, (V,), "[V]")
        checks.dtype("bias", bias, allowed)
        checks.device("bias", bias, "hidden", hidden)
        bias = bias.contiguous()  # the row kernels read it with a stride of 1
    kept = kept_ids(ids, ignore_index)
    if mask is not None:
        kept = torch.where(mask.reshape(-1), kept, -1)
    return HeadInputs(hidden.reshape(-1, H), weight, kept, bias, options)


def check_tail_smoothing(tail_eps: float | None, label_smoothing: float, softcap: float | None) -> None:
    if tail_eps is not None and label_smoothing and softcap:
        raise ValueError(
            f"tail_eps: got {tail_eps} with label_smoothing and softcap, expected None: under a softcap the "
            "smoothed part has no rank of 1"
        )
