"""`make gpu-check`: builds, tests and measures in 9 minutes on a bare GPU machine without network.

    python3 -m bench.gpu.check --wheels wheels   # from the repository's root, by the python that has torch
    python3 -m bench.gpu.check --plan            # the parts and their limits

Each part is a process with a time limit: the machine, peers from a folder of wheels, the build, the tests
that use the device, compute-sanitizer on the native sampler, and the benchmark with the remaining time. A
part that fails, is not found or runs over is recorded, and the next one begins. The results file is the
benchmark's with an entry `checks`; without benchmark results it holds the checks alone. bench/README.md says
how to fill the folder of wheels.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
SECONDS = 530  # a call on a lent machine may take 540
MOST_OUTPUT = 4000  # characters kept of the end of a part's output
TO_FINISH = 15  # seconds for an interrupted part to write its files
DEVICE_TESTS = (
    "softmax/rows",
    "softmax/columns",
    "linear/tail",
    "linear/tail_calls",
    "kernels/logits",
    "linear/head",
    "linear/engine",
    "linear/epilogue",
    "linear/gpu_engines",
    "preference/preference",
    "preference/numbers",
    "preference/calls",
    "preference/refusals",
    "policy/policy",
    "policy/calls",
    "linear/policy_head",
    "policy/advantage",
    "linear/sequence_head",
    "kernels/sampling",
    "kernels/sampling_distribution",
    "kernels/native",
    "kernels/triton_options",
    "models/nn",
    "bench/measure",
    "models/causal_lm",
    "models/causal_lm_training",
    "models/causal_lm_refusals",
    "rollout/rollout",
    "rollout/steps_on_a_device",
    "rollout/refusals",
    "rollout/custom_generate",
    "stages/training",
)
DRAW = "from bench.gpu.check import draw; draw('cuda')"


def test_file(name: str) -> Path:
    """The path of one of DEVICE_TESTS from the root."""
    folder, _, stem = name.rpartition("/")
    return Path("tests", folder, f"test_{stem}.py")


class Part(NamedTuple):
    """A process and its limit in seconds."""

    name: str
    command: tuple[str, ...]
    limit: float


def plan(wheels: Sequence[Path], site: Path) -> list[Part]:
    """The parts before the benchmark, which gets the remaining time."""
    python = sys.executable
    pip = (
        python,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--upgrade",
        "--target",
        str(site),
    )
    sanitizer = ("compute-sanitizer", "--error-exitcode", "9", "--tool")
    tests = [str(test_file(name)) for name in DEVICE_TESTS]
    return [
        Part("GPU and driver", ("nvidia-smi",), 10),
        Part("nvcc", ("nvcc", "--version"), 10),
        *([Part("peers", (*pip, *map(str, wheels)), 40)] if wheels else []),
        Part("build", (python, "setup.py", "build_ext", "--inplace"), 90),
        Part("environment", (python, "-m", "fastalign", "env"), 20),
        Part(
            "tests on the device",
            (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "4", *tests),
            140,
        ),
        Part("memcheck of the sampler", (*sanitizer, "memcheck", python, "-c", DRAW), 40),
        Part("racecheck of the sampler", (*sanitizer, "racecheck", python, "-c", DRAW), 40),
    ]


def benchmark(output: Path, seconds: float) -> Part:
    """The suite's bf16 cases and the samplers. No case begins in the last quarter of the time."""
    options = (
        "--output",
        str(output),
        "--seconds",
        "1",
        "--minutes",
        f"{max(0.0, 0.75 * seconds / 60):.2f}",
        "-k",
        "bf16 or sample",
    )
    return Part("benchmark", (sys.executable, "-m", "bench", *options), seconds)


