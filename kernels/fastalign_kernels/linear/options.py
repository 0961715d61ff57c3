"""The options that every head function shares, and their checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from .. import checks
from ..keywords import flat_signature, pick, refuse_unknown
from ..logits import make_transform
from ..softmax.rows import Transform
from .low_rank import LowRank, as_low_rank
from .sharded import Shards
from .sharded_agreement import OfLoss
from .sharded_inputs import check_group


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
    group: torch.distributed.ProcessGroup | torch.distributed.DeviceMesh | None


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
        sixteenth of its memory, at most 2560, and 512 in token_tiles; less makes the call slower
        (docs/head.md). On a CPU 96, or 72 beside a gradient of the weight. On a CPU whose products are
        torch's, low-precision weights are widened once besides (4 V H bytes).
    logits_dtype: None or torch.float32: logits are fp32 (fp64 for fp64). torch.bfloat16, for bf16 hidden
        states: they are rounded to bf16, as plain PyTorch's are. A GPU then needs no tile of fp32 logits,
        and the gradient overwrites them. On Hopper it gained 1 % at best (docs/gpu.md). A CPU rounds them
        too, which saves it nothing. A logit of 20 is off by up to 0.06, so log-probabilities are off by as
        much, as PyTorch's own are. Do not use it where they are compared with others: the ratios of PPO,
        the KL to a reference.
    screen: True computes logits in 8 bits, and again exactly where they matter (screen.py): a forward pass
        costs 0.4 to 0.5 of the exact one's time on a CPU with AVX-512 VNNI. On a GPU of compute capability
        9.0 it serves bf16 and fp16 from H 3072 on, in training with `tail_eps` alone, and no GPU has run it
        yet; smaller calls run exact (docs/screen.md). Elsewhere it is refused. Log-probabilities are off
        by 2e-4 nats rms or less, top-1 is exact. None is exact. Use it for passes without gradients, and with
        `tail_eps` in training.
    lora: None, or (A [r, H], B [V, r], scale), a LoRA adapter of the head: the logits are those of weight +
        scale * B @ A, which is never formed (low_rank.py). A and B have hidden's dtype or are fp32, and get
        their gradients. With a frozen weight training takes the GEMMs of a frozen head, and thin ones.
    group: a process group, or one dimension of a DeviceMesh, over whose ranks the rows of weight and bias are
        sharded: rank r has the next V_r rows after those of rank r - 1, and V_r may be 0. Every rank passes
        the same hidden states and the same ids, which stay ids of the whole vocabulary, and gets the same
        loss, the gradient of its own rows, and the whole gradient of hidden. sharded.py has the bytes that
        ranks send: O(N), and dX. A DTensor weight whose rows are sharded needs no group. A DTensor hidden
        sums its own gradient. Ranks with other hidden states compute a wrong loss: check=True sees that.
    check: on CUDA ids are not checked without check=True or FASTALIGN_CHECK=1, because the check waits for
        the device. There a negative id is ignored as ignore_index is, and an id of V or more makes its
        token's log-probability, and with it the loss, NaN.
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
    shards: Shards | None = None  # None: the weight is whole; no argument
    lora: LowRank | None = None
    # which `head_inputs` alone reads
    ignore_index: int = -100
    group: Any = None  # as given; its name where `shards` are known
    loss: OfLoss = OfLoss()  # no argument

    @property
    def transform(self) -> Transform:
        """The transform of raw logits into those of the softmax."""
        return Transform(self.logit_scale, self.softcap, self.temperature)

    def numbers(self) -> list[float]:
        """The options as one `float[]`, since each argument of an op costs microseconds; 0 is None."""
        low = float(self.logits_dtype is not None)
        return [
            *self.transform,
            self.workspace_mib or 0.0,
            self.tail_eps or 0.0,
            low,
            float(self.screen),
            float(self.lean),
            float(self.wide),
            float(self.check),
            *([] if self.shards is None else self.shards.numbers()),
        ]

    @classmethod
    def of(cls, numbers: list[float]) -> HeadOptions:
        """The options that `numbers` wrote."""
        logit_scale, softcap, temperature, workspace_mib, tail_eps, *rest = numbers
        low, screen, lean, wide, check, *shards = rest
        return cls(
            logit_scale=logit_scale,
            softcap=softcap,
            temperature=temperature,
            workspace_mib=workspace_mib or None,
            tail_eps=tail_eps or None,
            logits_dtype=torch.bfloat16 if low else None,
            screen=screen > 0,
            lean=lean > 0,
            wide=wide > 0,
            check=check > 0,
            shards=Shards.of(shards),
        )


SOFTMAX_ARGUMENTS = SoftmaxArguments.__optional_keys__
REFERENCE_ARGUMENTS = ReferenceArguments.__optional_keys__
HEAD_SETTINGS = HeadSettings.__optional_keys__
HEAD_ARGUMENTS = HeadArguments.__optional_keys__
HEAD_DEFAULTS = {**HeadOptions._field_defaults, "softcap": None, "screen": None}
head_keywords = flat_signature(HEAD_DEFAULTS, HeadArguments.__doc__)


def head_options(
    function: Callable[..., Any], given: Mapping[str, Any], known: frozenset[str] = HEAD_ARGUMENTS
) -> HeadOptions:
    """Check the options among the keywords of a head function.

    Args:
        function: errors name it.
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
    check_group(options.group)
    return HeadOptions(
        logit_scale=transform.logit_scale,
        softcap=transform.softcap,
        temperature=transform.temperature,
        workspace_mib=None if workspace_mib is None else checks.above_zero("workspace_mib", workspace_mib),
        tail_eps=None if tail_eps is None else checks.tail_eps(tail_eps),
        logits_dtype=checks.logits_dtype(options.logits_dtype),
        screen=checks.screen(options.screen, options.logits_dtype),
        ignore_index=checks.ignore_index(options.ignore_index),
        check=options.check,
        lora=as_low_rank(options.lora),
        group=options.group,
    )


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
    """Refuse label smoothing under a softcap with a tail."""
    if options.tail_eps is not None and label_smoothing and options.softcap:
        raise ValueError(
            f"tail_eps: got {options.tail_eps} with label_smoothing and softcap, expected None: under a "
            "softcap the smoothed part has no rank of 1"
        )
