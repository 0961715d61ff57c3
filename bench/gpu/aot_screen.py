"""Ahead-of-time compilation of the kernels of linear/gpu/screen.py, for `python -m bench.gpu.aot`."""

from __future__ import annotations

from functools import partial
from typing import Any

from triton.compiler import ASTSource

from fastalign_kernels.linear.gpu import screen as screen_gpu
from fastalign_kernels.linear.gpu import screen_codes as screen_gpu_codes
from fastalign_kernels.linear.gpu import screen_exact_triton, screen_gemm_triton, tail_tiles

from .aot_row import ARCHITECTURES, Row, signature, triton_row

POINTERS = {
    **dict.fromkeys(("x", "kept", "hadamard", "low", "grad"), "*bf16"),
    **dict.fromkeys(("signs", "codes"), "*i8"),
    **dict.fromkeys(("basis", "numbers", "state", "bounds", "sums", "partial", "rest", "stats"), "*fp32"),
    **dict.fromkeys(("dropped", "coefficients", "hidden_scales", "weight_scales"), "*fp32"),
    **dict.fromkeys(("ids", "order", "column_parts", "lists", "counts"), "*i32"),
    "columns": "*i64",
}
SIZES = (
    *("count", "H", "width", "first", "rows", "live", "part_rows", "parts", "tiles", "kept_tiles", "slices"),
    "slice_columns",
)
ALIGNED = (
    *("H", "V", "width", "rows", "part_rows", "slice_columns", "row_stride", "kept_stride"),
    "grad_stride",
)
KERNELS = (
    "code_kernel",
    "screened_kernel",
    "rest_kernel",
    "exact_kernel",
    "merge_exact_kernel",
    "finish_kernel",
)
# The engine serves sm_90 alone. Two kernels read through TMA, in tiles of an H100's shared memory. The first
# would spill 24 to 32 bytes on sm_120.
SERVED = {"code_kernel": (80, 90, 100), "screened_kernel": (90,), "exact_kernel": (90,)}


def compile_screen(kernel: str, sm: int, variant: str) -> Row:
    """A kernel in bf16. variant: "lean", or "full" with all statistics and any coefficients."""
    module = screen_gemm_triton if hasattr(screen_gemm_triton, kernel) else screen_exact_triton
    function, full = getattr(module, kernel), variant == "full"
    tiles, exact, rest = screen_gpu.SCREEN_TILES, screen_gpu.EXACT_TILES, screen_gpu.REST
    pointers, warps, stages = dict(POINTERS), 4, {}
    constants: dict[str, Any] = {"FULL": full, "KEPT_SCALE": 1.0, "PROGRAMS": 132, "TILE": tail_tiles.TILE}
    if kernel == "code_kernel":
        constants |= {"LEFT": full, "BLOCK": screen_gpu_codes.LARGEST_BLOCK, "ROWS": screen_gpu_codes.ROWS}
        warps = screen_gpu_codes.WARPS
    elif kernel == "screened_kernel":
        constants |= {"ENTROPY": full, "MEAN": full} | tiles.constants()
        blocks = {"hidden": ("i8", tiles.bm, tiles.bk), "weight": ("i8", tiles.bn, tiles.bk)}
        blocks |= {"hidden_low": ("bf16", tiles.bm, 64), "weight_low": ("bf16", tiles.bn, 64)}
        blocks |= {"kept": ("bf16", tiles.bm, tiles.bn // tiles.parts)}
        pointers |= _descriptors(blocks)
        warps, stages = tiles.warps, {"num_stages": tiles.stages}
    elif kernel == "rest_kernel":
        constants |= {"BN": 256, "COLUMNS": rest.columns, "ROWS": rest.rows, "STAGES": rest.stages}
        constants |= {} if full else {"bounds": None}
        warps = rest.warps
    elif kernel == "exact_kernel":
        constants |= {"BM": exact.bm, "BK": exact.bk}
        blocks = {"weight": ("bf16", tail_tiles.TILE, exact.bk), "hidden": ("bf16", exact.bm, exact.bk)}
        pointers |= _descriptors(blocks | {"exact": ("bf16", tail_tiles.TILE, exact.bm // 4)})
        warps, stages = exact.warps, {"num_stages": exact.stages}
    elif kernel == "merge_exact_kernel":
        constants |= {"ROWS": screen_gpu.MERGE_ROWS, "TILES": 32}
    else:
        constants |= {"CROSS_ENTROPY": not full, "PLOGP": full, "ROWS": screen_gpu.FINISH_ROWS}
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    types = dict.fromkeys(SIZES, "i32") | pointers
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(function.arg_names)
        if name not in constants and (types.get(name, "").startswith("*") or name in ALIGNED)
    }
    source = ASTSource(
        function, signature(function, types, constants), constexprs=constants, attrs=attributes
    )
    return triton_row(source, warps, kernel, sm, "bf16", f"screen {variant}", **stages)


def _descriptors(blocks: dict[str, tuple[str, int, int]]) -> dict[str, str]:
    return {
        name: f"tensordesc<{dtype}[{rows}, {columns}]>" for name, (dtype, rows, columns) in blocks.items()
    }


def screen_jobs() -> list[partial[Row]]:
    """Compilations for NVIDIA's architectures."""
    return [
        partial(compile_screen, kernel, sm, variant)
        for kernel in KERNELS
        for sm in SERVED.get(kernel, ARCHITECTURES)
        for variant in ("lean", "full")
    ]
