"""Compile every Triton kernel ahead of time, without a GPU: registers, spills and shared memory for each architecture.

    python -m bench.aot                 # table; exit status 1 on a spill or on more shared memory than the architecture has
    python -m bench.aot --json FILE     # the rows as JSON too

Must run without TRITON_INTERPRET, which replaces the compiled kernels by interpreted ones.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastalign_kernels import rows_triton

ARCHITECTURES = {80: 163, 90: 227, 100: 227, 120: 99}  # compute capability -> KiB of shared memory a block may have
TYPES = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16"}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass
class Row:
    """What one kernel needs on one architecture. spills: bytes of local memory a thread."""

    kernel: str
    sm: int
    dtype: str
    variant: str
    registers: int
    spills: int
    shared_bytes: int

    @property
    def fits(self) -> bool:
        return self.spills == 0 and self.shared_bytes <= ARCHITECTURES[self.sm] * 1024


def _signature(function: triton.JITFunction, pointers: dict[str, str], constants: Mapping[str, object]) -> dict[str, str]:
    scalars = {"logit_scale": "fp32", "softcap": "fp32", "temperature": "fp32", "N": "i32", "T": "i32", "V": "i32"}
    return {name: "constexpr" if name in constants else pointers.get(name) or scalars.get(name, "i64") for name in function.arg_names}


def compile_rows(kernel: str, sm: int, dtype: str, full: bool) -> Row:
    """One of rows_triton's kernels; `full` has bias, softcap, scale and temperature, else none of them."""
    function = getattr(rows_triton, kernel)
    constants = {"PLAIN": not full, "HAS_BIAS": full, "HAS_SOFTCAP": full, "BLOCK": rows_triton.BLOCK}
    pointers = {"logits": TYPES[dtype], "bias": TYPES[dtype], "out": TYPES[dtype], "ids": "*i64", "stats": "*fp32", "coefficients": "*fp32"}
    # Row strides and pointers are multiples of 16 bytes in practice, and Triton specialises launches on that.
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if name in pointers or name.endswith("stride")
    }
    source = ASTSource(function, _signature(function, pointers, constants), constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": rows_triton.NUM_WARPS})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([CUOBJDUMP, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    return Row(kernel, sm, dtype, "full" if full else "plain", found["REG"], found["STACK"] + found["LOCAL"], compiled.metadata.shared)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("bench.aot: TRITON_INTERPRET=1 is set; unset it, interpreted kernels cannot be compiled")
    jobs = [
        (kernel, sm, dtype, full)
        for kernel in ("row_stats_kernel", "row_grad_kernel")
        for sm in ARCHITECTURES
        for dtype in TYPES
        for full in (False, True)
    ]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        rows = list(pool.map(lambda job: compile_rows(*job), jobs))
    print(f"{'kernel':18} {'sm':>4} {'dtype':>5} {'variant':>7} {'registers':>9} {'spills':>6} {'shared':>7}")
    for row in rows:
        print(f"{row.kernel:18} {row.sm:4} {row.dtype:>5} {row.variant:>7} {row.registers:9} {row.spills:6} {row.shared_bytes:7}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    bad = [row for row in rows if not row.fits]
    for row in bad:
        print(f"does not fit: {row}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
