"""How a head call runs: its mode, engine and chunks of tokens whose logits fit the workspace.

Pure functions of shapes, dtypes and the gradients that are needed.

One GEMM here means one N x H x V matrix product, 2 N H V flops; the naive loss takes three.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import checks
from ..gemm_int8 import coded_bytes, refusal
from .gpu.budgets import card_of, gpu_budgets
from .gpu.plan import (
    UNKEPT_TOKENS,
    GpuCall,
    epilogue_saved,
    epilogue_slice_width,
    epilogue_tokens,
    gpu_coded_bytes,
    gpu_saved_mib,
    gpu_workspace_mib,
    row_elements,
    saved_sizes,
    screen_refusal,
    select_engine,
    slice_width,
    tile_sizes,
)
from .head_plan import HeadPlan

# Default workspace in MiB without and with a gradient of the weight. On a CPU, 512-token chunks (96 MiB at V
# = 49152) run their GEMMs 9 % faster than 293-token ones (64 MiB). Beside a weight gradient 72 keeps the peak
# within 96 MiB of the gradients: MKL packs into 25 more.
WORKSPACE_MIB = {"cuda": (512.0, 512.0), "cpu": (96.0, 72.0)}

# Tokens of a tail's block at most: more keep more columns, fewer make slower GEMMs and more gathers.
TOKENS = {"cpu": 256, "cuda": 1024}
# With a screen, whose 8-bit products do not slow down with few tokens: the tile is 31 MiB smaller at V =
# 49152, as much as the weight's codes take.
SCREENED_TOKENS = 96
CODED_TOKENS = 8192  # coded at a time by a screen without gradients, in (H + 72) bytes each
SCREENED_GEMM = 1.1 / 3.9  # time of an 8-bit GEMM over an exact one's, on an AMD EPYC (Zen 4)
CODING_TOKENS = 100  # exact logits of so many take as long as coding the weight, on the same CPU
# The same for an H200, predicted: 1.14 POP/s where a head's GEMMs reach 686 TFLOP/s, and 3 V H bytes.
GPU_SCREENED_GEMM = 0.6
GPU_CODING_TOKENS = 245


def select_mode(dtype: torch.dtype, hidden_grad: bool, weight_grad: bool, upstream: str) -> str:
    """The mode for these gradients; arguments as in `plan_head`, weight_grad also of a LoRA adapter."""
    if not (hidden_grad or weight_grad):
        return "no_grad"
    # fp16 training scales the loss so that small gradients survive; the scale arrives with the upstream
    # gradient, hence not in forward.
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
    tail_eps: float | None = None,
    workspace_mib: float | None = None,
    logits_dtype: torch.dtype | None = None,
    lora_rank: int = 0,
    screen: bool | None = None,
    architecture: int | None = None,
    memory_mib: float | None = None,
) -> HeadPlan:
    """How a head call runs: a pure function of shapes, dtype, needed gradients and the workspace.

    Args:
        n_tokens, hidden_size, vocab_size: N (ignored tokens not counted), H, V.
        dtype: of the hidden states.
        device: its type matters; on a GPU also what `architecture` and `memory_mib` say.
        hidden_grad, weight_grad: which gradients are needed. weight_grad also stands for the bias.
        upstream: what the backward pass brings: "scalar" (a loss that this package reduces), "logp" (any
            gradient of logp alone), or "table" (any gradient of logp, entropy and lse).
        tail_eps: if given, backward GEMMs leave columns out (see `linear_cross_entropy`), and `gemms` is an
            upper bound.
        workspace_mib: MiB for logits and what is made of them. Default on a CPU 96, or 72 with weight_grad;
            on a GPU a sixteenth of the card's memory and at most 2560, or 512 for `token_tiles`.
        logits_dtype: torch.bfloat16 if the logits are rounded to it (see `linear_cross_entropy`); dtype is
            then torch.bfloat16.
        lora_rank: r of a LoRA adapter on the head, which is trained if a gradient is needed; 0: none. Its
            GEMMs of rank r are not counted in `gemms`; the predicted time has their flops and bytes.
        screen: True if logits are screened (see `linear_cross_entropy`). `gemms` counts an 8-bit product as
            one, `screened_gemms` as the share of an exact one's time that it takes.
        architecture: compute capability of the GPU, 90 for an H100. Default: that of `device` where it is a
            GPU of this machine; else 0, and the plan is one that any GPU can run, without predicted times.
        memory_mib: the GPU's memory. Default: that of `device` where it is such a GPU; else as much as the
            default workspace needs.

    Returns:
        The plan. print(plan) shows what more or less `workspace_mib` would buy on a GPU: engine, GEMMs,
        memory, and milliseconds that a roofline predicts. With a screen it shows the memory of the weight's
        codes and the predicted time of the products.

    Raises:
        ValueError: a size, dtype, device or option of the wrong kind or range, a workspace too small for one
            token's logits, or a screen with lora_rank or where there are no 8-bit products.
    """
    checks.whole("n_tokens", n_tokens, 0, expected="a whole number >= 0")
    checks.whole("hidden_size", hidden_size, 1, expected="a whole number >= 1")
    checks.whole("vocab_size", vocab_size, 1, expected="a whole number >= 1")
    if not isinstance(dtype, torch.dtype) or dtype not in checks.FLOATS:
        raise ValueError(f"dtype: got {checks.shown(dtype)}, expected {' or '.join(map(str, checks.FLOATS))}")
    kind = _device_type(device)
    checks.flags(hidden_grad=hidden_grad, weight_grad=weight_grad)
    checks.choice("upstream", upstream, ("scalar", "logp", "table"))
    if tail_eps is not None:
        checks.tail_eps(tail_eps)
    if workspace_mib is not None:
        checks.above_zero("workspace_mib", workspace_mib)
    low_logits = checks.logits_dtype(logits_dtype) is not None
    if low_logits and dtype != torch.bfloat16:
        raise ValueError(f"logits_dtype: got {logits_dtype} with dtype {dtype}, expected None")
    checks.whole("lora_rank", lora_rank, 0, expected="a whole number >= 0")
    screened = checks.screen(screen, logits_dtype)
    if screened and lora_rank:
        raise ValueError(
            f"screen: got True with lora_rank {lora_rank}, expected None: a head with LoRA has exact logits "
            "alone"
        )
    if screened and kind != "cuda" and (refused := refusal(torch.device(kind), dtype)):
        raise ValueError(f"screen: got True, expected None: {refused}")
    if architecture is not None:
        checks.whole("architecture", architecture, 0, expected="a compute capability such as 90")
    if memory_mib is not None:
        checks.above_zero("memory_mib", memory_mib)
    lora_grad = lora_rank > 0 and (hidden_grad or weight_grad)
    way = select_mode(dtype, hidden_grad, weight_grad or lora_grad, upstream)
    gradients = int(hidden_grad) + int(weight_grad)
    gemms = 2 + gradients if way == "general" else 1 + gradients
    if kind == "cuda":
        card = card_of(device, architecture, memory_mib)
        call = GpuCall(
            n_tokens=n_tokens,
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            dtype=dtype,
            workspace_mib=gpu_workspace_mib(card.bytes) if workspace_mib is None else workspace_mib,
            hidden_grad=hidden_grad,
            head_grad=weight_grad,
            tail=tail_eps is not None,
            architecture=card.architecture,
            saved_mib=gpu_saved_mib(card.bytes) if workspace_mib is None else None,
            low_logits=low_logits,
            lora_rank=lora_rank,
            lora_grad=lora_grad,
            screen=screened,
        )
        if screened and (refused := screen_refusal(call)):
            raise ValueError(f"screen: got True, expected None: {refused}")
        plan = _gpu_plan(call, HeadPlan(way, 0, 0, gemms))
        if plan is not None:
            return gpu_budgets(plan, call, card, lambda call: _gpu_plan(call, HeadPlan(way, 0, 0, gemms)))
    tiles = TileCall(
        vocab_size=vocab_size,
        dtype=dtype,
        kind=kind,
        hidden_grad=hidden_grad,
        weight_grad=weight_grad,
        tail_eps=tail_eps,
        workspace_mib=workspace_mib,
        screen=screened,
    )
    tokens, per_token = token_chunk(n_tokens, tiles)
    plan = HeadPlan(way, tokens, tokens * per_token, gemms)
    return _with_screen(plan, n_tokens, hidden_size, vocab_size, gradients) if screened else plan


def _with_screen(plan: HeadPlan, N: int, H: int, V: int, gradients: int) -> HeadPlan:
    """The plan with what a screen changes. Without gradients it holds the codes of tokens, and no logits."""
    if plan.way == "no_grad":
        tokens = min(N, CODED_TOKENS)
        plan = plan._replace(chunk=tokens, workspace_bytes=coded_bytes(tokens, H, left=True))
    return plan._replace(
        codes_bytes=coded_bytes(V, H, left=False),
        screened_gemms=gradients + SCREENED_GEMM * (plan.gemms - gradients),
        coding_gemms=CODING_TOKENS / max(N, 1),
    )


def _gpu_plan(call: GpuCall, plan: HeadPlan) -> HeadPlan | None:
    """The plan with what a GPU's engines add; None: token tiles."""
    engine = select_engine(call)
    # any upstream gradient: as much as possible is kept between the passes, whatever gradients are needed
    general = plan.way == "general"
    if engine == "screen":
        return _gpu_screen_plan(call, plan)
    if engine in ("epilogue", "tail"):
        kept = 0 if not call.grad else epilogue_saved(call) if general else epilogue_tokens(call)
        return plan._replace(
            chunk=kept or call.n_tokens,
            workspace_bytes=2 * kept * row_elements(call.vocab_size),
            gemms=plan.gemms - int(general and kept >= call.n_tokens),
            engine=engine,
            kept_tokens=kept,
        )
    if engine == "kept_softmax":
        sizes = saved_sizes(call) if general else tile_sizes(call)
        gemms = plan.gemms - int(general and sizes.block >= call.n_tokens)
        kept = sizes.block if call.grad else 0
        return plan._replace(
            chunk=sizes.tile, workspace_bytes=sizes.bytes, gemms=gemms, engine=engine, kept_tokens=kept
        )
    if engine in ("vocab_slices", "epilogue_slices"):
        of_logit = call.tile_bytes + (call.kept_bytes if call.grad else 0)
        columns, bytes_ = slice_width(call), of_logit * max(1, call.n_tokens)
        if engine == "epilogue_slices":
            columns, bytes_ = epilogue_slice_width(call), call.kept_bytes * max(1, call.n_tokens)
        gemms = 2 + call.hidden_grad + call.head_grad if call.grad else 1
        return plan._replace(
            chunk=max(1, call.n_tokens),
            workspace_bytes=bytes_ * columns,
            gemms=gemms,
            engine=engine,
            slice_columns=columns,
        )
    return None


