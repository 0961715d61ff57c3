"""Compile every GPU kernel ahead of time, without a GPU: registers, spills, shared memory and size for each
architecture.

    python -m bench.gpu.aot               # a table; exit status 1 if a kernel spills or takes too much memory
    python -m bench.gpu.aot --json FILE   # the rows as JSON too
    python -m bench.gpu.aot --few         # each variant on one architecture, in a third of the time

Triton's by its own compiler, for AMD's gfx942 (MI300) as well; csrc/sampling/launch.cu by nvcc where setup.py
finds one, with setup.py's flags. Must run without TRITON_INTERPRET, which replaces the compiled kernels by
interpreted ones.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

from triton.compiler import ASTSource

from fastalign_kernels import scale_triton, token_ids_triton
from fastalign_kernels.policy import advantages_triton as advantage_triton
from fastalign_kernels.policy import losses_triton as policy_triton
from fastalign_kernels.policy.ops import KL_ESTIMATORS
from fastalign_kernels.preference import losses_triton as preference_triton
from fastalign_kernels.preference.formulas import PAIR_LOSSES
from fastalign_kernels.softmax import (
    coefficients_triton,
    columns_triton,
    rows_triton,
    slice_rows_triton,
    tile_rows_triton,
)

from .aot_epilogue import epilogue_jobs
from .aot_row import (
    AMD,
    ARCHITECTURES,
    CUOBJDUMP,
    TYPES,
    Row,
    annotated,
    resource_usage,
    signature,
    triton_row,
)
from .aot_screen import screen_jobs
from .aot_tail import tail_jobs

LARGEST_V = 262144  # of the vocabularies in use
ROOT = Path(__file__).parents[2]


def compile_rows(kernel: str, sm: int, dtype: str, full: bool) -> Row:
    """Compile one of rows_triton's kernels; `full` has bias, softcap, temperature and all statistics."""
    function = getattr(rows_triton, kernel)
    table = rows_triton.LAUNCH[f"{kernel.removesuffix('_kernel')}_{32 if dtype == 'fp32' else 16}"]
    block, warps, _ = rows_triton.tabled_launch(table, 90 if sm in AMD else sm, LARGEST_V)
    flags = ("PLAIN", "HAS_BIAS", "HAS_SOFTCAP", "HAS_MEAN", "HAS_ENTROPY", "HAS_PLOGP")
    constants: dict[str, object] = {name: full for name in flags if name in function.arg_names}
    constants |= {"PLAIN": not full, "BLOCK_SIZE": block}
    pointers = dict.fromkeys(("stats", "coefficients", "scale"), "*fp32") | {"ids": "*i64"}
    pointers |= dict.fromkeys(("logits", "bias", "out"), TYPES[dtype])
    # Row strides and pointers are multiples of 16 bytes in practice, and Triton specialises launches on that.
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(function.arg_names)
        if name in pointers or name.endswith("stride")
    }
    source = ASTSource(
        function, signature(function, pointers, constants), constexprs=constants, attrs=attributes
    )
    return triton_row(source, warps, kernel, sm, dtype, "full" if full else "plain")


def compile_columns(kernel: str, sm: int, dtype: str, full: bool) -> Row:
    """columns_triton's kernels, which read fp32 logits whatever the head's dtype; the gradient is written in
    that, here bf16."""
    function = getattr(columns_triton, kernel)
    constants: dict[str, object] = {"PLAIN": not full, "HAS_BIAS": full, "HAS_SOFTCAP": full}
    names = ("logits", "bias", "stats", "largest", "sums", "parts", "coefficients")
    pointers = dict.fromkeys(names, TYPES[dtype]) | {
        "ids": "*i64",
        "columns": "*i64",
        "out": TYPES["bf16"],
        "totals": "*fp64",
    }
    if kernel == "column_sums_kernel":
        constants |= {"BLOCK_SIZE": columns_triton.COLUMNS, "ROWS": columns_triton.ROWS}
    else:
        constants |= {"BLOCK_SIZE": columns_triton.GRAD_COLUMNS, "GATHERED": full}
    source = ASTSource(function, signature(function, pointers, constants), constexprs=constants)
    return triton_row(source, columns_triton.NUM_WARPS, kernel, sm, dtype, "full" if full else "plain")


