"""Builds csrc/ into fastalign_kernels/_native.so; everything else is in pyproject.toml.

The build calls g++ (or $CXX) and, where it is found, nvcc. The library uses torch's stable ABI, so one file
serves every torch from 2.10 on (2.11 is the oldest that is tested) and every Python.
torch.utils.cpp_extension would tie it to one of each, and cannot link CUDA beside a CPU torch.

The build needs torch's headers and a C++20 compiler. If one is missing it stops and says what to do: use
`--no-build-isolation`, install a compiler, or set FASTALIGN_NATIVE=0, which installs without the library
(PyTorch then replaces it, and importing fastalign says so). Without nvcc the library has no CUDA sampler.

FASTALIGN_GPUS=90 compiles the CUDA sampler for that architecture alone, or for several: FASTALIGN_GPUS=80,90.

FASTALIGN_OPS=name registers the ops under that name, as .ci/hub.py does for the Hugging Face Hub.

FASTALIGN_SANITIZE=1 compiles AddressSanitizer and UndefinedBehaviorSanitizer in, without CUDA, for `make
sanitize` (tests/hammer/sanitize.py).
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import PlatformError

CSRC = Path(__file__).parent / "csrc"
# -Wno-uninitialized: GCC 12 warns of its own intrinsics.
FLAGS = ["-std=c++20", "-fPIC", "-Wall", "-Wno-psabi", "-Wno-uninitialized"]
SANITIZED = [
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
]
# csrc/<family>/target.cpp, with the compiler's rule for a * b + c. The sampler gives the same bits on every
# machine, so its fused operations are written down and the compiler may add none.
KERNELS = {"sampling": "-ffp-contract=off", "softmax": "-ffp-contract=fast", "policy": "-ffp-contract=fast"}
# -O3 unrolls the sampler's histograms and takes their buckets out of a register one by one: on a Zen 4 top-p
# took 1.4 to 1.9 times as long as with -O2, and the file for SSE2 45 s to compile in place of 7.
OPTIMIZE = {"sampling": "-O2"}
LAUNCHERS = (
    "ops",
    "softmax/launch",
    "gemm/launch",
    "int8/launch",
    "policy/launch",
    "sampling/launch",
    "screen/launch",
)
# Instruction sets that the kernels are compiled for; csrc/common/targets.h chooses among them at run time.
TARGETS = {"generic": []}
if platform.machine() in ("x86_64", "AMD64"):
    TARGETS["avx2"] = ["-mavx2", "-mfma"]
    TARGETS["avx512"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"),
        "-mprefer-vector-width=512",
    ]
# GPU architectures, as far as the nvcc at hand knows them; the last also as PTX, for newer ones. -fmad=false:
# see KERNELS.
GPUS = (80, 90, 100, 120)
NVCC_FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-Xcompiler", "-fPIC", "-DUSE_CUDA", "--threads=0"]


def find_nvcc() -> str | None:
    """nvcc of $CUDA_HOME, else the one on the PATH."""
    home = os.environ.get("CUDA_HOME")
    nvcc = Path(home, "bin", "nvcc") if home else None
    return str(nvcc) if nvcc and nvcc.is_file() else shutil.which("nvcc")


def gpu_codes(nvcc: str) -> list[str]:
    """-gencode options for the architectures that this nvcc compiles for."""
    known = subprocess.run(
        [nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True
    ).stdout.split()
    asked = os.environ.get("FASTALIGN_GPUS")
    found = [sm for sm in (asked.split(",") if asked else map(str, GPUS)) if f"sm_{sm}" in known]
    if not found:
        raise PlatformError(f"FASTALIGN_GPUS: got {asked}, expected numbers of {', '.join(known)}")
    codes = {sm: f"[sm_{sm},compute_{sm}]" if sm == found[-1] else f"sm_{sm}" for sm in found}
    return [option for sm, code in codes.items() for option in ("-gencode", f"arch=compute_{sm},code={code}")]


OR_NONE = "or set FASTALIGN_NATIVE=0 to install without the native library (slower: PyTorch serves instead)"
WITHOUT_TORCH = (
    "and its headers are needed to build the native library. Install torch first, then use "
    f"`pip install --no-build-isolation ...`, so that pip builds beside it; {OR_NONE}"
)


class BuildNative(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        # No Python ABI in the name: the library does not use Python.
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        torch = importlib.util.find_spec("torch")
        if torch is None or torch.origin is None:
            raise PlatformError(f"fastalign: torch is not importable by {sys.executable}, {WITHOUT_TORCH}")
        if compiler is None:
            raise PlatformError(
                "fastalign: no C++ compiler found as $CXX, g++ or clang++; install g++ 12 or newer, "
                f"{OR_NONE}"
            )
        root, objects = Path(torch.origin).parent, Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)
        nvcc = None if sanitize else find_nvcc()
        built = compile_all(compile_commands(compiler, nvcc, root, objects), objects / "cuda.o")
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        link(compiler, nvcc if objects / "cuda.o" in built else None, root, built, library)


def compile_commands(compiler: str, nvcc: str | None, torch: Path, objects: Path) -> dict[Path, list[str]]:
    """The command of each object file: launchers against torch, kernels once for each target.

    The longest comes first, so that no core waits for it at the end.
    """
    compiled = [compiler, *FLAGS, *(SANITIZED if sanitize else [])]
    stable_abi = ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{torch / 'include'}"]
    if ops := os.environ.get("FASTALIGN_OPS"):
        stable_abi.append(f"-DFASTALIGN_OPS={ops}")
    commands = {}
    if nvcc is not None:
        options = [*NVCC_FLAGS, *gpu_codes(nvcc), *stable_abi]
        source = str(CSRC / "sampling" / "launch.cu")
        commands[objects / "cuda.o"] = [nvcc, "-ccbin", compiler, *options, "-c", source]
    for family, target, flags in kernels():
        optimize = "-O1" if sanitize else OPTIMIZE.get(family, "-O3")
        options = [optimize, *flags, f"-DFASTALIGN_TARGET={target}"]
        source = str(CSRC / family / "target.cpp")
        commands[objects / f"{family}_{target}.o"] = [*compiled, *options, "-c", source]
    x86 = ["-DFASTALIGN_X86_TARGETS"] if len(TARGETS) > 1 else []
    for name in LAUNCHERS:
        options = ["-O1" if sanitize else "-O3", *stable_abi, *x86]
        source = str(CSRC / f"{name}.cpp")
        commands[objects / f"{name.replace('/', '_')}.o"] = [*compiled, *options, "-c", source]
    return commands


def kernels() -> Iterator[tuple[str, str, list[str]]]:
    """(family, target, flags) of each csrc/<family>/target.cpp that this machine's compiler builds."""
    for family, contract in KERNELS.items():
        for target, flags in TARGETS.items():
            yield family, target, [contract, *flags]
    if "avx512" in TARGETS:
        yield "gemm", "avx512", [*TARGETS["avx512"], "-mavx512bf16"]
        yield "int8", "avx512", [*TARGETS["avx512"], "-mavx512vnni"]
        yield "screen", "avx512", [*TARGETS["avx512"], "-ffp-contract=fast"]