def draw(device: str) -> None:
    """Draw on small rows by every path of the native sampler, and compare the tokens with the CPU's.

    The paths: dtypes, filters, masks, and a row without a finite logit.
    """
    import torch

    import fastalign

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 5003, generator=generator) * 4
    logits[4] = float("nan")
    masks = torch.randint(-(2**31), 2**31, (5, -(-5003 // 32)), generator=generator, dtype=torch.int64).to(
        torch.int32
    )
    filters: list[dict[str, Any]] = [{}, {"temperature": 0.0}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.05}]
    filters.append({"top_k": 400, "top_p": 0.8, "temperature": 0.7})
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for options in filters:
            for seen in (None, masks):
                on_cpu, on_device = (
                    fastalign.sample(
                        logits.to(where, dtype),
                        seed=1,
                        seen=None if seen is None else seen.to(where),
                        repetition_penalty=1.0 if seen is None else 1.3,
                        **options,
                    )
                    for where in ("cpu", device)
                )
                assert torch.equal(on_cpu.token, on_device.token.cpu()) and not on_device.valid[4], (
                    dtype,
                    options,
                )


def run(part: Part, environment: dict[str, str]) -> dict[str, Any]:
    """Run a part; its record. status: "ok", "failed", "over its limit" or "not found"."""
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        try:
            child = subprocess.Popen(
                part.command,
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_heed_interrupts,
            )
        except FileNotFoundError:
            status = "not found"
        else:
            try:
                status = "ok" if child.wait(part.limit) == 0 else "failed"
            except subprocess.TimeoutExpired:
                status = "over its limit"
                _end(child)
        log.seek(0)
        text = log.read()[-MOST_OUTPUT:]
    return {
        "name": part.name,
        "status": status,
        "seconds": round(time.monotonic() - begin, 1),
        "limit": part.limit,
        "output": text,
    }


def _heed_interrupts() -> None:
    """Restore SIGINT, which a shell ignores in background jobs, so that `_end` can interrupt the part."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Interrupt the part, so that pytest writes its results, then kill its session with all workers."""
    child.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(TO_FINISH)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def check(parts: Sequence[Part], output: Path, site: Path, seconds: float = SECONDS) -> int:
    """Run the parts and then the benchmark, and write `output` after each; how many were not ok."""
    begin = time.monotonic()
    path = os.pathsep.join(
        filter(None, [str(ROOT), str(ROOT / "kernels"), str(site), os.environ.get("PYTHONPATH")])
    )
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    checks: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        measured = Path(folder, "bench.json")
        for number in range(len(parts) + 1):
            left = seconds - (time.monotonic() - begin) - TO_FINISH
            part = parts[number] if number < len(parts) else benchmark(measured, left)
            checks.append(run(part._replace(limit=min(part.limit, max(left, 1.0))), environment))
            print(f"{checks[-1]['status']:14} {checks[-1]['seconds']:6.1f} s  {part.name}", flush=True)
            if checks[-1]["status"] != "ok":
                print(checks[-1]["output"][-800:], flush=True)
            found = measured.exists() and measured.stat().st_size > 0
            results = (
                json.loads(measured.read_text())
                if found
                else {"machine_info": {"cpu": "", "gpu": "none"}, "cases": []}
            )
            output.write_text(json.dumps({**results, "checks": checks}, indent=1))
    print(f"results: {output}")
    return sum(record["status"] != "ok" for record in checks)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--wheels", type=Path, default=ROOT / "wheels", help="folder of the peers' wheels (default: wheels)"
    )
    parser.add_argument(
        "--output", type=Path, help="results file (default: bench/results/gpu-check-<date>.json)"
    )
    parser.add_argument(
        "--plan", action="store_true", help="print the parts with their limits and run nothing"
    )
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as site:
        parts = plan(sorted(given.wheels.glob("*.whl")), Path(site))
        if given.plan:
            for part in [*parts, benchmark(Path("bench.json"), SECONDS - sum(part.limit for part in parts))]:
                print(f"{part.limit:4.0f} s  {part.name}: {' '.join(part.command)}")
            return 0
        output = (
            given.output or ROOT / "bench" / "results" / f"gpu-check-{datetime.date.today().isoformat()}.json"
        )
        return 1 if check(parts, output, Path(site)) else 0


if __name__ == "__main__":
    sys.exit(main())
