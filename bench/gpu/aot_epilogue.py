"""Ahead-of-time compilation of the kernels of linear/gpu/epilogue.py, for `python -m bench.gpu.aot`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import triton
from triton.compiler import ASTSource

from fastalign_kernels.linear.gpu import epilogue, epilogue_rows_triton, epilogue_triton

from .aot_row import Row, signature, triton_row

EPILOGUE_POINTERS = {
    **dict.fromkeys(("order", "count", "gathered_ids"), "*i32"),
    **dict.fromkeys(("state", "stats", "coefficients", "row_scale", "source"), "*fp32"),
    **dict.fromkeys(("hidden", "weight", "bias", "gathered", "scaled", "kept", "out"), "*bf16"),
}
EPILOGUE_CONSTANTS: dict[str, dict[str, object]] = {
    "gather_kernel": {"HAS_BIAS": True, "REFERENCE": True, "PUSH": True, "NEW": True}
    | {"BM": 32, "SAMPLE": 64, "BK": 64, "BLOCK": 2048},
    "merge_kernel": {"ENTROPY": True, "MEAN": True, "ROWS": 32, "TILES": 32},
    "dlogits_kernel": {
        "CROSS_ENTROPY": False,
        "ONE_REFERENCE": True,
        "PART": False,
        "SCALE_HIDDEN": True,
        "BN": 256,
        "TILES": 8,
    }
    | {"KEPT_SCALE": 1.0, "BLOCK": 1024},
    "scatter_kernel": {"SCALED": True, "BLOCK": 1024},
}


def compile_forward(kernel: str, sm: int, variant: str) -> Row:
    """epilogue_triton's forward kernel: lean, with all statistics or with nothing kept, for small or large H.

    variant: "lean", "full" or "not kept", then "small" or "large"; a softcap with "softcap" in place of that.
    """
    statistics, _, size = variant.rpartition(" ")
    choice = epilogue.tiles_for(sm, 8192 if size == "large" else 1024)
    tiles = {"lean": choice.lean, "full": choice.full, "not kept": choice.not_kept}[statistics]
    function = getattr(epilogue_triton, kernel)
    constants: dict[str, object] = {
        "HAS_BIAS": False,
        "HAS_SOFTCAP": size == "softcap",
        "ENTROPY": statistics != "lean",
        "MEAN": statistics != "lean",
        "KEEP": statistics != "not kept",
    }
    constants |= {"KEPT_SCALE": 1.0, "PROGRAMS": 132, "bias": None, "FLATTEN": tiles.flatten}
    constants |= {"BM": tiles.bm, "BN": tiles.bn, "BK": tiles.bk, "GROUP": tiles.group, "PARTS": tiles.parts}
    constants |= {"BRANCH": tiles.branch}
    pointers = EPILOGUE_POINTERS | {
        "hidden": f"tensordesc<bf16[{tiles.bm}, {tiles.bk}]>",
        "weight": f"tensordesc<bf16[{tiles.bn}, {tiles.bk}]>",
        "kept": f"tensordesc<bf16[{tiles.bm}, {tiles.bn // tiles.parts}]>",
    }
    pointers["ids"] = "*i32"
    source = _epilogue_source(function, constants, pointers)
    return triton_row(source, tiles.warps, kernel, sm, "bf16", variant, num_stages=tiles.stages)


def compile_around_forward(kernel: str, sm: int) -> Row:
    """The kernels before and after it, in bf16."""
    function = getattr(epilogue_triton if kernel == "merge_kernel" else epilogue_rows_triton, kernel)
    constants = EPILOGUE_CONSTANTS[kernel] | (
        {"HAS_SOFTCAP": False} if "HAS_SOFTCAP" in function.arg_names else {}
    )
    pointers = EPILOGUE_POINTERS | {"ids": "*i64" if kernel == "gather_kernel" else "*i32"}
    source = _epilogue_source(function, constants, pointers)
    return triton_row(source, 8 if kernel == "dlogits_kernel" else 4, kernel, sm, "bf16", "epilogue")


def _epilogue_source(
    function: triton.JITFunction, constants: Mapping[str, object], pointers: dict[str, str]
) -> ASTSource:
    numbers = ("first", "rows", "N", "H", "col_tiles", "sample", "keep_places")
    types = pointers | dict.fromkeys(numbers, "i32")
    aligned = [name for name in function.arg_names if types.get(name, "").startswith("*")]
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(function.arg_names)
        if name not in constants and (name in aligned or name in ("H", "V", "rows", "kept_stride"))
    }
    return ASTSource(function, signature(function, types, constants), constexprs=constants, attrs=attributes)


def epilogue_jobs() -> list[partial[Row]]:
    """Compilations for the architectures that the engine has tiles for."""
    kinds = ("lean small", "lean large", "full small", "full large", "not kept small", "full softcap")
    variants = [(90, kind) for kind in kinds] + [(100, "full small")]
    jobs = [partial(compile_forward, "forward_kernel", *variant) for variant in variants]
    return jobs + [partial(compile_around_forward, kernel, 90) for kernel in EPILOGUE_CONSTANTS]