# (kernel, its entry in tile_rows_triton.LAUNCH, with _16 for logits in bf16) -> constants
TILE_KERNELS: dict[tuple[str, str], dict[str, object]] = {
    ("tile_rows_kernel", "stats"): {"STATS": True, "WRITE": tile_rows_triton.NOTHING.value},
    ("tile_rows_kernel", "loss"): {"STATS": True, "WRITE": tile_rows_triton.TOKEN_LOSS.value},
    ("tile_rows_kernel", "given"): {"STATS": False, "WRITE": tile_rows_triton.GIVEN.value},
    ("tile_rows_kernel", "softmax"): {"STATS": True, "WRITE": tile_rows_triton.SOFTMAX.value},
    ("tile_rows_kernel", "stats_16"): {"STATS": True, "WRITE": tile_rows_triton.NOTHING.value},
    ("tile_rows_kernel", "loss_16"): {"STATS": True, "WRITE": tile_rows_triton.TOKEN_LOSS.value},
    ("tile_rows_kernel", "given_16"): {"STATS": False, "WRITE": tile_rows_triton.GIVEN.value},
    ("kept_rows_kernel", "kept"): {},
    ("slice_stats_kernel", "slice"): {},
}
# (full, lean): those that take the most registers on NVIDIA's cards, and one for AMD's
TILE_VARIANTS = ((False, True), (True, True), (True, False))
TILE_JOBS = [
    (kernel, sm, *variant)
    for kernel in TILE_KERNELS
    for sm, variants in (*product(ARCHITECTURES, [TILE_VARIANTS]), *product(AMD, [TILE_VARIANTS[-1:]]))
    for variant in variants
]


def compile_tiles(names: tuple[str, str], sm: int, full: bool, lean: bool) -> Row:
    """Compile one of TILE_KERNELS, which writes bf16; `full` has bias, softcap, scale and temperature."""
    kernel, entry = names
    module = slice_rows_triton if hasattr(slice_rows_triton, kernel) else tile_rows_triton
    function = getattr(module, kernel)
    launches = tile_rows_triton.LAUNCH
    name, _, bits = entry.partition("_")
    dtype = "bf16" if bits else "fp32"
    name += "_lean" if lean else "_full"
    table = launches[entry if entry in launches else f"{name}_{bits}" if bits else name]
    block, warps, _ = rows_triton.tabled_launch(table, 90 if sm in AMD else sm, LARGEST_V)
    constants: dict[str, object] = {"LEAN": lean, "PLAIN": not full, "HAS_BIAS": full, "HAS_SOFTCAP": full}
    constants |= {"HAS_TOKENS": True, "BLOCK_SIZE": block}
    constants = {k: v for k, v in constants.items() if k in function.arg_names} | TILE_KERNELS[names]
    floats = ("logits", "bias", "stats", "token_scale", "coefficients")
    pointers = dict.fromkeys(floats, TYPES["fp32"]) | {"tokens": "*i64", "ids": "*i64", "running": "*fp64"}
    pointers |= dict.fromkeys(("out", "softmax"), TYPES["bf16"]) | {"logits": TYPES[dtype]}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, arg in enumerate(function.arg_names)
        if arg in pointers or arg.endswith("stride")
    }
    source = ASTSource(
        function, signature(function, pointers, constants), constexprs=constants, attrs=attributes
    )
    label = f"{entry} {'full' if full else 'plain'}{' lean' if lean else ''}"
    return triton_row(source, warps, kernel, sm, dtype, label)


def compile_scale(kernel: str, sm: int) -> Row:
    """scale_triton's kernel on a bf16 tensor."""
    constants: dict[str, object] = {"BLOCK_SIZE": scale_triton.BLOCK_SIZE}
    signature = {"x": TYPES["bf16"], "factor": TYPES["fp32"], "count": "i64", "BLOCK_SIZE": "constexpr"}
    source = ASTSource(scale_triton.scale_kernel, signature, constexprs=constants)
    return triton_row(source, scale_triton.NUM_WARPS, kernel, sm, "bf16", "")


def compile_of_tokens(kernel: str, sm: int) -> Row:
    """Compile one of token_ids_triton's and coefficients_triton's kernels."""
    module = token_ids_triton if hasattr(token_ids_triton, kernel) else coefficients_triton
    function = getattr(module, kernel)
    constants: dict[str, object] = {"BLOCK_SIZE": module.BLOCK_SIZE}
    types = {"ids": "*i64", "kept": "*i64", "ignore_index": "i32", "N": "i32"}
    types |= dict.fromkeys(("scale", "grad", "stats", "out"), "*fp32")
    source = ASTSource(function, signature(function, types, constants), constexprs=constants)
    return triton_row(source, module.NUM_WARPS, kernel, sm, "fp32", "")


