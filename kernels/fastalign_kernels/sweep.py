"""The loop that every head call runs, and its plan: chunks of tokens whose logits fit the workspace, one pass or two between the GEMMs.

One GEMM here means one N x H x V matrix product, 2 N H V flops; the naive loss takes three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import check as _check
from . import native
from .rows import Stat, Transform, accumulator_dtype, row_grad, row_stats

# Default workspace in MiB without and with a gradient of the weight. On a CPU, 512-token chunks (96 MiB at V = 49152) run their GEMMs 9 %
# faster than 293-token ones (64 MiB). Beside a weight gradient 72 keeps the peak within 96 MiB of the gradients: MKL packs into 25 more.
WORKSPACE_MIB = {"cuda": (512.0, 512.0), "cpu": (96.0, 72.0)}


class HeadPlan(NamedTuple):
    """How a head call runs: the way (head.py's table), tokens per chunk, bytes of the chunk's workspace, and GEMMs in all.

    Chunk and workspace are those of the pass that makes the gradients; the forward pass of "general" makes none and runs as "no_grad".
    """

    way: str
    chunk: int
    workspace_bytes: int
    gemms: int


def choose_way(dtype: torch.dtype, hidden_grad: bool, weight_grad: bool, upstream: str) -> str:
    """The way of head.py's table for these gradients; see `plan_head` for the arguments."""
    if not (hidden_grad or weight_grad):
        return "no_grad"
    # fp16 training scales the loss so that small gradients survive; the scale arrives with the upstream gradient, hence not in forward.
    if upstream == "scalar" and dtype != torch.float16:
        return "gradient_in_forward"
    return "frozen_head" if upstream == "logp" and not weight_grad else "general"


def plan_head(
    n_tokens: int,
    hidden_size: int,
    vocab_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    hidden_grad: bool = True,
    weight_grad: bool = True,
    upstream: str = "scalar",
    workspace_mib: float | None = None,
) -> HeadPlan:
    """The way and the chunk that a head call takes: a pure function of shapes, dtype, gradients wanted and the workspace.

    Args:
        n_tokens, hidden_size, vocab_size: N (ignored tokens not counted), H, V.
        dtype: of the hidden states.
        device: only its type matters, and for bf16 on a CPU whether that has fast units for it.
        hidden_grad, weight_grad: which gradients are wanted (weight_grad also stands for the bias).
        upstream: what the backward pass brings: "scalar" (a loss that this package reduces), "logp" (any gradient of logp alone), or
            "table" (any gradient of logp, entropy and lse).
        workspace_mib: MiB for the logits of a chunk; default 512 on a GPU, on a CPU 96, or 72 with weight_grad.

    Raises:
        ValueError: a negative or zero size, an unknown upstream, or a workspace too small for one token's logits.
    """
    if n_tokens < 0:
        raise ValueError(f"n_tokens: {n_tokens} seen, a number >= 0 wanted")
    _check.positive("hidden_size", hidden_size)
    _check.positive("vocab_size", vocab_size)
    _check.choice("upstream", upstream, ("scalar", "logp", "table"))
    way = choose_way(dtype, hidden_grad, weight_grad, upstream)
    gradients = int(hidden_grad) + int(weight_grad)
    gemms = 2 + gradients if way == "general" else 1 + gradients
    largest, per_token = capacity(vocab_size, dtype, torch.device(device).type, hidden_grad, weight_grad, workspace_mib)
    chunks = -(-n_tokens // largest) or 1
    chunk = max(1, -(-n_tokens // chunks))  # even chunks: a last sliver of a few tokens would run its GEMMs at a fraction of the speed
    return HeadPlan(way, chunk, chunk * per_token, gemms)


def capacity(
    vocab_size: int, dtype: torch.dtype, kind: str, hidden_grad: bool, weight_grad: bool, workspace_mib: float | None
) -> tuple[int, int]:
    """Tokens that a workspace holds, and the bytes of each; arguments as in `plan_head`, `kind` the device's type."""
    workspace_mib = WORKSPACE_MIB["cpu" if kind == "cpu" else "cuda"][weight_grad] if workspace_mib is None else workspace_mib
    # A tile of fp32 logits (rounding z to bf16 would cost 0.03 nats at |z| = 20), and its gradient in the GEMMs' dtype beside it: a tile
    # of another dtype cannot be overwritten in place by parallel threads. On a CPU only the GEMM for dX takes a low-precision gradient.
    low = hidden_grad and bf16_gemms(dtype) if kind == "cpu" else (hidden_grad or weight_grad) and dtype in (torch.bfloat16, torch.float16)
    per_token = vocab_size * (8 if dtype == torch.float64 else 6 if low else 4)
    largest = int(workspace_mib * 2**20) // per_token
    if largest < 1:
        raise ValueError(
            f"workspace_mib: {workspace_mib} seen, at least {per_token / 2**20:.3g} wanted: one token's logits at V = {vocab_size}"
        )
    return largest, per_token


def bf16_gemms(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies bf16 faster than fp32: on AMD's AVX512-BF16 1,145 -> 254 ms for the logits at [2048, 576] x [576, 49152].

    Elsewhere low-precision inputs are widened: on an Intel AVX512-BF16 without AMX, 65 GFLOP/s a core were measured against fp32's 115.
    """
    return dtype == torch.bfloat16 and native.fast_bf16()


def _mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _add_mm(out: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


def _kept(ids: Tensor) -> tuple[Tensor | None, Callable[[], int]]:
    """Indices [N] with the kept tokens first (None: all are kept), and a function that tells how many are kept.

    On a GPU the count is copied to pinned memory while the first chunk runs, and only the second chunk asks for it: the host waits
    for work that was queued before the first chunk, the device never idles. Under graph capture nothing can be asked, so all tokens
    run, the ignored ones with zero coefficients.
    """
    N = ids.numel()
    kept = ids >= 0
    if not ids.is_cuda:
        index = kept.nonzero()[:, 0]
        return (None if index.numel() == N else index), lambda: index.numel()
    if torch.cuda.is_current_stream_capturing():
        return None, lambda: N
    order = torch.argsort(~kept, stable=True)
    count = torch.empty(1, dtype=torch.int64, pin_memory=True)
    count.copy_(kept.sum().view(1), non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def how_many() -> int:
        copied.synchronize()
        return int(count[0])

    return order, how_many


def _chunks(ids: Tensor, plan: Callable[[int], HeadPlan]) -> Iterator[Tensor | slice]:
    """Token indices of each chunk, kept tokens only (on a GPU the first chunk may hold ignored ones)."""
    order, how_many = _kept(ids)
    N = ids.numel() if ids.is_cuda else how_many()
    chunk = plan(N).chunk
    for begin in range(0, N, chunk):
        if begin and ids.is_cuda:
            N = how_many()
            if begin >= N:
                return
        end = min(begin + chunk, N)
        yield slice(begin, end) if order is None else order[begin:end]


class Head(NamedTuple):
    """The arguments every head op shares; ids are -1 where ignored."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H], hidden's dtype or fp32
    ids: Tensor  # [N]
    bias: Tensor | None  # [V]
    transform: Transform
    workspace_mib: float | None

    def plan(self, n_tokens: int, hidden_grad: bool, weight_grad: bool) -> HeadPlan:
        V, H = self.weight.shape
        return plan_head(
            n_tokens,
            H,
            V,
            dtype=self.hidden.dtype,
            device=self.hidden.device,
            hidden_grad=hidden_grad,
            weight_grad=weight_grad,
            workspace_mib=self.workspace_mib,
        )


class Gradients(NamedTuple):
    """Gradients wanted from a sweep, each [.., ..] or of size 0 when it is not."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor  # [V]


def sweep(
    head: Head,
    table: Tensor | None,
    chunk_coefficients: Callable[[Tensor, Tensor | slice], Tensor] | None,
    wanted: tuple[bool, bool, bool],
    chunks: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Gradients]:
    """The loop over chunks: logits by one GEMM, statistics (unless `table` has them), gradient in place, a GEMM each for dX and dW.

    `chunk_coefficients(table of the chunk [7, C], its token indices)` gives row_grad's [4, C]; None: statistics only. `wanted`: gradients
    of hidden, weight and bias. `chunks`: token indices of each chunk, instead of the plan's.
    """
    with torch.autocast(head.hidden.device.type, enabled=False):  # dtypes are chosen here; autocast would cast some of the GEMMs again
        if head.hidden.device.type != "cpu" or not bf16_gemms(head.hidden.dtype):
            return _run(head, table, chunk_coefficients, wanted, chunks)
        # The only way on a CPU from bf16 inputs to fp32 outputs. Inputs that are bf16 lose nothing. It holds for the process, so for the
        # time of this call another thread's fp32 GEMMs on the CPU round their inputs to bf16 too.
        matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        before = matmul.fp32_precision
        matmul.fp32_precision = "bf16"
        try:
            return _run(head, table, chunk_coefficients, wanted, chunks)
        finally:
            matmul.fp32_precision = before


def _run(
    head: Head,
    table: Tensor | None,
    chunk_coefficients: Callable[[Tensor, Tensor | slice], Tensor] | None,
    wanted: tuple[bool, bool, bool],
    chunks: Sequence[Tensor] | None,
) -> tuple[Tensor, Gradients]:
    hidden, weight, ids, bias, transform, _ = head
    N, H = hidden.shape
    V = weight.shape[0]
    # On a CPU low-precision GEMMs round their output, so there the chunk's hidden states and, once, the weight are widened (see `sweep` for
    # their speed). On a GPU inputs stay as they are.
    compute = accumulator_dtype(hidden.dtype) if hidden.device.type == "cpu" else hidden.dtype
    accumulator = accumulator_dtype(hidden.dtype)
    w = weight.to(compute)
    b = None if bias is None else bias.to(accumulator)
    new_table = table is None
    if table is None:
        table = torch.zeros(len(Stat), N, dtype=accumulator, device=hidden.device)
    want_hidden, want_weight, want_bias = wanted
    d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if want_hidden else hidden.new_empty(0)
    d_weight = torch.empty(V, H, dtype=accumulator, device=hidden.device) if want_weight else weight.new_empty(0)
    d_bias = torch.zeros(V, dtype=accumulator, device=hidden.device) if want_bias else hidden.new_empty(0)
    narrow = want_hidden and hidden.device.type == "cpu" and bf16_gemms(hidden.dtype)  # dX is rounded once anyway: a GEMM in bf16
    w_narrow = weight.to(hidden.dtype) if narrow else w
    tile = grad_tile = None
    first = True
    for index in chunks if chunks is not None else _chunks(ids, lambda n: head.plan(n, want_hidden, want_weight or want_bias)):
        y = ids[index]
        x = hidden[index].to(compute)
        if ids.is_cuda:  # ignored tokens of the first chunk: their gradient is 0, but 0 times a NaN hidden state would reach dW
            x = x.masked_fill((y < 0)[:, None], 0)
        C = y.numel()
        if tile is None:
            rows = C if chunks is None else max(map(len, chunks))  # the plan's first chunk is its largest
            tile = torch.empty(rows, V, dtype=accumulator, device=hidden.device)
            if chunk_coefficients is not None:
                grad_tile = tile if compute == accumulator else torch.empty(rows, V, dtype=compute, device=hidden.device)
        logits = tile[:C]
        _mm(x, w.t(), logits)
        stats = row_stats(logits[None], y, b, transform) if new_table else table[:, index].contiguous()
        if new_table:
            table[:, index] = stats
        if chunk_coefficients is None or grad_tile is None:
            continue
        grad = grad_tile[:C]
        row_grad(logits[None], y, b, transform, stats, chunk_coefficients(stats, index), grad[None])
        if want_hidden:
            d_hidden[index] = torch.mm(grad.to(w_narrow.dtype), w_narrow).to(hidden.dtype)
        if want_weight:
            _mm(grad.t(), x, d_weight) if first else _add_mm(d_weight, grad.t(), x)
        if want_bias:
            d_bias += grad.sum(0, dtype=accumulator)
        first = False
    if want_weight and first:
        d_weight.zero_()
    if bias is not None and want_bias:
        d_bias = d_bias.to(bias.dtype)
    return table, Gradients(d_hidden, d_weight.to(weight.dtype), d_bias)
