"""Lays the kernels out as Hugging Face's `kernels` loads them.

    python .ci/hub.py FOLDER             torch-cpu and torch-cuda: Python, Triton
    python .ci/hub.py FOLDER --native    and the CPU kernels of csrc/, which g++ compiles in minutes

FOLDER/build/<variant>/ then holds the files of fastalign_kernels and metadata.json, and
`kernels.get_local_kernel(FOLDER)` loads the variant that suits the machine. Each variant's ops are in a
namespace named after a digest of its files, so that it loads beside an installed fastalign and beside other
versions of itself. The native variant uses torch's stable ABI and serves torch 2.11 and newer. The CUDA
sampler is in no variant: `sample` runs in PyTorch on a GPU.
"""

import argparse
import base64
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "kernels" / "fastalign_kernels"
NAMESPACE_LINE = 'NAMESPACE = "fastalign"'
VERSION = 1  # the Hub's: raised by a change that breaks callers
# The variants without compiled code: their names, and the backend in their metadata.
NOARCH = {"torch-cpu": "cpu", "torch-cuda": "cuda"}
CARD = """---
library_name: kernels
license: apache-2.0
---
Fused losses for language models, from hidden states. `kernels.get_kernel` loads them. The functions are those
of fastalign's `fastalign_kernels`.
"""


def build(folder: Path, *, native: bool = False) -> list[Path]:
    """Write the variants into `folder`, which must not hold any; their paths."""
    variants = folder / "build"
    if variants.exists():
        raise SystemExit(f"folder: got {folder}, which has a build, expected a new folder: remove {variants}")
    made = [write_variant(variants / name, backend) for name, backend in NOARCH.items()]
    if native:
        machine = f"{platform.machine()}-{platform.system().lower()}"
        made.append(write_variant(variants / f"torch-stable-abi210-cpu-{machine}", "cpu", native=True))
    (folder / "README.md").write_text(CARD)
    shutil.copy2(ROOT / "LICENSE", folder)
    return made


def write_variant(path: Path, backend: str, *, native: bool = False) -> Path:
    """One variant: the package's files with a namespace of their own, and metadata.json."""
    sources = {file.relative_to(PACKAGE).as_posix(): file.read_bytes() for file in python_files()}
    namespace = f"fastalign_{digest_of(sources, path.name, native=native)}"
    before = sources["namespace.py"].decode()
    if NAMESPACE_LINE not in before:
        raise SystemExit(f"namespace.py: got no line {NAMESPACE_LINE}, expected one to replace")
    sources["namespace.py"] = before.replace(NAMESPACE_LINE, f'NAMESPACE = "{namespace}"').encode()
    for name, content in sources.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    if native:
        compile_library(path / "_native.so", namespace)
    files = {
        file.relative_to(path).as_posix(): base64.b64encode(hashlib.sha256(file.read_bytes()).digest())
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }
    metadata = {
        "id": f"_{namespace}",
        "name": "fastalign",
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": {name: code.decode() for name, code in files.items()}},
    }
    (path / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return path


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def digest_of(sources: dict[str, bytes], variant: str, *, native: bool) -> str:
    """Twelve hexadecimal digits for the variant's name and all that it is built from."""
    compiled = sorted(file for file in (ROOT / "csrc").rglob("*.*") if file.is_file()) if native else []
    digest = hashlib.sha256(variant.encode())
    for name, content in [*sources.items(), *((file.name, file.read_bytes()) for file in compiled)]:
        digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    return digest.hexdigest()[:12]


def compile_library(library: Path, namespace: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "setup.py",
            "build_ext",
            "--build-lib",
            folder,
            "--build-temp",
            f"{folder}/o",
        ]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"FASTALIGN_OPS": namespace}, check=True)
        shutil.copy2(Path(folder, "fastalign_kernels", "_native.so"), library)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--native", action="store_true", help="compile csrc/ for this machine's CPU")
    arguments = parser.parse_args()
    for path in build(arguments.folder, native=arguments.native):
        print(path)
