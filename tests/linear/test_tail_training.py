"""The training evidence for tail_eps at a tiny size, and docs/tail.md against the results file that it
names."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch

from bench.core.operation import Absent
from bench.core.words import WORDS
from bench.experiments import tail_tables, tail_training
from bench.experiments.tail_training import GradMode, Settings, smoothed
from bench.reports import readme
from fastalign_kernels import linear_cross_entropy
from fastalign_kernels.linear import accumulate as gradients


def sentences(path: Path) -> Path:
    chance = random.Random(0)
    lines = (f"{n}\t{(-1) ** n * 2}\t{' '.join(chance.choices(WORDS, k=9))} {n}." for n in range(80))
    path.write_text("\n".join(lines))
    return path


def test_every_way_trains_and_the_results_file_makes_tables_and_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(
        sentences(tmp_path / "data.txt"), 1, vocabulary=300, held_out=10, steps=2, sft_steps=2, parts=("toy",)
    )
    eps = 0.02  # above 1 / V: an untrained softmax keeps little
    modes = {
        "exact": GradMode(None),
        "2^-14": GradMode(1e-5),
        "2^-12": GradMode(eps),
        "2^-12 dropped": GradMode(eps, False),
    }
    tail_training.run(settings, tmp_path, tmp_path / "results.json", modes)
    text = (tmp_path / "results.json").read_text()
    results = json.loads(text)
    assert str(tmp_path) not in text and results["machine_info"]["threads"] == 1

    runs = {(run["setting"], run["way"]): run for run in results["runs"]}
    assert list(runs) == [(setting, mode) for setting in ("pre-training", "fine-tuning") for mode in modes]
    for setting in ("pre-training", "fine-tuning"):
        exact, dense, tail, dropped = (runs[setting, mode]["held_out"] for mode in modes)
        assert [step for step, _ in exact] == [0, 1, 2]
        assert exact[0] == dense[0] == tail[0] == dropped[0]  # no mode moves the loss itself
        assert exact[-1][1] == pytest.approx(dense[-1][1], abs=1e-4)  # all columns are kept at 1e-5
        assert len({run[-1][1] for run in (exact, tail, dropped)}) == 3
        assert runs[setting, "exact"]["kept_share"] == [] and runs[setting, "2^-14"]["kept_share"] == [
            [1, 1.0],
            [2, 1.0],
        ]
        assert all(share < 0.6 for _, share in runs[setting, "2^-12"]["kept_share"])

    assert {run["model"]: run["vocabulary"] for run in results["reports"]} == {
        "untrained": 300,
        "pre-trained": 300,
    }
    assert tail_tables.meter(results).count("\n") == 2 + 2 * len(tail_training.POWERS)
    assert "| pre-training, 2 steps |" in tail_tables.training(results)
    tail_tables.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    def absent() -> None:
        raise Absent("no model here")

    monkeypatch.setattr(tail_training.smollm2, "files", absent)
    again = tail_training.run(
        dataclasses.replace(settings, parts=("wide",)), tmp_path, tmp_path / "results.json", modes
    )
    assert "wide is left out: no model here" in capsys.readouterr().out
    assert again["runs"] == results["runs"] and again["reports"] == results["reports"], "other parts stay"


def test_dropping_leaves_rows_of_the_weight_without_gradient_only_while_it_lasts() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(20, 8, generator=generator),
        torch.randn(50, 8, generator=generator).requires_grad_(),
    )
    targets = torch.zeros(20, dtype=torch.int64)

    def untouched() -> int:
        (grad,) = torch.autograd.grad(linear_cross_entropy(2 * hidden, weight, targets, tail_eps=0.5), weight)
        return int((grad == 0).all(1).sum())

    ours = gradients.dropped_grad
    with tail_training.gradient(GradMode(0.5, compensated=False)):
        assert untouched() > 10
    assert gradients.dropped_grad is ours and untouched() == 0


def test_the_screen_table_has_each_seed_and_leaves_out_what_ran_without_a_screen() -> None:
    finals = {"exact": (2.0, 2.25), "screen, 2^-14": (2.001, 2.2515)}
    runs = [
        {"setting": setting, "way": name, "seed": seed, "held_out": [[0, 9.0], [16, value]]}
        for setting in ("SFT", "pre-training")
        for name, values in finals.items()
        for seed, value in enumerate(values)
        if (setting, name) != ("pre-training", "screen, 2^-14")
    ]
    *_, row = tail_tables.screened({"runs": runs}).splitlines()
    assert row == "| SFT, 16 steps | 2.0000, 2.2500 | 2.0010, 2.2515 | 0.2500 | +0.00125 | 0.00150 |"


def test_a_curve_is_the_means_of_its_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail_training, "POINTS", 2)
    assert smoothed([(1, 4.0), (2, 2.0), (3, 1.0), (4, 2.0), (5, 7.0)]) == [(2, 3.0), (4, 1.5), (5, 7.0)]
    assert smoothed([(1, 4.0)]) == [(1, 4.0)] and smoothed([]) == []


def test_the_page_is_in_sync_with_its_results_file() -> None:
    text = tail_tables.PAGE.read_text()
    assert readme.filled(text, kinds=tail_tables.KINDS) == text, "run python -m bench.experiments.tail_tables"
    assert {kind for _, _, kind, _ in readme.BLOCK.findall(text)} == set(tail_tables.KINDS)
    screened = tail_tables.SCREEN_PAGE.read_text()
    assert readme.filled(screened, kinds=tail_tables.SCREEN_KINDS) == screened
    assert tail_tables.PLOT.name in text and tail_tables.PLOT.stat().st_size < 150_000
