"""A row of the table of `python -m bench.gpu.aot`: what one kernel needs on one architecture."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# From compute capability to the KiB of shared memory that a block may have.
ARCHITECTURES = {80: 163, 90: 227, 100: 227, 120: 99}
AMD = {942: 64}  # gfx942, as far as Triton's wheel goes: to machine code, which nobody has run
TYPES = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16"}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass
class Row:
    """What one kernel needs on one architecture.

    spills: bytes of local memory a thread. binary_bytes: of the file that holds it.
    """

    kernel: str
    sm: int
    dtype: str
    variant: str
    registers: int
    spills: int
    shared_bytes: int
    binary_bytes: int = 0

    @property
    def fits(self) -> bool:
        return self.spills == 0 and self.shared_bytes <= (ARCHITECTURES | AMD)[self.sm] * 1024

    @property
    def target(self) -> str:
        return f"gfx{self.sm}" if self.sm in AMD else f"sm_{self.sm}"


def signature(
    function: triton.JITFunction, pointers: dict[str, str], constants: Mapping[str, object]
) -> dict[str, str]:
    scalars = {"N": "i32", "T": "i32", "V": "i32", "C": "i32"} | annotated(function)
    return {
        name: "constexpr" if name in constants else pointers.get(name) or scalars.get(name, "i64")
        for name in function.arg_names
    }


def annotated(function: triton.JITFunction) -> dict[str, str]:
    """The types that a kernel fixes for its float options, see triton_options.py."""
    return {
        parameter.name: parameter.annotation_type
        for parameter in function.params
        if parameter.annotation_type
    }


def triton_row(
    source: ASTSource, num_warps: int, kernel: str, sm: int, dtype: str, variant: str, **options: int
) -> Row:
    target = GPUTarget("hip", f"gfx{sm}", 64) if sm in AMD else GPUTarget("cuda", sm, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": num_warps, **options})
    if sm in AMD:
        numbers = {
            key: int(value)
            for key, value in re.findall(r"\.(\w+): +(\d+)$", compiled.asm["amdgcn"], flags=re.MULTILINE)
        }
        registers, spills, binary = (
            numbers["vgpr_count"],
            numbers["private_segment_fixed_size"],
            compiled.asm["hsaco"],
        )
    else:
        binary = compiled.asm["cubin"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(binary)
            cubin.flush()
            ((_, _, registers, spills, _),) = resource_usage(cubin.name)
    return Row(kernel, sm, dtype, variant, registers, spills, compiled.metadata.shared, len(binary))


def resource_usage(binary: str) -> list[tuple[int, str, int, int, int]]:
    """(sm, mangled name, registers, bytes of local memory a thread, bytes of static shared memory) a kernel;
    sm is 0 for a bare cubin."""
    usage = subprocess.run(
        [CUOBJDUMP, "--dump-resource-usage", binary], capture_output=True, text=True, check=True
    ).stdout
    found, sm = [], 0
    for arch, name, numbers in re.findall(
        r"^arch = sm_(\d+)|Function (\S+):\s+(.*)", usage, flags=re.MULTILINE
    ):
        if arch:
            sm = int(arch)
            continue
        used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", numbers)}
        found.append((sm, name, used["REG"], used["STACK"] + used["LOCAL"], used["SHARED"]))
    return found
