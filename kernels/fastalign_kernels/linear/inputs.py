"""The arguments that every head function shares: checked and brought into one form here, once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from .. import checks, gemm_int8
from ..keywords import flat_signature, pick, refuse_unknown
from ..logits import kept_ids, make_transform
from ..softmax.rows import Transform
from ..torch_func import requires_grad
from .gpu_plan import GpuCall
from .low_rank import LowRank, ThinProduct, as_low_rank, thin_product
from .plan import TileCall, select_mode


class SoftmaxArguments(TypedDict, total=False):
    """What a head's log-probabilities depend on. The references take these alone."""

    temperature: float
    softcap: float | None
    logit_scale: float
    ignore_index: int | None


class ReferenceArguments(SoftmaxArguments, total=False):
    """The keywords of the references: what the loss's value depends on."""

    lora: LowRank | tuple[Tensor, Tensor, float] | None


class HeadSettings(SoftmaxArguments, total=False):
    """The options of a head. A module of fastalign.nn takes them in its constructor."""

    tail_eps: float | None
    workspace_mib: float | None
    logits_dtype: torch.dtype | None
    screen: bool | None


class HeadArguments(HeadSettings, total=False):
    """The keywords of all head functions. A new one is a line here, one in `HeadOptions`, and its check.

    dtypes: hidden is fp32, bf16 or fp16, on a CPU also fp64. Under autocast it is cast to the autocast dtype.
        weight and bias are of hidden's dtype, or fp32 master weights beside bf16 or fp16 hidden states.
        Master weights are cast for the GEMMs, and their gradient is fp32, never rounded. ids (targets) are
        int64 or int32, in [0, V) or ignore_index.
    temperature, softcap, logit_scale: with z = hidden @ weight.T + bias, the softmax is that of z *
        logit_scale, then softcap * tanh(z / softcap), then z / temperature. softcap None: no such step.
    ignore_index: the id of tokens that are skipped. They enter no GEMM. None is -100, as in torch's
        linear_cross_entropy.
    tail_eps: None for exact gradients. Otherwise a block of tokens (256 on a CPU, 1024 on a GPU) takes only
        the columns of the softmax where some token's probability exceeds tail_eps into its backward GEMMs. A
        rank-1 matrix with the same row and column sums stands for the rest (tail_columns.py). The loss and
        the statistics stay exact. On a trained model gradients are off by 0.1 to 0.2 % at 2**-14 and by 0.4
        to 0.6 % at 2**-12 (`tail_report` measures it). 3 GEMMs become 1 + 2 f, f the share of columns kept.
        Where f > 0.6, as in an untrained model, a block runs exact.
    workspace_mib: MiB for logits and what is made of them beside the gradients. Default on a GPU: a
        sixteenth of its memory, at most 2560; less makes the call slower (docs/head.md). On a CPU 96, or 72
        beside a gradient of the weight. On a CPU whose products are torch's, low-precision weights are
        widened once besides (4 V H bytes).
    logits_dtype: None or torch.float32: logits are fp32 (fp64 for fp64). torch.bfloat16, for bf16 hidden
        states: they are rounded to bf16, as plain PyTorch's are. A GPU then needs no tile of fp32 logits,
        and the gradient overwrites them. On Hopper the default was faster (docs/gpu.md). A CPU rounds them
        too, which saves it nothing. A logit of 20 is off by up to 0.06, so log-probabilities are off by as
        much, as PyTorch's own are. Do not use it where they are compared with others: the ratios of PPO,
        the KL to a reference.
    screen: True computes logits in 8 bits, and again exactly where they matter (screen.py): a forward pass
        costs 0.4 to 0.5 of the exact one's time on a CPU with AVX-512 VNNI, which is where it runs; elsewhere
        it is refused. Log-probabilities are off by 2e-4 nats rms or less, top-1 is exact. None is exact.
        Use it for passes without gradients, and with `tail_eps` in training.
    lora: None, or (A [r, H], B [V, r], scale), a LoRA adapter of the head: the logits are those of weight +
        scale * B @ A, which is never formed (low_rank.py). A and B have hidden's dtype or are fp32, and get
        their gradients. With a frozen weight training takes the GEMMs of a frozen head, and thin ones.
    check: on CUDA, also check the range of ids, which waits for the device. FASTALIGN_CHECK=1 does so
        everywhere.
    """

    lora: LowRank | tuple[Tensor, Tensor, float] | None
    check: bool


