"""The demo: its options, its report, and a short run from end to end without a network."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from fastalign import data
from fastalign.demo import alignment, command, heads, report, results, sentences, stage_steps
from fastalign.demo.alignment import Alignment, Policy
from fastalign.demo.heads import Head
from fastalign.demo.results import Completion
from fastalign.demo.sentences import Sample
from fastalign.demo.settings import Shape
from fastalign.demo.stage_steps import SideBySide, Step
from tests.demo.sentences import SENTENCES, archive_of, lines_of, sentence


def test_the_lexicon_is_right_on_pairs_it_orders_and_half_right_on_ties() -> None:
    texts = [("good", "bad"), ("bad", "good"), ("a film", "the film"), ("great", "dull")]
    rows = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in texts]
    assert alignment.lexicon_accuracy(rows, alignment.SentimentIntensityAnalyzer()) == 0.625


def test_mean_and_standard_error() -> None:
    found = results.mean([1.0, 2.0, 4.0, 5.0])
    assert found.value == 3.0 and math.isclose(found.error, math.sqrt(10 / 3 / 4))
    assert str(results.Mean(0.12345, 0.0056)) == "0.123 ± 0.006"


def test_the_tables_and_key_figures() -> None:
    shape = Shape(1024, 512, 1024)
    measured = [
        Head(shape, "fastalign", 1234.56, 169.64, 1.4e-6),
        Head(shape, "plain PyTorch", 2.0, None, math.nan),
    ]
    rows = heads.head_rows(measured)
    assert rows[0] == ["N 1024, H 512, V 1024", "fastalign", "1,234.6", "169.6", "4.0", "1.4e-06"]
    assert rows[1] == [
        "N 1024, H 512, V 1024",
        "plain PyTorch",
        "2.0",
        "not measured: needs Linux",
        "4.0",
        "nan",
    ]
    assert results.table(("a", "b"), [("x|y", " two\nlines ")]) == [
        "| a | b |",
        "| --- | --- |",
        "| x\\|y | two lines |",
    ]
    counts = {name: 1 for name in ("train", "held_out", "sft_train", "sft_held_out")}
    completions = [
        Completion(stage, mode, prompt, f"{stage} {mode} {prompt}", 0.0)
        for stage in ("pretrain", "sft")
        for mode, prompts in (("greedy", "p"), ("sampled", "pq"))
        for prompt in prompts
    ]
    assert report.sample_rows(completions) == [
        ("p", "greedy", "pretrain greedy p", "sft greedy p"),
        ("p", "sampled", "pretrain sampled p", "sft sampled p"),
    ]
    curves = {stage: results.Curve([(1, 6.0)], [(0, 7.0), (1, 5.5)]) for stage in ("pretrain", "sft")}
    policies = [Policy("SFT", [0.1, 0.3], [1.0, 2.0], [0.0, 0.0], [("p", "a")])]
    policies.append(Policy("DPO", [0.3, 0.7], [3.0, 3.5], [1.0, 2.0, 3.0], [("p", "b")]))
    aligned = Alignment(
        {"reward": [{"step": 1, "eval/accuracy": 0.75}]}, 0.5, {"reward_held_out": 4}, policies
    )
    assert aligned.key_figures() == [
        "Reward model: 0.750 of 4 held-out pairs in the right order; VADER's lexicon 0.500",
        "SFT: mean sentiment of held-out prompts 0.200 ± 0.100, reward model's score 1.500 ± 0.500, KL to "
        "SFT 0.000 ± 0.000 nats",
        "DPO: mean sentiment of held-out prompts 0.500 ± 0.200 (SFT's +0.300 ± 0.100), reward model's score "
        "3.250 ± 0.250, KL to SFT 2.000 ± 0.577 nats",
    ]
    steps = [
        Step(run, method, time, 1.5)
        for run in stage_steps.TITLES
        for method, time in (("fastalign", 20.0), ("plain PyTorch", 30.0))
    ]
    stages = SideBySide(steps, {"sft": 7.25}, 64, 2048)
    assert "| SFT | 7.2 | 20 | 30 | 1.50 | 1.5 | 1.5 |" in stages.report()
    assert (
        stages.key_figures()[-1]
        == "A step of PPO, rollout: fastalign 20 ms, 2 MiB; plain PyTorch 30 ms, 2 MiB"
    )
    outcome = report.Outcome(
        Path("x"), None, 1, 0, 1, counts, {}, curves, completions, aligned, stages, measured
    )
    assert set(aligned.key_figures()) < set(report.key_figures(outcome))
    assert (
        report.key_figures(outcome)[-1]
        == "Head at N 1024, H 512, V 1024: fastalign 1,235 ms, 170 MiB; plain PyTorch 2 ms"
    )


def test_the_reference_of_the_heads_is_plain_pytorch_in_fp64() -> None:
    shape = Shape(heads.ROWS_AT_ONCE + 44, 8, 50)
    hidden, weight, targets = heads._head_inputs(shape)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(wide[0] @ wide[1].t(), targets), wide)
    found = heads._true_gradients(shape)
    for grad, true in zip((found["hidden"], found["weight"]), expected, strict=True):
        assert (grad - true).abs().max() <= 100 * torch.finfo(torch.float64).eps * true.abs().max()


def test_the_head_comparison_shows_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "_peak_mib", lambda method, shape: 1.0)
    monkeypatch.setitem(heads.METHODS, "wrong", lambda *inputs: 1.01 * heads.plain_cross_entropy(*inputs))
    ours, plain, wrong = heads.measure_heads(Shape(32, 8, 50))
    assert [row.method for row in (ours, plain, wrong)] == ["fastalign", "plain PyTorch", "wrong"]
    floor = 8 * torch.finfo(torch.float32).eps
    assert (
        ours.error <= 2 * plain.error + floor
        and plain.error < 1e-5
        and math.isclose(wrong.error, 0.01, rel_tol=1e-3)
    )
    assert min(ours.milliseconds, plain.milliseconds) > 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--step", "3"], "unrecognized arguments: --step"),
        (["--epochs", "3"], "unrecognized arguments: --epochs 3"),
        (["--steps", "0"], "argument --steps: got '0', expected a whole number of at least 1"),
        (["--threads", "two"], "argument --threads: got 'two', expected a whole number of at least 1"),
        (["--seed", "-1"], "argument --seed: "),
        (["--data", "absent.zip"], "absent.zip: got no such file"),
    ],
)
def test_wrong_options_are_refused(
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        command.main(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_folder_with_anything_else_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "weights").write_text("mine")
    with pytest.raises(SystemExit):
        command.main(["--output-dir", str(tmp_path)])
    assert "which holds files, expected a new folder or that of an earlier demo" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["sft", "weights"]


def test_options_reach_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "sentences.txt"
    file.write_bytes(lines_of([sentence(number) for number in range(1020)]))
    ran: list[Any] = []
    monkeypatch.setattr(command, "run", lambda *arguments: ran.append(arguments))
    command.main(
        [
            "--output-dir",
            str(tmp_path / "out"),
            "--steps",
            "9",
            "--data",
            str(file),
            "--seed",
            "4",
            "--threads",
            "2",
        ]
    )
    settings, prepared = ran[0]
    assert settings == command.Settings(output_dir=tmp_path / "out", steps=9, data=file, seed=4, threads=2)
    assert settings.sft_steps == 3 and command.Settings().threads == 1
    assert (len(prepared.rows["train"]), len(prepared.rows["held_out"]), len(prepared.prompts)) == (
        20,
        1000,
        512,
    )


def test_sentences_without_positive_ones_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    file = tmp_path / "sentences.txt"
    file.write_bytes(lines_of([sentence for sentence in SENTENCES if sentence.rating < 0.5]))
    with pytest.raises(
        data.DataError,
        match=r"sentences.txt: got 0 positively rated sentences to tune on, 0 held out and \d+ prompts",
    ):
        command.prepare(command.Settings(tmp_path / "out", data=file, held_out=20))


def test_sentences_without_negative_ones_and_samples_without_sentiment_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    file = tmp_path / "sentences.txt"
    file.write_bytes(lines_of([sentence for sentence in SENTENCES if sentence.rating > -0.5]))
    with pytest.raises(
        data.DataError,
        match=r"got 0 pairs of positively and negatively rated sentences to train on, 0 held out and \d+",
    ):
        command.prepare(command.Settings(tmp_path / "out", data=file, held_out=20))
    monkeypatch.setattr(alignment.reward, "run", lambda config: {})
    monkeypatch.setattr(
        alignment, "sample", lambda *arguments: [Sample("p", "a", 0.0), Sample("p", "b", 0.0)]
    )
    settings = command.Settings(tmp_path / "out", data=file)
    (settings.output_dir / "rows").mkdir()
    with pytest.raises(
        data.DataError,
        match="completions of the tuned model: got 2 with 0 pairs to learn from, 0 good ones and 2 bad ones",
    ):
        alignment.align(settings, tokenizer, [], [], {})


def short_run(folder: Path, data: Path, *shapes: Shape) -> report.Outcome:
    small = {
        "held_out": 24,
        "prompts": 8,
        "new_tokens": 6,
        "sampled": 30,
        "policy_tokens": 24,
        "shapes": shapes,
    }
    settings = command.Settings(folder, steps=16, data=data, **small)  # type: ignore[arg-type]
    return command.run(settings, command.prepare(settings))


def test_a_run_leaves_a_report_and_a_second_one_replaces_it_with_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses: dict[tuple[str, str], object] = {}
    prepare = stage_steps.step

    def noted(folder: str, run: str, method: str) -> Callable[[], object]:
        call = prepare(folder, run, method)
        losses[run, method] = call()
        return call

    def peaks_of(
        target: str, calls: list[dict[str, str]]
    ) -> list[float]:  # without a process that loads all of it again
        assert target == "fastalign.demo.stage_steps:step" and all(
            (call["run"], call["method"]) in losses for call in calls
        )
        return [float(number) for number in range(len(calls))]

    monkeypatch.setattr(stage_steps, "ROUNDS", 1)
    monkeypatch.setattr(stage_steps, "peak_memories", peaks_of)
    monkeypatch.setattr(stage_steps, "step", noted)
    folder, archive = tmp_path / "out", archive_of(lines_of(SENTENCES), tmp_path / "sentences.zip")
    outcome = short_run(folder, archive, Shape(64, 16, 97))
    printed = capsys.readouterr().out
    for stage, steps in (("pretrain", 16), ("sft", 6)):
        curve = outcome.curves[stage]
        assert [step for step, _ in curve.training] == list(range(1, steps + 1))
        assert (curve.held_out[0][0], curve.held_out[-1][0]) == (0, steps)
        assert curve.held_out[-1][1] < curve.held_out[0][1], "the held-out loss falls"
        assert (folder / f"{stage}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / stage / "model" / "model.safetensors").exists()
    first, last = (outcome.curves["pretrain"].held_out[place][1] for place in (0, -1))
    vocabulary = len(PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"))
    assert abs(first - math.log(vocabulary)) < 0.1 and last < first - 0.5
    assert {
        completion.mode: sum(other.mode == completion.mode for other in outcome.completions)
        for completion in outcome.completions
    } == {
        "greedy": 12,
        "sampled": 16,
    }
    peaks = {row.method: row.peak_mib for row in outcome.heads}
    assert [row.peak_mib for row in outcome.stages.steps] == list(range(2 * len(stage_steps.TITLES)))
    assert min(row.milliseconds for row in outcome.stages.steps) > 0
    for run in stage_steps.TITLES.keys() - {"rollout"}:
        torch.testing.assert_close(
            losses[run, "fastalign"], losses[run, "plain PyTorch"], rtol=1e-4, atol=1e-6
        )
    assert list(peaks) == ["fastalign", "plain PyTorch"] and (
        sys.platform != "linux" or None not in peaks.values()
    )
    lines = (folder / "completions.jsonl").read_text().splitlines()
    assert [Completion(**json.loads(line)) for line in lines] == list(outcome.completions)

    written = (folder / "report.md").read_text()
    for line in report.key_figures(outcome):
        assert f"- {line}" in written and line in printed
    for part in (
        "![Pre-training](pretrain.png)",
        "![SFT](sft.png)",
        "N 64, H 16, V 97 | fastalign",
        "| torch | ",
        "--seed 0 --threads 1",
    ):
        assert part in written
    aligned = outcome.alignment
    assert [policy.name for policy in aligned.policies] == [
        "SFT",
        "DPO, β 0.05",
        "DPO, β 0.5",
        "KTO, β 0.05",
        "PPO, VADER",
        "PPO, reward model",
        "GRPO, VADER",
    ]
    for policy in aligned.policies:
        assert (len(policy.rewards), len(policy.scores), len(policy.kls)) == (4, 16, 16)
    sft, *tuned = aligned.policies
    assert max(map(abs, sft.kls)) < 1e-4 and all(max(policy.kls) > 1e-3 for policy in tuned)
    for name, steps in (
        ("reward", 8),
        ("dpo-0.05", 4),
        ("dpo-0.5", 4),
        ("kto", 4),
        ("ppo-vader", 1),
        ("ppo-reward", 1),
        ("grpo-vader", 1),
    ):
        assert aligned.lines[name][-1]["step"] == steps and f"--config {folder}/{name}/config.yaml" in written
    rows = {path.stem: sentences.read_rows(path) for path in (folder / "rows").iterdir()}
    held_out = {row["text"] for row in rows["held_out"]}
    assert not held_out & {row[name] for row in rows["reward_train"] for name in ("chosen", "rejected")}
    judged = {completion.prompt for completion in outcome.completions}
    assert not judged & {row["prompt"] for row in rows["prompts"]}
    assert (
        rows["pairs"]
        and rows["labels"]
        and not judged & {row["prompt"] for name in ("pairs", "labels") for row in rows[name]}
    )
    for part in (
        "![Reward against KL](reward-kl.png)",
        "![Curves](alignment.png)",
        "fastalign dpo --config",
        "## Samples of the policies",
        "fastalign ppo --config",
        "fastalign grpo --config",
        "| PPO, rollout |",
    ):
        assert part in written
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in alignment.PLOTS)
    assert {path.name for path in folder.iterdir()} == {*command.MADE, command.MARKER}
    assert f"report: {folder / 'report.md'}" in printed and "replacing" not in printed

    (folder / "data").mkdir()
    (folder / "data" / "kept").write_text("x")
    for name in ("reward", "dpo-0.5", "reference"):
        (folder / name / "stale").write_text("x")
    monkeypatch.setattr(stage_steps, "measure", lambda folder: outcome.stages.steps)
    again = short_run(folder, archive)
    assert "replacing the earlier demo" in capsys.readouterr().out and (folder / "data" / "kept").exists()
    assert (
        again.curves == outcome.curves
        and again.completions == outcome.completions
        and not list(folder.rglob("stale"))
    )
    assert again.alignment.policies == aligned.policies