def _gpu_screen_plan(call: GpuCall, plan: HeadPlan) -> HeadPlan:
    """The plan of a screen: `gemms` over all columns in 8 bits and over those that matter; blocks hold e."""
    general = plan.way == "general"
    kept = 0 if not call.grad else epilogue_saved(call) if general else epilogue_tokens(call)
    block = kept or min(call.n_tokens, UNKEPT_TOKENS)
    gemms = plan.gemms - int(general and kept >= call.n_tokens)
    return plan._replace(
        chunk=block,
        workspace_bytes=2 * block * row_elements(call.vocab_size),
        gemms=gemms,
        engine="screen",
        kept_tokens=kept,
        codes_bytes=gpu_coded_bytes(call.vocab_size, call.hidden_size),
        screened_gemms=GPU_SCREENED_GEMM * (gemms - call.hidden_grad - call.head_grad),
        coding_gemms=GPU_CODING_TOKENS / max(call.n_tokens, 1),
    )


class TileCall(NamedTuple):
    """What the chunks of token tiles depend on; the fields are arguments of `plan_head`."""

    vocab_size: int
    dtype: torch.dtype
    kind: str  # the device's type
    hidden_grad: bool
    weight_grad: bool
    tail_eps: float | None
    workspace_mib: float | None  # None: the default
    screen: bool = False

    @property
    def workspace_bytes(self) -> float:
        mib = self.workspace_mib
        return 2**20 * (
            default_workspace_mib(self.kind, weight_grad=self.weight_grad) if mib is None else mib
        )