class HeadOptions(NamedTuple):
    """The options of a head call with their defaults; checked by `head_options`."""

    # the numbers, in the order of an op's list
    logit_scale: float = 1.0
    softcap: float = 0.0  # 0: none, which is None as an argument
    temperature: float = 1.0
    workspace_mib: float | None = None  # None: the planner's default
    tail_eps: float | None = None  # None: exact gradients
    logits_dtype: torch.dtype | None = None  # torch.bfloat16, or None: the accumulator's
    screen: bool = False  # False: exact logits, which is None as an argument
    lean: bool = False  # MEAN_LOGP and ENTROPY are not used: an engine may leave them 0; no argument
    wide: bool = False  # a GPU engine gives dX in the accumulator's dtype; no argument
    check: bool = False
    lora: LowRank | None = None
    ignore_index: int = -100  # which `head_inputs` alone reads

    @property
    def transform(self) -> Transform:
        """From raw logits to those of the softmax."""
        return Transform(self.logit_scale, self.softcap, self.temperature)

    def numbers(self) -> list[float]:
        """As one `float[]` for an op: each argument of an op costs microseconds a call. 0 stands for None."""
        low = float(self.logits_dtype is not None)
        return [
            *self[:3],
            self.workspace_mib or 0.0,
            self.tail_eps or 0.0,
            low,
            float(self.screen),
            float(self.lean),
            float(self.wide),
            float(self.check),
        ]

    @classmethod
    def of(cls, numbers: list[float]) -> HeadOptions:
        """From `numbers`."""
        logit_scale, softcap, temperature, workspace_mib, tail_eps, low, screen, lean, wide, check = numbers
        return cls(
            logit_scale,
            softcap,
            temperature,
            workspace_mib or None,
            tail_eps or None,
            torch.bfloat16 if low else None,
            screen > 0,
            lean > 0,
            wide > 0,
            check=check > 0,
        )


SOFTMAX_ARGUMENTS = SoftmaxArguments.__optional_keys__
REFERENCE_ARGUMENTS = ReferenceArguments.__optional_keys__
HEAD_SETTINGS = HeadSettings.__optional_keys__
HEAD_ARGUMENTS = HeadArguments.__optional_keys__
HEAD_DEFAULTS = {**HeadOptions._field_defaults, "softcap": None, "screen": None}
head_keywords = flat_signature(HEAD_DEFAULTS, HeadArguments.__doc__)