def compile_preference(kernel: str, sm: int, dtype: str, variant: str) -> Row:
    """Compile one of preference_triton's kernels with all its optional inputs.

    variant: the formula of pairs_kernel.
    """
    function = getattr(preference_triton, kernel)
    constants: dict[str, object] = {name: True for name in function.arg_names if name.startswith("HAS_")}
    constants |= {"BLOCK_SIZE": preference_triton.LARGEST.size, "REDUCTION": "mean"}
    if kernel == "pairs_kernel":
        constants["FORMULA"] = preference_triton.compiled(PAIR_LOSSES[variant].formula)
    vectors = dict.fromkeys(("loss", "rewards", "metrics", "grads"), "*fp32")
    vectors |= {"desirable": "*i1", "chosen_lengths": "*i64", "rejected_lengths": "*i64"}
    # All other arguments are inputs
    types = dict.fromkeys(constants, "constexpr") | vectors | {"S": "i32"} | annotated(function)
    source = ASTSource(
        function, {name: types.get(name, TYPES[dtype]) for name in function.arg_names}, constexprs=constants
    )
    return triton_row(source, preference_triton.LARGEST.num_warps, kernel, sm, dtype, variant)


def compile_policy(kernel: str, sm: int, variant: str) -> Row:
    """Compile one of policy_triton's or advantage_triton's kernels with all its options.

    variant: policy_kernel's KL estimator, or finish_kernel's loss.
    """
    module = advantage_triton if hasattr(advantage_triton, kernel) else policy_triton
    function = getattr(module, kernel)
    constants: dict[str, object] = {
        name: True for name in function.arg_names if name.startswith(("HAS_", "ENTROPY_", "SHIFT_"))
    }
    constants["BLOCK_SIZE"] = module.BLOCK_SIZE
    if "WEIGHTS" in function.arg_names:
        constants["WEIGHTS"] = "rows"
    if kernel == "policy_kernel":
        constants["KL_ESTIMATOR"] = KL_ESTIMATORS.index(variant)
    if kernel == "finish_kernel":
        constants |= {"POLICY_LOSS": variant == "policy", "SUMS_AT_ONCE": policy_triton.SUMS_AT_ONCE}
        constants |= {"DIVISOR": "rows", "BLOCK_SIZE": policy_triton.SCALE_BLOCK_SIZE}
    types = dict.fromkeys(constants, "constexpr") | {"mask": "*i1"}
    types |= dict.fromkeys(("N", "T", "P", "B", "count"), "i32")
    types |= dict.fromkeys(("sums", "parts", "moments"), "*fp64")
    types |= annotated(function)  # all others are inputs and outputs
    source = ASTSource(
        function, {name: types.get(name, "*fp32") for name in function.arg_names}, constexprs=constants
    )
    return triton_row(source, module.NUM_WARPS, kernel, sm, "fp32", variant)


@functools.cache
def build_rules() -> dict[str, Any]:
    """What setup.py defines; its call of setup() does nothing here."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


def compile_sampling(nvcc: str) -> list[Row]:
    """csrc/sampling/launch.cu for every architecture that this nvcc knows, in one call.

    Raises:
        CalledProcessError: nvcc failed; its messages are on standard error.
    """
    rules, torch = build_rules(), importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None  # Triton came with it
    with tempfile.TemporaryDirectory() as folder:
        binary = str(Path(folder, "sampling.fatbin"))
        # Without TORCH_TARGET_VERSION, which says what host code may call and changes no kernel.
        options = [
            *rules["NVCC_FLAGS"],
            *rules["gpu_codes"](nvcc),
            f"-I{Path(torch.origin).parent / 'include'}",
        ]
        subprocess.run(
            [nvcc, *options, "-fatbin", "-o", binary, str(rules["CSRC"] / "sampling" / "launch.cu")],
            check=True,
        )
        return sampling_rows(Path(binary))


def sampling_rows(binary: Path) -> list[Row]:
    """What the compiled sampler in a file needs: a row an architecture and dtype."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [CUOBJDUMP, "-xelf", "all", str(binary.resolve())], cwd=folder, capture_output=True, check=True
        )
        sizes = {
            int(re.findall(r"sm_(\d+)", path.name)[0]): path.stat().st_size
            for path in Path(folder).glob("*.cubin")
        }
    return [_sampling_row(*usage, binary_bytes=sizes[usage[0]]) for usage in resource_usage(str(binary))]


def _sampling_row(sm: int, mangled: str, registers: int, spills: int, shared: int, binary_bytes: int) -> Row:
    """Mangled names end in <length><kernel>I<type>E..., the type being f or a struct bf16 or fp16 of ours."""
    found = re.search(r"\d([a-z]+(?:_[a-z]+)*_kernel)(?:I(?:f|NS_4(\w{4})E)E)?", mangled)
    assert found, mangled
    return Row(found[1], sm, found[2] or "fp32", "", registers, spills, shared, binary_bytes)


