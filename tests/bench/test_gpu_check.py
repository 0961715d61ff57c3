"""What `make gpu-check` does that needs no GPU: its two calls, their limits, and the one file they leave."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.gpu import check as gpu_check
from bench.gpu import parts, process
from bench.gpu.draw import draw
from bench.gpu.process import Part
from bench.gpu.results import Results

ROOT = Path(__file__).parents[2]


def python(code: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code, *arguments)


def test_the_plan_has_two_calls_of_five_minutes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel = tmp_path / "peer-1-py3-none-any.whl"
    wheel.touch()
    assert gpu_check.main(["--plan", "--wheels", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [re.sub(r"^ *\d+ s  |:.*", "", line) for line in lines]
    begin = ["GPU and driver", "nvcc", "peers", "library", "environment"]
    tests = ["tests on the device", "engines of the head against fp64", "memcheck of the sampler"]
    tests.append("racecheck of the sampler")
    assert names == [*begin, *tests, *begin, "times", "tune"]
    assert str(wheel) in lines[names.index("peers")] and parts.SECONDS < 300
    assert gpu_check.main(["--plan", "--part", "times", "--wheels", str(tmp_path / "none")]) == 0
    assert "peers" not in capsys.readouterr().out


def test_the_files_with_tests_of_the_device_are_found() -> None:
    found = parts.files()
    used = {"kernels/test_sampling", "linear/test_head", "softmax/test_rows", "softmax/test_columns"}
    assert {f"tests/{name}.py" for name in used | {"stages/test_training"}} < set(found)
    assert "tests/data/test_chat.py" not in found and all((ROOT / path).is_file() for path in found)


def test_a_failing_a_missing_and_a_slow_part_are_recorded_and_the_next_still_runs(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    stages = [
        [
            Part("fine", python("import sys; print(sys.path)"), 20),
            Part("failing", python("raise SystemExit('no such kernel')"), 20),
            Part("missing", ("no-such-sanitizer",), 20),
        ],
        [Part("slow", python("import time; print('begun', flush=True); time.sleep(60)"), 0.8)],
        [Part("last", python("import sys; open(sys.argv[1], 'w').write('[1]')", str(report)), 20, report)],
    ]
    results = Results(tmp_path / "results.json")
    results.add("cases", {"name": "of the other call"})
    log = tmp_path / "log.txt"
    assert gpu_check.check(stages, results, tmp_path / "site", seconds=90, log=log) == 3
    assert "==== failing: failed\nno such kernel" in log.read_text()
    found = json.loads(results.path.read_text())
    assert found["cases"] == [{"name": "of the other call"}]
    states = {record["name"]: record["status"] for record in found["checks"]}
    assert states == {
        "fine": "ok",
        "failing": "failed",
        "missing": "not found",
        "slow": "over its limit",
        "last": "ok",
    }
    records = {record["name"]: record for record in found["checks"]}
    assert str(tmp_path / "site") in records["fine"]["output"]
    assert "no such kernel" in records["failing"]["output"]
    assert records["slow"]["output"].startswith("begun")
    assert "KeyboardInterrupt" in records["slow"]["output"]
    assert records["last"]["report"] == [1]


def test_a_record_names_no_folder_of_the_machine() -> None:
    """Results files are committed."""
    code = "import bench, pytest, sys; print(bench.__file__, pytest.__file__, sys.executable)"
    record = process.run(Part("paths", python(code), 60), {**os.environ, "PYTHONPATH": str(ROOT)})
    assert record["output"] == "bench/__init__.py pytest/__init__.py bin/" + Path(sys.executable).name + "\n"


def test_the_parts_of_a_stage_run_side_by_side(tmp_path: Path) -> None:
    """Each waits for the other's file."""
    wait = "import pathlib, sys, time\npathlib.Path(sys.argv[1]).touch()\n"
    wait += "while not pathlib.Path(sys.argv[2]).exists(): time.sleep(0.01)"
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    stage = [Part("a", python(wait, a, b), 20), Part("b", python(wait, b, a), 20)]
    assert gpu_check.check([stage], Results(tmp_path / "results.json"), tmp_path, seconds=60) == 0


def test_a_part_is_told_its_limit_and_leaves_seconds_to_later_parts() -> None:
    part = Part("times", ("python", "--seconds", process.LIMIT), 200, leaves=40)
    within = part.within(140)
    assert within.limit == 100 and within.command == ("python", "--seconds", "85")
    assert part.within(20).limit == 1


def test_a_part_that_will_not_be_interrupted_is_killed_with_its_children(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "TO_FINISH", 0.2)
    child = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True)"
    ignoring = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    record = process.run(Part("stubborn", python(f"{child}; {ignoring}"), 0.8), {})
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


def test_the_longest_tests_run_first_and_those_of_the_cpu_not_at_all(tmp_path: Path) -> None:
    """pytest with the plugin, in a process of its own."""
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.fixture\ndef device(): pass\n"
        "def test_short(device): pass\n"
        "def test_of_the_host(): assert False\n"
        "@pytest.mark.skipif(False, reason='needs a GPU')\ndef test_long(): assert False\n"
        "@pytest.mark.cpu_only\ndef test_of_the_cpu(device): assert False\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = cpu_only\n")
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps({"tests": {"test_some.py::test_long": {"seconds": 9}}}))
    script = (
        "import sys, pathlib, pytest; from bench.gpu import longest_first as plugin\n"
        "plugin.EARLIER, plugin.LEAST = pathlib.Path('earlier.json'), 0\n"
        "sys.exit(pytest.main(['-q', '--seconds-to', 'out.json'], plugins=[plugin]))"
    )
    done = subprocess.run(
        python(script), cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert "1 failed, 1 passed, 2 deselected" in done.stdout, done.stdout + done.stderr
    assert done.stdout.lstrip().startswith("F.")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["failures"] == ["test_some.py::test_long"] and found["passed"] == 1
    assert set(found["tests"]) == {"test_some.py::test_long", "test_some.py::test_short"}


def test_what_the_sanitizer_runs_draws_the_same_tokens_everywhere() -> None:
    draw("cpu")


def test_make_runs_it_with_the_machines_own_python() -> None:
    command = [
        "make",
        "--no-print-directory",
        "-n",
        "gpu-check",
        "PYTHON=python3.12",
        "PART=tests",
    ]
    # `make test` may have started this test
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "python3.12 -m bench.gpu.check --part tests"
