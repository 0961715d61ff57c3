"""Builds the native library for the present card alone, unless one is there that serves it:
`python -m bench.gpu.library`. A library that was built elsewhere saves a minute.
"""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from .process import ROOT


def serves(device: str = "cuda") -> str:
    """Why the library that is there does not sample on the device; the empty string if it does."""
    from fastalign_kernels import native, sample

    if device not in native.samples_on:
        return native.missing or native.cuda_missing
    try:
        sample(torch.randn(2, 300, device=device), seed=0, top_p=0.9).token.tolist()
    except RuntimeError as error:  # "no kernel image is available for execution on the device", say
        return str(error).splitlines()[0]
    return ""


def main() -> int:
    reason = serves()
    if not reason:
        print("the native library that is there serves this card")
        return 0
    major, minor = torch.cuda.get_device_capability()
    print(f"building the native library for sm_{major}{minor}: {reason}", flush=True)
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=ROOT,
        env={**os.environ, "FASTALIGN_GPUS": f"{major}{minor}"},
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
