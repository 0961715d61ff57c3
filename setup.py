"""Builds csrc/ into fastalign_kernels/_native.so; everything else is in pyproject.toml.

g++ (or $CXX) is called directly: the library uses torch's stable ABI, so one file serves every torch >= 2.10 and every Python, and
torch.utils.cpp_extension would tie it to one of each. torch must be importable while building: `pip install --no-build-isolation`.
Without a compiler or without torch the package installs all the same and says, at import, what serves in place of the library.
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

CSRC = Path(__file__).parent / "csrc"
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-Wall", "-Wno-psabi", "-ffp-contract=fast"]
TARGETS = {"generic": []}  # instruction sets that rows_target.cpp is compiled for; ops.cpp chooses among them at run time
if platform.machine() in ("x86_64", "AMD64"):
    TARGETS["avx2"] = ["-mavx2", "-mfma"]
    TARGETS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"]


class BuildNative(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # no Python ABI in the name: the library does not use Python

    def build_extension(self, ext: Extension) -> None:
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        torch = importlib.util.find_spec("torch")
        if compiler is None or torch is None or torch.origin is None:
            lacking = "no C++ compiler" if compiler is None else "torch is not importable here (use --no-build-isolation)"
            print(f"fastalign: native library not built: {lacking}", file=sys.stderr)
            ext.optional = True  # setuptools then accepts that no file appears
            return
        root, objects = Path(torch.origin).parent, Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)
        ops = [*FLAGS, "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{root / 'include'}"]
        if len(TARGETS) > 1:
            ops.append("-DFASTALIGN_X86_TARGETS")
        commands = {objects / "ops.o": [*ops, "-c", str(CSRC / "ops.cpp")]}
        for name, flags in TARGETS.items():
            commands[objects / f"{name}.o"] = [*FLAGS, *flags, f"-DFASTALIGN_TARGET={name}", "-c", str(CSRC / "rows_target.cpp")]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda item: subprocess.run([compiler, *item[1], "-o", str(item[0])], check=True), commands.items()))
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        linked = library.with_suffix(".new")  # then renamed: processes that have the old library mapped keep it
        link = ["-shared", *map(str, commands), "-o", str(linked), f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
        if sys.platform == "linux":
            link.append("-Wl,--exclude-libs,ALL")
        subprocess.run([compiler, *link], check=True)
        linked.replace(library)


class AnyPython(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


native = Extension("fastalign_kernels._native", sources=[], depends=[str(p) for p in CSRC.iterdir()])
setup(ext_modules=[native], cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPython})
