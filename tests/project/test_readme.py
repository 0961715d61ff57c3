"""README.md is short, its tables are complete, and the measured ones are those of their results files."""

import json
import re
from pathlib import Path

import pytest

import fastalign_kernels
from bench.core.operation import EAGER, OURS
from bench.methods.steps import BACKBONE, STAGES
from bench.reports import readme
from fastalign.stages.stage_configs import CONFIGS

ROOT = Path(__file__).parents[2]


README = ROOT / "README.md"


def test_a_stranger_reads_it_in_one_sitting() -> None:
    assert len(README.read_text().splitlines()) <= 105, "move details to docs/"


def test_it_names_every_public_function_and_every_command() -> None:
    named = set(re.findall(r"`(?:fastalign )?(\w+)`", README.read_text()))
    functions = {name for name in fastalign_kernels.__all__ if name.islower()}
    assert not functions - named and not {*CONFIGS} - named


def test_the_tables_are_in_sync_with_their_results_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert readme.main(["--check"]) == 0, "run python -m bench.reports.readme"
    shown = {
        kind for page in readme.PAGES for _, _, kind, _ in readme.BLOCK.findall((ROOT / page).read_text())
    }
    assert shown == {*readme.KINDS}


def test_a_table_that_was_changed_by_hand_is_found_and_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs").mkdir()
    for page in readme.PAGES:
        text = (ROOT / page).read_text()
        tables = text.index("<!-- bench/results/")
        changed = text[:tables] + re.sub(r"\| \d+\.\d+ \|", "| 99.99 |", text[tables:], count=1)
        (tmp_path / page).write_text(changed.replace(" (805) |", " (1) |", 1))
    (tmp_path / "bench").symlink_to(ROOT / "bench")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    assert readme.main(["--check"]) == 1 and readme.main([]) == 0 and readme.main(["--check"]) == 0
    for page in readme.PAGES:
        assert (tmp_path / page).read_text() == (ROOT / page).read_text()


def test_an_unknown_kind_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="table: got 'tail', expected one of summary, head, losses, sampling, steps"
    ):
        readme.filled("<!-- bench/results/x.json: tail -->\n<!-- end -->")


def row(seconds: float | None, peak: float | None = None) -> dict:
    return {
        "seconds": [] if seconds is None else [seconds] * 3,
        "peak_mib": peak,
        "refused": "",
        "errors": {"d weight": {"relative": 1e-6}},
    }


INFO = {"cpu": "A Processor", "gpu": "none", "threads": 2}
SHAPE = {"N": 256, "H": 576, "V": 49152}


def test_a_row_is_bold_where_its_least_is() -> None:
    rows = {
        "3 bare GEMMs": row(1.0),
        OURS: row(2.0, 50.0),
        EAGER: row(1.5, 1400.0),
        "torch.compile": row(None),
    }
    case = {"name": "linear_cross_entropy fp32", "shape": SHAPE, "ceilings": ["3 bare GEMMs"], "rows": rows}
    lines = readme.head({"machine_info": INFO, "cases": [case]}).splitlines()
    assert lines[0].startswith(
        "| fp32, forward and backward unless said; A Processor, 2 threads; "
        "N 256, H 576, V 49152 | fastalign | torch.compile |"
    )
    assert lines[2] == "| `linear_cross_entropy`, times 3 GEMMs | 2.00 | – | – | **1.50** | – | – |"
    assert lines[3] == "| its peak MiB beyond inputs | **50** | – | – | 1,400 | – | – |"


def test_the_summary_has_the_best_time_and_the_best_peak_of_a_row_in_bold() -> None:
    names = [f"{name} fp32" for name in ("linear_cross_entropy", "linear_logprobs")]
    names += [f"{name} fp32" for name in ("linear_dpo", "linear_kto", "linear_ppo")] + [readme.TOP_P]
    rows = {OURS: row(0.5, 300.0), EAGER: row(1.25, 1400.0), "Liger x": row(None), "Liger y": row(1.0, 200.0)}
    cases = [{"name": name, "shape": SHAPE, "rows": rows | {"3 bare GEMMs": row(0.1)}} for name in names]
    lines = readme.summary({"machine_info": INFO, "cases": cases}).splitlines()
    assert lines[2] == (
        "| `linear_cross_entropy`; N 256, H 576, V 49152 "
        "| **500** (300) | 1,250 (1,400) | – | – | – | 1,000 (**200**) |"
    )


def test_the_table_of_losses_names_what_was_measured() -> None:
    rows = {
        OURS: row(1.0),
        f"{OURS}, tail_eps 2**-14": row(0.5),
        EAGER: row(2.0),
        "LigerFusedLinearDPOLoss": row(None),
        "Liger x": row(3.0),
    }
    whole, tokens = (
        {"name": "linear_dpo fp32, tail", "shape": SHAPE, "rows": rows},
        {"N": 64, "H": 0, "V": 1024},
    )
    policy = {
        "name": "ppo_loss fp32",
        "shape": tokens,
        "rows": {OURS: row(3.0), EAGER: row(2.0), "torch.compile": row(2.5)},
    }
    other = {"name": "token_stats fp32", "shape": SHAPE, "rows": rows}
    first = {"name": "linear_dpo fp32", "shape": SHAPE, "rows": {OURS: row(None), EAGER: row(1.0)}}
    lines = readme.losses({"machine_info": INFO, "cases": [first, other, whole, policy]}).splitlines()
    assert lines[0].startswith(
        "| forward and backward, times PyTorch; fp32; A Processor, 2 threads | "
        "fastalign | with `tail_eps=2**-14` |"
    )
    assert lines[2:] == [
        "| `linear_dpo`; SmolLM2's softmax; N 256, V 49152 | 0.50 | **0.25** | – | 1.50 |",
        "| `ppo_loss`; N 65536 | 1.50 | – | **1.25** | – |",
    ]


def test_the_table_of_steps(tmp_path: Path) -> None:
    rows = {OURS: row(2.0, 700.0), EAGER: row(2.5), BACKBONE: row(1.75)}
    results = {
        "machine_info": INFO,
        "cases": [{"name": f"{stage} step fp32", "shape": SHAPE, "rows": rows} for stage in STAGES],
    }
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "results" / "x.json").write_text(json.dumps(results))
    text = readme.filled("<!-- bench/results/x.json: steps -->\nold\n<!-- end -->", tmp_path)
    assert (
        "| dpo | 2.00 (700) | 2.50 | 1.75 |\n" in text and "old" not in text and text.endswith("<!-- end -->")
    )
