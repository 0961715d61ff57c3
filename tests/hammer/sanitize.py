"""The native tests and the fuzz of the functions, of `sample` and of screens under AddressSanitizer and
UndefinedBehaviorSanitizer.

    make sanitize

The library is built with sanitizers into build/sanitized, which holds a copy of the packages and comes first
on the path; the package's own _native.so is not touched. Our GEMM is forced where the CPU has AVX-512
(FASTALIGN_GEMM=native). Any report ends the process: a finding.

CUDA, what torch itself leaks, and the sampler's tests that compile copies of the source by g++ are left out.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "build" / "sanitized"
SUITE = (
    *("softmax/test_rows", "softmax/test_columns", "policy/test_policy", "policy/test_calls"),
    *("kernels/test_gemm", "kernels/test_gemm_int8", "linear/test_screen", "kernels/test_sampling"),
    *("kernels/test_native", "kernels/test_logits", "linear/test_screen_draws"),
)
LEFT_OUT = (
    *("triton", "cuda", "transformers", "SmolLM2"),  # no native code of ours
    *(
        "distribution",
        "broken_sampler",
        "block",
        "24_nats",
        "large_vocabulary",
    ),  # minutes, or a library of their own
    *("without_the_library", "compile", "gradcheck"),
)


def runtime(name: str) -> str:
    """The compiler's path of a library. The sanitizer's and C++'s must be loaded before Python's first."""
    compiler = os.environ.get("CXX", "g++")
    return subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(BUILT), str(ROOT)])
    added = {"PYTHONPATH": path, "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so')}"}
    added |= {
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
    return os.environ | added


def build() -> None:
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build",
        "--build-lib",
        str(BUILT),
        "--build-temp",
        str(BUILT.with_name("sanitized-objects")),
    ]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"FASTALIGN_SANITIZE": "1"}, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of the fuzz of each of its three areas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("tests", nargs="*", default=[f"tests/{name}.py" for name in SUITE])
    arguments = parser.parse_args()
    began = time.time()
    build()
    print(f"sanitize: built in {time.time() - began:.0f} s", flush=True)
    run = environment()
    probe = (
        "from fastalign_kernels import native; "
        "assert 'sanitized' in str(native.LIBRARY) and not native.missing, native.missing; "
        "print('native' if native.has_gemm() else 'torch')"
    )
    found = subprocess.run([sys.executable, "-c", probe], env=run, cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        print(found.stderr[-3000:])
        return 1
    run["FASTALIGN_GEMM"] = found.stdout.split()[-1]
    chosen = " and ".join(f"not {word}" for word in LEFT_OUT)
    areas = [word for area in ("functions", "sample", "screen") for word in ("--only", area)]
    fuzz = [sys.executable, "-m", "tests.hammer.fuzz", *areas]
    commands = {
        "tests": [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-k",
            chosen,
            *arguments.tests,
        ],
        "fuzz": [*fuzz, "--seed", str(arguments.seed), "--seconds", str(arguments.seconds)],
    }
    failed = [
        name for name, command in commands.items() if subprocess.run(command, cwd=ROOT, env=run).returncode
    ]
    print(
        f"sanitize: {', '.join(failed) or 'nothing'} failed; GEMM: {run['FASTALIGN_GEMM']}; "
        f"{time.time() - began:.0f} s"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
