"""Ahead-of-time compilation of the kernels of linear/gpu/tail.py, for `python -m bench.gpu.aot`."""

from __future__ import annotations

from functools import partial
from typing import Any

from triton.compiler import ASTSource

from fastalign_kernels.linear.gpu import tail as tail_gpu
from fastalign_kernels.linear.gpu import tail_gemm_triton, tail_tiles
from fastalign_kernels.linear.gpu import tail_triton as tail_gpu_triton

from .aot_row import ARCHITECTURES, Row, signature, triton_row

POINTERS = {
    **dict.fromkeys(("kept", "right", "hidden", "weight", "out", "grad"), "*bf16"),
    "columns": "*i64",
    **dict.fromkeys(("ids", "order", "places", "column_parts", "tile_parts", "tile_counts"), "*i32"),
    **dict.fromkeys(("tile_bits", "lists", "counts"), "*i32"),
    **dict.fromkeys(("state", "stats", "largest", "sums", "coefficients"), "*fp32"),
    **dict.fromkeys(("dropped", "towards", "shares", "left", "by_place"), "*fp32"),
    "ranks": "*i16",
}
TILE = tail_tiles.TILE
# kernel -> constants, and how many warps
KERNELS: dict[str, tuple[dict[str, Any], int]] = {
    "columns_kernel": (
        {
            "margins": None,
            "KEPT_SCALE": 1.0,
            "BN": 256,
            "ROWS": tail_tiles.COLUMNS.rows,
            "STAGES": tail_tiles.COLUMNS.stages,
        },
        tail_tiles.COLUMNS.warps,
    ),
    "rank_kernel": ({"BLOCK": 1024}, 4),
    "place_kernel": ({"TILE": TILE}, 4),
    "list_kernel": ({"BLOCK": 1024}, 4),
    "collect_kernel": (
        {
            "KEPT_SCALE": 1.0,
            "BN": 256,
            "COLUMNS": tail_gpu.COLLECT_FULL.columns,
            "ROWS": tail_gpu.COLLECT_FULL.rows,
            "STAGES": tail_gpu.COLLECT_FULL.stages,
        },
        tail_gpu.COLLECT_FULL.warps,
    ),
    "thin_kernel": ({"BK": 64, "BH": 128}, 4),
    "hidden_kernel": ({"TILE": TILE, "PROGRAMS": 132}, 0),  # the rest by architecture
    "weight_kernel": ({"TILE": TILE, "PROGRAMS": 132}, 0),
    "bias_kernel": ({"TILE": TILE, "BK": 64}, 4),
}
# "lean": cross-entropy without options; "full": any coefficients, under a softcap
VARIANTS: dict[str, dict[str, Any]] = {
    "lean": {"CROSS_ENTROPY": True, "HAS_SOFTCAP": False, "PLOGP": False, "ADD": False},
    "full": {"CROSS_ENTROPY": False, "HAS_SOFTCAP": True, "PLOGP": True, "ADD": True},
}


def compile_tail(kernel: str, sm: int, variant: str = "full") -> Row:
    """Compile one of the tail's kernels in bf16."""
    module = tail_gpu_triton if hasattr(tail_gpu_triton, kernel) else tail_gemm_triton
    function = getattr(module, kernel)
    constants, warps = KERNELS[kernel]
    constants = constants | {k: v for k, v in VARIANTS[variant].items() if k in function.arg_names}
    pointers, stages = dict(POINTERS), {}
    if kernel == "collect_kernel" and variant == "lean":
        constants["ROWS"], constants["COLUMNS"], warps, constants["STAGES"] = tail_gpu.COLLECT
    if not warps:
        bm, bh, bk, warps, stages["num_stages"] = tail_gpu.tiles_for(sm)
        constants |= {"BM": bm, "BH": bh, "BK": bk} if kernel == "hidden_kernel" else {"BH": bh, "BK": bk}
        blocks = {"grad": (bk, bm), "weight": (bk, bh)}
        if kernel == "weight_kernel":
            blocks = {"grad": (TILE, bk), "hidden": (bk, bh)}
        pointers |= {name: f"tensordesc<bf16[{rows}, {columns}]>" for name, (rows, columns) in blocks.items()}
    if kernel in ("bias_kernel", "thin_kernel") or (kernel == "weight_kernel" and constants["ADD"]):
        pointers["out"] = "*fp32"
    sizes = dict.fromkeys(
        ("first", "rows", "live", "part_rows", "parts", "tiles", "H", "K", "chunk", "slice_columns"), "i32"
    )
    types = sizes | pointers
    aligned = (
        "H",
        "V",
        "K",
        "rows",
        "part_rows",
        "slice_columns",
        "right_stride",
        "kept_stride",
        "grad_stride",
    )
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(function.arg_names)
        if name not in constants and (types.get(name, "").startswith("*") or name in aligned)
    }
    source = ASTSource(
        function, signature(function, types, constants), constexprs=constants, attrs=attributes
    )
    return triton_row(source, warps, kernel, sm, "bf16", f"tail {variant}", **stages)


def tail_jobs() -> list[partial[Row]]:
    """Compilations for NVIDIA's architectures; on an H100 also of what takes fewer registers."""
    jobs = [partial(compile_tail, kernel, sm) for kernel in KERNELS for sm in ARCHITECTURES]
    lean = ("columns_kernel", "collect_kernel", "weight_kernel")
    jobs += [partial(compile_tail, kernel, 90, "lean") for kernel in lean]
    return jobs