def all_jobs() -> list[partial[Row]]:
    """A compilation of each Triton kernel for each architecture, dtype and variant."""
    everywhere = (*ARCHITECTURES, *AMD)
    rows = product(
        ("row_stats_kernel", "row_grad_kernel", "row_loss_kernel"), everywhere, TYPES, (False, True)
    )
    columns = product(("column_sums_kernel", "column_grad_kernel"), everywhere, ("fp32",), (False, True))
    of_tokens = product(("kept_ids_kernel", "mean_scale_kernel", "coefficients_kernel"), everywhere)
    variants = {"pairs_kernel": list(PAIR_LOSSES), "unpaired_kernel": ["full"], "scores_kernel": ["full"]}
    preference = [
        (kernel, sm, dtype, variant)
        for kernel in variants
        for sm in everywhere
        for variant in variants[kernel]
        for dtype in (TYPES if variant in ("sigmoid", "full") else ("fp32",))
    ]
    whole = ("value_kernel", "gae_kernel", "moments_kernel", "merge_kernel", "whiten_kernel")
    policies = (
        *(("policy_kernel", estimator) for estimator in KL_ESTIMATORS),
        *(("finish_kernel", loss) for loss in ("policy", "value")),
        *((kernel, "full") for kernel in whole),
    )
    policy = [(kernel, sm, variant) for kernel, variant in policies for sm in everywhere]
    return [
        *(partial(compile_rows, *job) for job in rows),
        *(partial(compile_columns, *job) for job in columns),
        *(partial(compile_tiles, *job) for job in TILE_JOBS),
        *(partial(compile_scale, "scale_kernel", sm) for sm in everywhere),
        *(partial(compile_of_tokens, *job) for job in of_tokens),
        *(partial(compile_preference, *job) for job in preference),
        *(partial(compile_policy, *job) for job in policy),
        *epilogue_jobs(),
        *tail_jobs(),
        *screen_jobs(),
    ]


def kernel_of(job: partial[Row]) -> tuple[object, str]:
    """The kernel's name, and the function that compiles it, since two kernels share a name."""
    return job.func, job.args[0][0] if isinstance(job.args[0], tuple) else job.args[0]


def few_jobs(jobs: list[partial[Row]]) -> list[partial[Row]]:
    """Fewer jobs: each variant of a kernel on one architecture, and each kernel on all architectures."""
    variants: dict[object, list[partial[Row]]] = {}  # on each architecture, which is the second argument
    for job in jobs:
        variants.setdefault((job.func, job.args[0], *job.args[2:]), []).append(job)
    turns: dict[object, int] = {}
    chosen = []
    for architectures in variants.values():
        kernel = kernel_of(architectures[0])
        turn = turns.setdefault(kernel, len(turns))
        turns[kernel] += 1
        chosen.append(architectures[turn % len(architectures)])
    seen = {(kernel_of(job), job.args[1]) for job in chosen}
    for job in reversed(jobs):  # the variants with all options come last
        if (kernel_of(job), job.args[1]) not in seen:
            seen.add((kernel_of(job), job.args[1]))
            chosen.append(job)
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.aot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--few", action="store_true", help=few_jobs.__doc__)
    parser.add_argument(
        "--library", type=Path, metavar="FILE", help="_native.so whose sampler is read, not compiled"
    )
    arguments = parser.parse_args()

    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET: got 1, expected it unset: interpreted kernels cannot be compiled")
    jobs = few_jobs(all_jobs()) if arguments.few else all_jobs()
    nvcc = build_rules()["find_nvcc"]()
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        if not arguments.library:
            sampling = pool.submit(compile_sampling, nvcc) if nvcc else None
        else:
            sampling = pool.submit(sampling_rows, arguments.library)
        rows = list(pool.map(lambda job: job(), jobs))
    rows += sampling.result() if sampling else []
    show(rows)
    if not sampling:
        print("nvcc is not found ($CUDA_HOME, PATH): csrc/sampling/launch.cu is not in the table")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    bad = [row for row in rows if not row.fits]
    for row in bad:
        print(f"does not fit: {row}", file=sys.stderr)
    return 1 if bad else 0


def show(rows: list[Row]) -> None:
    """Print the table."""
    widths = {
        "kernel": 18,
        "target": 6,
        "dtype": 5,
        "variant": 12,
        "registers": 9,
        "spills": 6,
        "shared_bytes": 12,
        "binary_bytes": 12,
    }
    print(" ".join(f"{name:>{width}}" for name, width in widths.items()))
    for row in rows:
        print(" ".join(f"{getattr(row, name):>{width}}" for name, width in widths.items()))


if __name__ == "__main__":
    sys.exit(main())
