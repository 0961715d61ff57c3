"""What a head call costs on a GPU: GEMMs, bytes beside them, launches, memory; and predicted milliseconds.

The milliseconds are a roofline: GEMMs and the passes between them run one after another, each at the rate
that the card reaches. They are predictions. Where docs/gpu.md has a measured time, that is the one to trust.
"""

from __future__ import annotations

from typing import NamedTuple

from ..head_plan import HeadPlan
from .plan import TILE_COLUMNS, GpuCall


class Rates(NamedTuple):
    """What a card reaches."""

    flops: float  # a second, in the 16-bit GEMMs of a head
    fp32_flops: float
    bytes: float  # a second, reads and writes of a copy
    epilogue: float  # seconds a logit beyond cuBLAS's GEMM in the forward kernel of `epilogue`: exponentials
    launch: float = 10e-6  # seconds a kernel: its first and its last wave


# By compute capability. 90 is an H200's, measured (docs/gpu.md): bare GEMMs, a copy, and the forward kernel
# beside cuBLAS at five shapes, 0.66 to 0.86 ps. The rest are data sheets times the shares that Hopper
# reaches, so predicted.
RATES = {
    80: Rates(221e12, 13.8e12, 1.84e12, 0.0),
    90: Rates(686e12, 47e12, 4.2e12, 0.75e-12),
    100: Rates(1593e12, 53e12, 7.2e12, 0.0),
}
H100_BYTES = 3.0e12  # 0.9 of its 3.35 TB/s; an H100 has at most 96 GB
H100_MEMORY_MIB = 100_000


class GpuWork(NamedTuple):
    """The cost of a call."""

    forwards: float  # GEMMs of the logits; each of 2 N H V flops, as those of dX and dW
    pass_bytes: float  # beyond those of bare GEMMs in the inputs' dtype
    held_bytes: float  # beyond the inputs, gradients included
    launches: int  # kernels
    epilogue_logits: float = 0.0  # logits whose GEMM has the statistics in its epilogue


def rates_of(architecture: int, memory_mib: float | None = None) -> Rates | None:
    """The rates of a card; None if its compute capability is not known here."""
    rates = RATES.get(architecture)
    if rates is not None and architecture == 90 and memory_mib is not None and memory_mib < H100_MEMORY_MIB:
        return rates._replace(bytes=H100_BYTES)
    return rates


def milliseconds(work: GpuWork, call: GpuCall, rates: Rates) -> float:
    """Predicted time of a call on the device alone."""
    flops = rates.flops if call.low_precision else rates.fp32_flops
    gemm_flops = 2.0 * call.n_tokens * call.hidden_size * call.vocab_size
    gemms = work.forwards + call.hidden_grad + call.head_grad
    return 1e3 * (
        gemms * gemm_flops / flops
        + work.pass_bytes / rates.bytes
        + work.launches * rates.launch
        + work.epilogue_logits * rates.epilogue
    )


def gpu_work(plan: HeadPlan, call: GpuCall) -> GpuWork:
    """The cost of a plan of one of the GPU engines; with a tail or a screen, if every column matters."""
    if plan.engine == "screen":
        return _screen_work(plan, call)
    if plan.engine in ("epilogue", "tail"):
        return _epilogue_work(plan, call)
    if plan.engine == "epilogue_slices":
        return _epilogue_slices_work(plan, call)
    work = _slices_work(plan, call) if plan.engine == "vocab_slices" else _kept_work(plan, call)
    return work if not call.lora_rank else _with_lora(work, plan, call)