def token_chunk(n_tokens: int, call: TileCall) -> tuple[int, int]:
    """Tokens of a chunk of token tiles, and the bytes of each.

    Chunks are even: a last sliver of a few tokens would run its GEMMs at a fraction of the speed.
    """
    largest, per_token = capacity(call)
    chunks = -(-n_tokens // largest) or 1
    return max(1, -(-n_tokens // chunks)), per_token


def default_workspace_mib(kind: str, *, weight_grad: bool) -> float:
    """The default `workspace_mib` on a device of type `kind`."""
    frozen, trained = WORKSPACE_MIB["cpu" if kind == "cpu" else "cuda"]
    # By name: torch.compile of torch 2.11 cannot index a tuple by a bool
    return trained if weight_grad else frozen


def _device_type(device: torch.device | str) -> str:
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError):
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device: got {device!r}, expected a CPU or CUDA device")
    return kind


def capacity(call: TileCall) -> tuple[int, int]:
    """Tokens that a workspace holds, and the bytes of each."""
    dtype, any_grad = call.dtype, call.hidden_grad or call.weight_grad
    # A tile of fp32 logits (rounding z to bf16 would cost 0.03 nats at |z| = 20), and its gradient in the
    # GEMMs' dtype beside it: a tile of another dtype cannot be overwritten in place by parallel threads. On a
    # CPU it stays in fp32.
    low = call.kind != "cpu" and any_grad and dtype in (torch.bfloat16, torch.float16)
    per_token = call.vocab_size * (8 if dtype == torch.float64 else 6 if low else 4)
    tail = call.tail_eps is not None and any_grad
    if tail and call.kind != "cpu":  # beside them the kept columns, and the next chunk's logits
        per_token = per_token * 5 // 2
    largest = int(call.workspace_bytes) // per_token
    if largest < 1:
        raise ValueError(
            f"workspace_mib: got {call.workspace_bytes / 2**20}, expected at least "
            f"{per_token / 2**20:.3g}: one token's logits at V = {call.vocab_size}"
        )
    most = largest
    if tail and call.kind == "cpu":
        most = min(largest, SCREENED_TOKENS if call.screen else TOKENS["cpu"])
    return most, per_token


def kept_columns_bytes(call: TileCall, chunk_bytes: int) -> int:
    """What kept columns (linear/tail_columns.py) may take between a forward and a backward pass.

    With a chunk's logits it is twice the workspace.
    """
    return int(2 * call.workspace_bytes) - chunk_bytes
