"""What `make gpu-check` does that needs no GPU: its plan, its limits, and the one file it leaves whatever
happens."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.gpu import check as gpu_check
from bench.gpu.check import Part

ROOT = Path(__file__).parents[2]


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_the_plan_fits_nine_minutes_and_leaves_the_benchmark_its_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = tmp_path / "peer-1-py3-none-any.whl"
    wheel.touch()
    parts = gpu_check.plan([wheel], tmp_path / "site")
    assert sum(part.limit for part in parts) + gpu_check.TO_FINISH + 120 <= gpu_check.SECONDS < 9 * 60
    names = [part.name for part in parts]
    assert (
        names.index("peers")
        < names.index("build")
        < names.index("tests on the device")
        < names.index("memcheck of the sampler")
    )
    assert str(wheel) in parts[names.index("peers")].command
    assert "peers" not in [part.name for part in gpu_check.plan([], tmp_path)]
    assert gpu_check.main(["--plan", "--wheels", str(tmp_path)]) == 0
    assert "benchmark" in capsys.readouterr().out.splitlines()[-1]


def test_every_test_that_uses_the_device_is_in_the_plan() -> None:
    uses = re.compile(r"def test_\w+\([^)]*\bdevice\b|needs a CUDA device")
    using = {path for path in (ROOT / "tests").rglob("test_*.py") if uses.search(path.read_text())}
    planned = {ROOT / gpu_check.test_file(name) for name in gpu_check.DEVICE_TESTS}
    assert using - {Path(__file__)} <= planned and all(path.is_file() for path in planned)


def test_a_failing_a_missing_and_a_slow_part_are_recorded_and_the_benchmark_still_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def benchmark(output: Path, seconds: float) -> Part:
        code = (
            f"import pathlib; pathlib.Path({str(output)!r})"
            '.write_text(\'{"machine_info": {}, "cases": [1]}\')'
        )
        return Part("benchmark", python(code), seconds)

    monkeypatch.setattr(gpu_check, "benchmark", benchmark)
    parts = [
        Part("fine", python("import sys; print(sys.path)"), 20),
        Part("failing", python("raise SystemExit('no such kernel')"), 20),
        Part("missing", ("no-such-sanitizer",), 20),
        Part("slow", python("import time; print('begun', flush=True); time.sleep(60)"), 0.8),
    ]
    output = tmp_path / "results.json"
    assert gpu_check.check(parts, output, tmp_path / "site", seconds=60) == 3
    results = json.loads(output.read_text())
    assert results["cases"] == [1]
    states = {record["name"]: record["status"] for record in results["checks"]}
    assert states == {
        "fine": "ok",
        "failing": "failed",
        "missing": "not found",
        "slow": "over its limit",
        "benchmark": "ok",
    }
    outputs = {record["name"]: record["output"] for record in results["checks"]}
    assert str(tmp_path / "site") in outputs["fine"] and "no such kernel" in outputs["failing"]
    assert outputs["slow"].startswith("begun") and "KeyboardInterrupt" in outputs["slow"]


def test_a_part_that_will_not_be_interrupted_is_killed_with_its_children(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu_check, "TO_FINISH", 0.2)
    child = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True)"
    ignoring = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    record = gpu_check.run(Part("stubborn", python(f"{child}; {ignoring}"), 0.8), {})
    assert record["status"] == "over its limit" and record["seconds"] < 10
    give_up = time.monotonic() + 10  # a killed process ends when it is next scheduled
    while True:
        left = subprocess.run(
            ["ps", "-o", "stat=", "-p", record["output"].strip()], capture_output=True, text=True
        ).stdout
        if left.strip()[:1] in ("", "Z"):  # gone, or waiting for whoever reaps orphans here
            break
        assert time.monotonic() < give_up, left
        time.sleep(0.05)


def test_without_a_benchmark_the_file_holds_the_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        gpu_check,
        "benchmark",
        lambda output, seconds: Part("benchmark", python("raise SystemExit(1)"), seconds),
    )
    output = tmp_path / "results.json"
    assert gpu_check.check([], output, tmp_path, seconds=30) == 1
    results = json.loads(output.read_text())
    assert results["cases"] == [] and [record["status"] for record in results["checks"]] == ["failed"]


def test_what_the_sanitizer_runs_draws_the_same_tokens_everywhere() -> None:
    gpu_check.draw("cpu")


def test_make_runs_it_with_the_machines_own_python() -> None:
    command = [
        "make",
        "--no-print-directory",
        "-n",
        "gpu-check",
        "PYTHON=python3.12",
    ]  # `make test` may have started this test
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "python3.12 -m bench.gpu.check"