def _with_lora(work: GpuWork, plan: HeadPlan, call: GpuCall) -> GpuWork:
    """The work with an adapter's thin GEMMs: each reads and writes all logits, or reads all dlogits.

    dU and dB and B's fp32 sum are held besides.
    """
    N, V, r, size = call.n_tokens, call.vocab_size, call.lora_rank, _size(call)
    gradients = 2 * call.lora_grad
    share = r / call.hidden_size  # of a GEMM's flops
    pieces = -(-V // plan.slice_columns) if plan.slice_columns else -(-N // max(1, plan.chunk))
    thin_bytes = (2 * call.tile_bytes * work.forwards + size * gradients) * N * V
    return work._replace(
        forwards=work.forwards * (1 + share) + gradients * share,
        pass_bytes=work.pass_bytes + thin_bytes,
        held_bytes=work.held_bytes + call.lora_grad * r * (size * (N + V) + 4 * V),
        launches=work.launches + pieces * (1 + gradients),
    )


def gradient_bytes(call: GpuCall) -> int:
    """Bytes of dX and dW in the dtype of the hidden states."""
    N, H, V, size = call.n_tokens, call.hidden_size, call.vocab_size, _size(call)
    return size * H * (N * call.hidden_grad + V * call.head_grad)


def _size(call: GpuCall) -> int:
    return call.kept_bytes or call.tile_bytes


def _forwards(plan: HeadPlan, call: GpuCall) -> float:
    """Forward GEMMs of an engine that keeps K tokens between the passes; it recomputes the rest."""
    if plan.way != "general":
        return 1.0
    return 2.0 - min(1.0, plan.kept_tokens / max(1, call.n_tokens))


def _blocks(plan: HeadPlan, call: GpuCall) -> int:
    return max(1, -(-call.n_tokens // max(1, plan.kept_tokens or call.n_tokens)))


def _sum_bytes(call: GpuCall, blocks: int) -> int:
    """Bytes moved by dW's fp32 sum: each block writes it, all but the first read it; then it is converted."""
    if not call.head_grad or blocks == 1 or not call.low_precision:
        return 0
    return (8 * blocks - 4 + 4 + _size(call)) * call.vocab_size * call.hidden_size


def _kept_work(plan: HeadPlan, call: GpuCall) -> GpuWork:
    N, H, V = call.n_tokens, call.hidden_size, call.vocab_size
    size, logits = _size(call), N * V
    # A tile is written where the bare GEMM would write `size` bytes, and read once for the statistics.
    statistics = call.tile_bytes - size + call.tile_bytes
    tiles = -(-N // max(1, plan.chunk))
    if not call.grad:
        return GpuWork(_forwards(plan, call), statistics * logits, plan.workspace_bytes, 2 * tiles)
    # read again, and written as dlogits; any upstream gradient turns what is kept into dlogits
    per_logit = statistics + 4 + size + (2 * size if plan.way == "general" else 0)
    if call.low_logits:  # read again from the caches; with any upstream gradient later, from memory
        per_logit = statistics + (2 * size if plan.way == "general" else size)
    blocks, gradients = _blocks(plan, call), gradient_bytes(call)
    if call.low_logits:  # a block is one tile, but that its first tokens are one of their own
        tiles = min(tiles, blocks + 1)
    launches = 2 * tiles + blocks * (call.hidden_grad + call.head_grad)
    if not call.head_grad or blocks == 1:  # the tile's memory is free when the gradients are made
        tile = 0 if call.low_logits else 4 * plan.chunk * V
        held = plan.workspace_bytes - tile + max(tile, gradients)
        return GpuWork(_forwards(plan, call), per_logit * logits, held, launches)
    held = plan.workspace_bytes + gradients + 4 * V * H
    return GpuWork(_forwards(plan, call), per_logit * logits + _sum_bytes(call, blocks), held, launches)


def _slices_work(plan: HeadPlan, call: GpuCall) -> GpuWork:
    N, H, V = call.n_tokens, call.hidden_size, call.vocab_size
    size, logits = _size(call), N * V
    tile = call.tile_bytes
    statistics = tile - size + tile
    slices = -(-V // max(1, plan.slice_columns))
    if not call.grad:
        return GpuWork(1.0, statistics * logits, plan.workspace_bytes, 2 * slices)
    # The tile is computed again and read, and dlogits are written. dX's fp32 sum is read and written once a
    # slice.
    per_logit = statistics + tile - size + tile + size
    passes = per_logit * logits + 8 * N * H * call.hidden_grad * slices
    held = plan.workspace_bytes + gradient_bytes(call) + (4 - size) * N * H * call.hidden_grad
    return GpuWork(2.0, passes, held, slices * (4 + call.hidden_grad + call.head_grad))


def _epilogue_work(plan: HeadPlan, call: GpuCall) -> GpuWork:
    """e takes the place of bf16 logits. Beside it: the tiles' maxima and sums, fp32, written and read; the
    hidden states gathered, and for dW scaled; dX, which comes in fp32."""
    N, H, V = call.n_tokens, call.hidden_size, call.vocab_size
    blocks = _blocks(plan, call)
    forwards = _forwards(plan, call)
    passes = forwards * (16 * N * V / TILE_COLUMNS + 4 * N * H)
    hidden = 2 * N * H * (1 if blocks == 1 else 1 / blocks)  # gathered, of a block
    if not call.grad:
        bare_logits = 2 * N * V  # which the bare GEMM writes, and this engine does not
        held = hidden + 8 * min(N, 32768) * V / TILE_COLUMNS
        return GpuWork(forwards, passes - bare_logits, held, 3, forwards * N * V)
    passes += 4 * N * H * call.head_grad + 8 * N * H * call.hidden_grad + _sum_bytes(call, blocks)
    per_block = N / blocks
    held = plan.workspace_bytes + gradient_bytes(call) + hidden + 8 * per_block * V / TILE_COLUMNS
    held += 4 * per_block * H * call.hidden_grad
    if blocks > 1 and call.head_grad:
        held += 4 * V * H
    launches = blocks * (4 + 2 * call.hidden_grad + call.head_grad)
    return GpuWork(forwards, passes, held, launches, forwards * N * V)


def _screen_work(plan: HeadPlan, call: GpuCall) -> GpuWork:
    """The work of `screen`: that of `epilogue`, and more.

    e is also written and read without gradients. Beside that the weight is coded, e is read for the columns
    that matter and for the rest, and p takes e's place.
    """
    N, V = call.n_tokens, call.vocab_size
    work = _epilogue_work(plan, call)
    passes = work.pass_bytes + 3 * V * call.hidden_size + (4 + 2 + 4 * call.grad) * N * V
    held = work.held_bytes + (0 if call.grad else plan.workspace_bytes)
    return work._replace(
        forwards=work.forwards + plan.screened_gemms,
        pass_bytes=passes + (0 if call.grad else 2 * N * V),
        held_bytes=max(held, plan.workspace_bytes + plan.codes_bytes),
        launches=work.launches + 20,
    )


def _epilogue_slices_work(plan: HeadPlan, call: GpuCall) -> GpuWork:
    """The work of `epilogue_slices`.

    e takes the place of a slice's bf16 logits, and the statistics' GEMM writes none. Beside it: the tiles'
    numbers, written twice and read once; the hidden states, gathered twice and scaled; dX's fp32 sum, read
    and written once a slice.
    """
    N, H, V = call.n_tokens, call.hidden_size, call.vocab_size
    slices = -(-V // max(1, plan.slice_columns))
    passes = 24 * N * V / TILE_COLUMNS - 2 * N * V + 8 * N * H + 4 * N * H * call.head_grad
    passes += 8 * N * H * slices * call.hidden_grad
    beside = 2 * N * H * (1 + call.head_grad + call.hidden_grad) + 8 * N * plan.slice_columns / TILE_COLUMNS
    held = plan.workspace_bytes + gradient_bytes(call) + beside
    launches = 6 + slices * (5 + call.hidden_grad + call.head_grad)
    return GpuWork(2.0, passes, held, launches, 2 * N * V)