def compile_all(commands: dict[Path, list[str]], cuda: Path) -> list[Path]:
    """Run the commands side by side; the objects that were built. Only the CUDA one may fail."""
    with ThreadPoolExecutor() as pool:
        done = pool.map(lambda item: subprocess.run([*item[1], "-o", str(item[0])]), commands.items())
        processes = dict(zip(commands, done))
    for output, process in processes.items():
        if output != cuda:
            process.check_returncode()
        elif process.returncode:
            print("fastalign: nvcc failed (see above), so the library is built without CUDA", file=sys.stderr)
    return [output for output, process in processes.items() if not process.returncode]


def link(compiler: str, nvcc: str | None, torch: Path, objects: list[Path], library: Path) -> None:
    """Link beside the library and rename, so that processes that have the old one mapped keep it."""
    linked = library.with_suffix(".new")
    options = ["-shared", *(SANITIZED if sanitize else []), *map(str, objects), "-o", str(linked)]
    options += [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    if nvcc is not None:
        # nvcc knows where its runtime lies. The runtime is static, so the library loads without CUDA too.
        # libtorch.so: see csrc/sampling/launch.cu.
        hidden = ["--exclude-libs=ALL", "--no-as-needed"]
        hide = [*(word for option in hidden for word in ("-Xlinker", option)), "-ltorch"]
        subprocess.run([nvcc, "-ccbin", compiler, "-cudart", "static", *options, *hide], check=True)
    else:
        hide = ["-Wl,--exclude-libs,ALL"] if sys.platform == "linux" else []
        subprocess.run([compiler, *options, *hide], check=True)
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
build_native = switch("FASTALIGN_NATIVE", "1", "1 (the default) or 0 (no native library)")
native = Extension("fastalign_kernels._native", sources=[], depends=[str(p) for p in CSRC.rglob("*.*")])
setup(
    ext_modules=[native] if build_native else [],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPython},
)
