"""Builds csrc/ into fastalign_kernels/_native.so; everything else is in pyproject.toml.

g++ (or $CXX) and, where it is found, nvcc are called directly: the library uses torch's stable ABI, so one
file serves every torch >= 2.10 and every Python, and torch.utils.cpp_extension would tie it to one of each,
and cannot link CUDA beside a CPU torch.

The build needs torch's headers and a C++20 compiler. Where one is missing it stops and says what to do:
`--no-build-isolation`, a compiler, or FASTALIGN_NATIVE=0, which installs without the library (PyTorch then
serves in its place, which is said at import). Without nvcc the library has no CUDA sampler.

FASTALIGN_SANITIZE=1 compiles AddressSanitizer and UndefinedBehaviorSanitizer in, without CUDA, for `make
sanitize` (tests/hammer/sanitize.py).
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import PlatformError

CSRC = Path(__file__).parent / "csrc"
FLAGS = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-Wall",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
]  # the last: GCC 12 on its own intrinsics
SANITIZED = [
    "-O1",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
]
# <kernel>_target.cpp with its rule for a * b + c: the sampler gives the same bits everywhere, so its fused
# operations are written down.
KERNELS = {"rows": "-ffp-contract=fast", "policy": "-ffp-contract=fast", "sampling": "-ffp-contract=off"}
LAUNCHERS = ("ops", "gemm", "policy", "sampling")
TARGETS = {
    "generic": []
}  # instruction sets that the kernels are compiled for; csrc/targets.h chooses among them at run time
if platform.machine() in ("x86_64", "AMD64"):
    TARGETS["avx2"] = ["-mavx2", "-mfma"]
    TARGETS["avx512"] = [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mfma",
        "-mprefer-vector-width=512",
    ]
# GPU architectures, as far as the nvcc at hand knows them; the last also as PTX, for newer ones. -fmad=false:
# see KERNELS.
GPUS = (80, 90, 100, 120)
NVCC_FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-Xcompiler", "-fPIC", "-DUSE_CUDA"]


def find_nvcc() -> str | None:
    """nvcc of $CUDA_HOME, else the one on the PATH."""
    home = os.environ.get("CUDA_HOME")
    own = Path(home, "bin", "nvcc") if home else None
    return str(own) if own and own.is_file() else shutil.which("nvcc")


def gpu_codes(nvcc: str) -> list[str]:
    """-gencode options for the architectures that this nvcc compiles for."""
    known = subprocess.run(
        [nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True
    ).stdout.split()
    found = [sm for sm in GPUS if f"sm_{sm}" in known]
    codes = {sm: f"[sm_{sm},compute_{sm}]" if sm == found[-1] else f"sm_{sm}" for sm in found}
    return [option for sm, code in codes.items() for option in ("-gencode", f"arch=compute_{sm},code={code}")]


OR_NONE = "or set FASTALIGN_NATIVE=0 to install without the native library (slower: PyTorch serves instead)"
WITHOUT_TORCH = (
    "and its headers are needed to build the native library. Install torch first, then use "
    f"`pip install --no-build-isolation ...`, so that pip builds beside it; {OR_NONE}"
)


class BuildNative(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return (
            os.path.join(*fullname.split(".")) + ".so"
        )  # no Python ABI in the name: the library does not use Python

    def build_extension(self, ext: Extension) -> None:
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        torch = importlib.util.find_spec("torch")
        if torch is None or torch.origin is None:
            raise PlatformError(f"fastalign: torch is not importable by {sys.executable}, {WITHOUT_TORCH}")
        if compiler is None:
            raise PlatformError(
                f"fastalign: no C++ compiler found as $CXX, g++ or clang++; install g++ 12 or newer, {OR_NONE}"
            )
        root, objects = Path(torch.origin).parent, Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)
        compiled = [*FLAGS, *(SANITIZED if sanitize else [])]
        ops = [*compiled, "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{root / 'include'}"]
        if len(TARGETS) > 1:
            ops.append("-DFASTALIGN_X86_TARGETS")
        commands = {objects / f"{name}.o": [*ops, "-c", str(CSRC / f"{name}.cpp")] for name in LAUNCHERS}
        for kernel, contract in KERNELS.items():
            for name, flags in TARGETS.items():
                own = [
                    *compiled,
                    contract,
                    *flags,
                    f"-DFASTALIGN_TARGET={name}",
                    "-c",
                    str(CSRC / f"{kernel}_target.cpp"),
                ]
                commands[objects / f"{kernel}_{name}.o"] = own
        if "avx512" in TARGETS:
            own = [*compiled, *TARGETS["avx512"], "-mavx512bf16", "-c", str(CSRC / "gemm_target.cpp")]
            commands[objects / "gemm_avx512.o"] = own
        commands = {output: [compiler, *command] for output, command in commands.items()}
        nvcc = None if sanitize else find_nvcc()
        cuda = objects / "cuda.o"
        if nvcc is not None:
            stable = [option for option in ops if option.startswith(("-DTORCH", "-I"))]
            commands[cuda] = [
                nvcc,
                "-ccbin",
                compiler,
                *NVCC_FLAGS,
                *gpu_codes(nvcc),
                *stable,
                "-c",
                str(CSRC / "sampling.cu"),
            ]
        with ThreadPoolExecutor() as pool:
            done = dict(
                zip(
                    commands,
                    pool.map(lambda item: subprocess.run([*item[1], "-o", str(item[0])]), commands.items()),
                )
            )
        for output, process in done.items():
            if output != cuda:
                process.check_returncode()
            elif process.returncode:
                print(
                    "fastalign: nvcc failed (see above), so the library is built without CUDA",
                    file=sys.stderr,
                )
                commands.pop(cuda)
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        linked = library.with_suffix(
            ".new"
        )  # then renamed: processes that have the old library mapped keep it
        link = [
            "-shared",
            *(SANITIZED if sanitize else []),
            *map(str, commands),
            "-o",
            str(linked),
            f"-L{root / 'lib'}",
            "-ltorch_cpu",
            "-lc10",
        ]
        if (
            cuda in commands
        ):  # by nvcc, which knows where its runtime lies; static, so that the library loads without CUDA too
            hide = [
                "-Xlinker",
                "--exclude-libs=ALL",
                "-Xlinker",
                "--no-as-needed",
                "-ltorch",
            ]  # libtorch.so: see csrc/sampling.cu
            subprocess.run([nvcc, "-ccbin", compiler, "-cudart", "static", *link, *hide], check=True)
        else:
            subprocess.run(
                [compiler, *link, *(["-Wl,--exclude-libs,ALL"] if sys.platform == "linux" else [])],
                check=True,
            )
        linked.replace(library)


class AnyPython(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def switch(name: str, default: str, meaning: str) -> bool:
    """Whether an environment variable is 1, not 0."""
    value = os.environ.get(name, default)
    if value not in ("0", "1"):
        sys.exit(f"{name}: got {value!r}, expected {meaning}")
    return value == "1"


sanitize = switch("FASTALIGN_SANITIZE", "0", "0 (the default) or 1 (sanitizers, for make sanitize)")
wanted = switch("FASTALIGN_NATIVE", "1", "1 (the default) or 0 (no native library)")
native = Extension("fastalign_kernels._native", sources=[], depends=[str(p) for p in CSRC.iterdir()])
setup(ext_modules=[native] if wanted else [], cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPython})