class HeadInputs(NamedTuple):
    """What a head computes from."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H], of hidden's dtype or fp32
    ids: Tensor  # [N] int64, -1 where ignored
    bias: Tensor | None  # [V], of hidden's dtype or fp32
    options: HeadOptions
    lora_hidden: Tensor | None = None  # [N, r] fp32 (fp64 for fp64), of a LoRA adapter (low_rank.py)
    lora_weight: Tensor | None = None  # [V, r], of hidden's dtype or fp32

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def lora(self) -> ThinProduct | None:
        """What a LoRA adapter adds to the raw logits."""
        if self.lora_hidden is None or self.lora_weight is None:
            return None
        return ThinProduct(self.lora_hidden, self.lora_weight)

    def lean(self) -> HeadInputs:
        """The same for a loss that uses neither MEAN_LOGP nor ENTROPY."""
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
        hidden, weight, bias, options = self.hidden, self.weight, self.bias, self.options
        mib = options.workspace_mib
        return GpuCall(
            hidden.shape[0],
            hidden.shape[1],
            weight.shape[0],
            hidden.dtype,
            workspace_mib if mib is None else mib,
            needs.hidden,
            needs.head,
            options.tail_eps is not None,
            options.softcap / options.temperature,
            bias is not None,
            architecture,
            saved_mib if mib is None else None,
            options.logits_dtype is not None,
            lora_rank=0 if self.lora_weight is None else self.lora_weight.shape[1],
            lora_grad=needs.lora,
        )

    def tile_call(self, needs: NeedsGrad) -> TileCall:
        """What the chunks of token tiles depend on."""
        options = self.options
        return TileCall(
            self.vocab_size,
            self.hidden.dtype,
            self.hidden.device.type,
            needs.hidden or needs.lora,
            needs.head,
            options.tail_eps,
            options.workspace_mib,
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


def head_options(
    function: Callable[..., Any], given: Mapping[str, Any], known: frozenset[str] = HEAD_ARGUMENTS
) -> HeadOptions:
    """Check the options among the keywords of a head function.

    Args:
        function: its name is told in errors.
        given: its keywords, those of `HeadArguments` and others.
        known: the names that it takes.
    Raises:
        TypeError: a name that the function does not take.
        ValueError: an option of the wrong kind or range.
    """
    refuse_unknown(function, given, known)
    options = HeadOptions(**pick(given, HEAD_ARGUMENTS))
    transform = make_transform(options.logit_scale, given.get("softcap"), options.temperature)
    workspace_mib, tail_eps = options.workspace_mib, options.tail_eps
    checks.flags(check=options.check)
    return HeadOptions(
        *transform,
        None if workspace_mib is None else checks.above_zero("workspace_mib", workspace_mib),
        None if tail_eps is None else checks.tail_eps(tail_eps),
        checks.logits_dtype(options.logits_dtype),
        checks.screen(options.screen, options.logits_dtype),
        ignore_index=checks.ignore_index(options.ignore_index),
        check=options.check,
        lora=as_low_rank(options.lora),
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
        weight, bias: [V, H], [V].
        ids: [...] in [0, V), or options.ignore_index.
        ids_name: the public function's name for ids.
        mask: [...] bool. Ids outside it may be anything and are ignored.
    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range.
    """
    ignore_index = options.ignore_index
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
    if options.logits_dtype not in (None, hidden.dtype):
        raise ValueError(
            f"logits_dtype: got {options.logits_dtype} with {hidden.dtype} hidden states, expected None: "
            "logits in bf16 are those of bf16 hidden states"
        )
    if options.screen:
        refused = gemm_int8.refusal(hidden.device, hidden.dtype)
        if refused:
            raise ValueError(f"screen: got True, expected None: {refused}")
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
        checks.shape("bias", bias, (V,), "[V]")
        checks.dtype("bias", bias, allowed)
        checks.device("bias", bias, "hidden", hidden)
        bias = bias.contiguous()  # the row kernels read it with a stride of 1
    kept = kept_ids(ids, ignore_index)
    if mask is not None:
        kept = torch.where(mask.reshape(-1), kept, -1)
    hidden = hidden.reshape(-1, H)
    inputs = HeadInputs(hidden, weight, kept, bias, options._replace(lora=None))
    if options.screen and options.lora is not None:
        check_no_screen(options, "a head with lora")
    if options.lora is None:
        return inputs
    U, B = thin_product(options.lora, hidden, kept, weight, allowed)
    return inputs._replace(lora_hidden=U, lora_weight=B)


def check_no_tail(options: HeadOptions, served: str) -> None:
    """Refuse tail_eps where gradients are exact alone; `served` says of what."""
    if options.tail_eps is not None:
        raise ValueError(
            f"tail_eps: got {options.tail_eps}, expected None: {served} has exact gradients alone"
        )


def check_no_screen(options: HeadOptions, served: str) -> None:
    """Refuse screen where logits are exact alone; `served` says of what."""
    if options.screen:
        raise ValueError(f"screen: got True, expected None: {served} has exact logits alone")


def check_tail_smoothing(options: HeadOptions, label_smoothing: float) -> None:
    """Refuse what the tail cannot serve."""
    if options.tail_eps is not None and label_smoothing and options.softcap:
        raise ValueError(
            f"tail_eps: got {options.tail_eps} with label_smoothing and softcap, expected None: under a "
            "softcap the smoothed part has no rank of 1"
        )
