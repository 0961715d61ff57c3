"""The demo: its text and where that comes from, what is made of it, the report, and a short run from end to
end without a network."""

import hashlib
import io
import json
import math
import random
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from fastalign import data, demo, demo_align, demo_data, demo_report, demo_steps
from fastalign.demo_align import Alignment, Policy
from fastalign.demo_data import CHAT_TEMPLATE, Sample, Sentence, cut, fetch, read_sentences, split
from fastalign.demo_report import Completion, Head, Shape
from fastalign.demo_steps import SideBySide, Step
from fastalign.stages.tokenizer import train_tokenizer

GOOD = ["warm", "bright", "lovely", "great", "fine"]
BAD = ["dull", "awful", "boring", "bad", "poor"]
NEUTRAL = [
    "the",
    "film",
    "a",
    "story",
    "of",
    "actors",
    "and",
    "scenes",
    "in",
    "it's",
    "well-made",
    "(2002)",
    "Touché",
    "café",
    "–",
]


def sentence(number: int) -> Sentence:
    """6 to 14 words whose sentiment and rating agree; no two alike."""
    chance = random.Random(number)
    words = chance.choices(NEUTRAL + (GOOD if number % 2 else BAD), k=chance.randrange(6, 15))
    return Sentence((number % 7 + 1) / 2 * (1 if number % 2 else -1), f"{' '.join(words)} {number}.")


SENTENCES = [sentence(number) for number in range(160)]


def lines_of(sentences: list[Sentence]) -> bytes:
    """As in the original: CRLF, none after the last line."""
    return "\r\n".join(
        f"{number}\t{own.rating}\t{own.text}" for number, own in enumerate(sentences, 1)
    ).encode()


def archive_of(
    content: bytes, path: Path, *, tar_name: str = "hutto_ICWSM_2014.tar.gz", name: str = demo_data.INNER_FILE
) -> Path:
    """A zip laid out as vaderSentiment's source distribution."""
    tar_bytes = io.BytesIO()
    with tarfile.open(fileobj=tar_bytes, mode="w:gz") as tar:
        for member, own in (("_README_.txt", b"read me"), (name, content)):
            info = tarfile.TarInfo(f"hutto_ICWSM_2014/{member}")
            info.size = len(own)
            tar.addfile(info, io.BytesIO(own))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("vaderSentiment-0.5/setup.py", "")
        archive.writestr(f"vaderSentiment-0.5/additional_resources/{tar_name}", tar_bytes.getvalue())
    return path


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([own.text for own in SENTENCES], 400, chat_template=CHAT_TEMPLATE)


def test_sentences_are_read_from_the_archive_and_from_the_file_in_it(tmp_path: Path) -> None:
    archive = archive_of(lines_of(SENTENCES), tmp_path / "any-name.zip")
    file = tmp_path / "sentences.txt"
    file.write_bytes(lines_of(SENTENCES))
    assert read_sentences(archive) == read_sentences(file) == SENTENCES
    assert any("Touché" in own.text for own in SENTENCES)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"7\t1.5", "line 3 has 2 fields, not id, rating and text"),
        (b"7\t1.5\tone\ttwo", "line 3 has 4 fields"),
        (b"7\thigh\ttext", "line 3 has the rating 'high', not a number"),
        (b"7\tnan\ttext", "line 3 has the rating nan, outside [-4, 4]"),
        (b"7\t4.5\ttext", "line 3 has the rating 4.5, outside [-4, 4]"),
        (b"7\t1.5\t  ", "line 3 has no text"),
        (b"7\t1.5\tTouch\xe9", "line 3 is not UTF-8"),
        (b"", "line 3 has 1 fields"),
    ],
)
def test_odd_lines_are_refused_by_number(tmp_path: Path, line: bytes, fault: str) -> None:
    path = archive_of(b"1\t1.5\tone\r\n2\t-1.5\ttwo\r\n" + line + b"\r\n4\t0\tfour", tmp_path / "odd.zip")
    with pytest.raises(data.DataError) as refused:
        read_sentences(path)
    assert f"odd.zip: {fault}" in str(refused.value)


def test_of_many_odd_lines_five_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    file = tmp_path / "odd.txt"
    file.write_bytes(b"1\t1\tgood\n" + b"odd\n" * 7)
    with pytest.raises(
        data.DataError, match=r"line 2 has.*line 6 has 1 fields, not id, rating and text; and 2 more$"
    ):
        read_sentences(file)


def test_files_that_hold_no_sentences_are_refused(tmp_path: Path) -> None:
    content = lines_of(SENTENCES)
    empty = tmp_path / "empty.txt"
    empty.write_bytes(b"")
    for path, fault in [
        (tmp_path / "absent.zip", "no such file"),
        (empty, "no sentences"),
        (
            archive_of(content, tmp_path / "a.zip", tar_name="other.tar.gz"),
            "no hutto_ICWSM_2014.tar.gz in it",
        ),
        (archive_of(content, tmp_path / "b.zip", name="other.txt"), f"no {demo_data.INNER_FILE} in its"),
    ]:
        with pytest.raises(data.DataError) as refused:
            read_sentences(path)
        assert str(refused.value).startswith(f"{path}: {fault}")


def stand_in_for_pip(monkeypatch: pytest.MonkeyPatch, output: str, content: bytes | None) -> list[list[str]]:
    commands = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if content is not None:
            Path(command[command.index("--dest") + 1], demo_data.ARCHIVE).write_bytes(content)
        return subprocess.CompletedProcess(command, int(content is None), output)

    monkeypatch.setattr(demo_data.subprocess, "run", run)
    return commands


def test_the_archive_is_fetched_once_and_again_when_it_was_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_data, "SHA256", hashlib.sha256(b"whole").hexdigest())
    commands = stand_in_for_pip(monkeypatch, "", b"whole")
    folder = tmp_path / "data"
    archive = fetch(folder)
    assert archive.read_bytes() == b"whole" and fetch(folder) == archive and len(commands) == 1
    assert (
        commands[0][:4] == [sys.executable, "-m", "pip", "download"]
        and commands[0][-1] == "vaderSentiment==0.5"
    )
    assert "--no-deps" in commands[0]
    archive.write_bytes(b"who")
    assert fetch(folder).read_bytes() == b"whole" and len(commands) == 2


def test_what_cannot_be_fetched_is_refused_in_pips_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in_for_pip(monkeypatch, "No matching distribution found\n", None)
    with pytest.raises(
        ValueError,
        match=r"(?s)pip could not fetch vaderSentiment==0.5; give .*--data FILE.*No matching distribution found",
    ):
        fetch(tmp_path)
    stand_in_for_pip(monkeypatch, "", b"something else")
    with pytest.raises(ValueError, match=r"not the vaderSentiment-0.5.zip that the demo knows"):
        fetch(tmp_path)


def test_the_split_holds_out_1000_sentences_that_are_not_trained_on() -> None:
    sentences = [Sentence(1.0, f"number {number}") for number in range(1200)]
    sentences += [Sentence(2.0, "number 3"), Sentence(0.0, "number 1100")]
    train, held_out = split(sentences, 1000)
    assert len(held_out) == 1000 and len(train) == 202
    assert sorted(train + held_out) == sorted(sentences)
    assert not {own.text for own in train} & {own.text for own in held_out}
    random.seed(9)
    assert split(sentences, 1000) == (train, held_out)
    assert held_out != sentences[:1000] and {own.text for own in held_out} != {
        own.text for own in sentences[:1000]
    }
    with pytest.raises(ValueError, match=r"held_out: 1198 of 1198 sentences that occur once leaves none"):
        split(sentences, 1198)


def test_the_tokenizer_gives_any_text_back(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    assert len(tokenizer) == 400
    for text in [
        "the film",
        "  two  spaces ,  a , b .",
        "Touché – 日本語 🙂\n\ttabs",
        "don't 'quote' ( 2002 )",
        SENTENCES[5].text,
    ]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids[1:]) == text
    again = train_tokenizer([own.text for own in SENTENCES], 400, chat_template=CHAT_TEMPLATE)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert (
        loaded("the film")["input_ids"] == tokenizer("the film")["input_ids"]
        and loaded.chat_template == tokenizer.chat_template
    )


def test_the_chat_template_marks_the_answer_and_starts_like_a_plain_prompt(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    chat = [{"role": "user", "content": "the film is"}, {"role": "assistant", "content": " great."}]
    asked = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True)["input_ids"]
    assert asked == tokenizer("the film is")["input_ids"]
    rows = Dataset.from_list([{"messages": chat}])
    (example,) = data.tokenize_sft(rows, tokenizer, max_length=64)
    answer = tokenizer.encode(" great.", add_special_tokens=False) + [tokenizer.eos_token_id]
    assert example.input_ids == asked + answer
    assert example.trained == [False] * len(asked) + [True] * len(answer)


def test_prompt_and_continuation_tokenize_to_what_the_whole_does(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [own.text for own in SENTENCES] + [
        "a  film   of  wide   spaces  in it  all",
        "unseen wörds, 日本語 too - and the film's end",
    ]
    for text in texts:
        parts = cut(tokenizer, text)
        assert parts is not None
        prompt, continuation = (tokenizer.encode(part, add_special_tokens=False) for part in parts)
        assert parts[0] + parts[1] == text and prompt + continuation == tokenizer.encode(
            text, add_special_tokens=False
        )
        assert len(prompt) >= 5
        assert parts[1].startswith(" ") and not parts[1].startswith("  "), "the cut is in front of a word"
        shorter = text.rfind(" ", 0, len(parts[0]))  # no earlier word would do
        assert shorter < 0 or len(tokenizer.encode(text[:shorter], add_special_tokens=False)) < 5
    assert cut(tokenizer, "the film") is None and cut(tokenizer, "x" * 40) is None


def test_the_tuned_rows_are_of_positive_sentences_only(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = demo_data.chats_of(
        [
            *SENTENCES,
            Sentence(0.5, SENTENCES[1].text),
            Sentence(0.49, SENTENCES[1].text),
            Sentence(4, "Great"),
        ],
        tokenizer,
    )
    said = ["".join(turn["content"] for turn in row["messages"]) for row in rows]
    assert said == [*(own.text for own in SENTENCES if own.rating >= 0.5), SENTENCES[1].text]
    assert {tuple(turn["role"] for turn in row["messages"]) for row in rows} == {("user", "assistant")}


def test_rated_pairs_set_good_sentences_against_bad_ones() -> None:
    sentences = [
        Sentence(rating, f"{rating} {number}") for number in range(5) for rating in (-2, -0.5, -0.4, 0.4, 0.5)
    ]
    rows = demo_data.rated_pairs(sentences, rounds=3, seed=1)
    assert len(rows) == 15 and all(row["prompt"] == "\n" and row["chosen"].startswith("0.5 ") for row in rows)
    assert {row["rejected"].split()[0] for row in rows} == {"-2", "-0.5"}
    for first in range(0, 15, 5):
        own = rows[first : first + 5]
        assert len({row["chosen"] for row in own}) == len({row["rejected"] for row in own}) == 5
    assert (
        rows
        == demo_data.rated_pairs(sentences, rounds=3, seed=1)
        != demo_data.rated_pairs(sentences, rounds=3, seed=2)
    )


def test_prompts_to_learn_from_are_none_of_those_to_judge_by(tokenizer: PreTrainedTokenizerFast) -> None:
    parts = [cut(tokenizer, own.text) for own in SENTENCES]
    held_out = {part[0] for part in parts[:40] if part is not None}
    found = demo_data.prompts_of(SENTENCES, tokenizer, besides=held_out, most=1000, seed=0)
    assert len(found) == len(set(found)) > 50 and sorted(found) == sorted(
        {part[0] for part in parts if part is not None} - held_out
    )
    assert demo_data.prompts_of(SENTENCES, tokenizer, besides=held_out, most=7, seed=0) == found[:7]


def test_samples_become_pairs_and_labels_by_their_sentiment() -> None:
    samples = [
        Sample("p", text, score)
        for text, score in (("a", 0.3), ("b", 0.9), ("c", -0.5), ("d", 0.0), ("e", 0.05))
    ]
    samples += [Sample("q", "f", 0.4), Sample("q", "g", 0.21), Sample("r", "h", 0.5)]
    assert demo_data.preferred(samples) == [
        {"prompt": "p", "chosen": "b", "rejected": "c"},
        {"prompt": "p", "chosen": "a", "rejected": "d"},
    ]
    labels = [(row["prompt"], row["completion"], row["label"]) for row in demo_data.labels_of(samples)]
    assert labels == [("p", "b", True), ("p", "c", False), ("p", "d", False), ("r", "h", True)]


def test_the_lexicon_is_right_on_pairs_it_orders_and_half_right_on_ties() -> None:
    texts = [("good", "bad"), ("bad", "good"), ("a film", "the film"), ("great", "dull")]
    rows = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in texts]
    assert demo_align.lexicon_accuracy(rows, demo_align.SentimentIntensityAnalyzer()) == 0.625


def test_mean_and_standard_error() -> None:
    found = demo_report.mean([1.0, 2.0, 4.0, 5.0])
    assert found.value == 3.0 and math.isclose(found.error, math.sqrt(10 / 3 / 4))
    assert str(demo_report.Mean(0.12345, 0.0056)) == "0.123 ± 0.006"


def test_the_tables_and_key_figures() -> None:
    shape = Shape(1024, 512, 1024)
    heads = [
        Head(shape, "fastalign", 1234.56, 169.64, 1.4e-6),
        Head(shape, "plain PyTorch", 2.0, None, math.nan),
    ]
    rows = demo_report.head_rows(heads)
    assert rows[0] == ["N 1024, H 512, V 1024", "fastalign", "1,234.6", "169.6", "4.0", "1.4e-06"]
    assert rows[1] == [
        "N 1024, H 512, V 1024",
        "plain PyTorch",
        "2.0",
        "not measured: needs Linux",
        "4.0",
        "nan",
    ]
    assert demo_report.table(("a", "b"), [("x|y", " two\nlines ")]) == [
        "| a | b |",
        "| --- | --- |",
        "| x\\|y | two lines |",
    ]
    counts = {name: 1 for name in ("train", "held_out", "sft_train", "sft_held_out")}
    completions = [
        Completion(stage, way, prompt, f"{stage} {way} {prompt}", 0.0)
        for stage in ("pretrain", "sft")
        for way, prompts in (("greedy", "p"), ("sampled", "pq"))
        for prompt in prompts
    ]
    assert demo_report.sample_rows(completions) == [
        ("p", "greedy", "pretrain greedy p", "sft greedy p"),
        ("p", "sampled", "pretrain sampled p", "sft sampled p"),
    ]
    curves = {stage: demo_report.Curve([(1, 6.0)], [(0, 7.0), (1, 5.5)]) for stage in ("pretrain", "sft")}
    policies = [Policy("SFT", [0.1, 0.3], [1.0, 2.0], [0.0, 0.0], [("p", "a")])]
    policies.append(Policy("DPO", [0.3, 0.7], [3.0, 3.5], [1.0, 2.0, 3.0], [("p", "b")]))
    alignment = Alignment(
        {"reward": [{"step": 1, "eval/accuracy": 0.75}]}, 0.5, {"reward_held_out": 4}, policies
    )
    assert alignment.key_figures() == [
        "Reward model: 0.750 of 4 held-out pairs in the right order; VADER's lexicon 0.500",
        "SFT: mean sentiment of held-out prompts 0.200 ± 0.100, reward model's score 1.500 ± 0.500, KL to SFT 0.000 ± 0.000 nats",
        "DPO: mean sentiment of held-out prompts 0.500 ± 0.200 (SFT's +0.300 ± 0.100), reward model's score 3.250 ± 0.250, "
        "KL to SFT 2.000 ± 0.577 nats",
    ]
    steps = [
        Step(run, method, time, 1.5)
        for run in demo_steps.TITLES
        for method, time in (("fastalign", 20.0), ("plain PyTorch", 30.0))
    ]
    stages = SideBySide(steps, {"sft": 7.25}, 64, 2048)
    assert "| SFT | 7.2 | 20 | 30 | 1.50 | 1.5 | 1.5 |" in stages.report()
    assert (
        stages.key_figures()[-1]
        == "A step of PPO, rollout: fastalign 20 ms, 2 MiB; plain PyTorch 30 ms, 2 MiB"
    )
    outcome = demo_report.Outcome(
        Path("x"), None, 1, 0, 1, counts, {}, curves, completions, alignment, stages, heads
    )
    assert set(alignment.key_figures()) < set(demo_report.key_figures(outcome))
    assert (
        demo_report.key_figures(outcome)[-1]
        == "Head at N 1024, H 512, V 1024: fastalign 1,235 ms, 170 MiB; plain PyTorch 2 ms"
    )


def test_the_reference_of_the_heads_is_plain_pytorch_in_fp64() -> None:
    shape = Shape(demo_report.ROWS_AT_ONCE + 44, 8, 50)
    hidden, weight, targets = demo_report._head_inputs(shape)
    wide = [own.detach().double().requires_grad_() for own in (hidden, weight)]
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(wide[0] @ wide[1].t(), targets), wide)
    found = demo_report._true_gradients(shape)
    for own, true in zip((found["hidden"], found["weight"]), expected, strict=True):
        assert (own - true).abs().max() <= 100 * torch.finfo(torch.float64).eps * true.abs().max()


def test_the_head_comparison_shows_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_report, "_peak_mib", lambda method, shape: 1.0)
    monkeypatch.setitem(
        demo_report.METHODS, "wrong", lambda *inputs: 1.01 * demo_report.plain_cross_entropy(*inputs)
    )
    ours, plain, wrong = demo_report.measure_heads(Shape(32, 8, 50))
    assert [own.method for own in (ours, plain, wrong)] == ["fastalign", "plain PyTorch", "wrong"]
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
        (["--steps", "0"], "argument --steps: '0' is not a whole number from 1 on"),
        (["--threads", "two"], "argument --threads: 'two' is not a whole number from 1 on"),
        (["--seed", "-1"], "argument --seed: "),
        (["--data", "absent.zip"], "absent.zip: no such file"),
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
        demo.main(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_folder_with_anything_else_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "weights").write_text("mine")
    with pytest.raises(SystemExit):
        demo.main(["--output-dir", str(tmp_path)])
    assert "holds something else than an earlier demo" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["sft", "weights"]


def test_options_reach_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "sentences.txt"
    file.write_bytes(lines_of([sentence(number) for number in range(1020)]))
    ran: list[Any] = []
    monkeypatch.setattr(demo, "run", lambda *arguments: ran.append(arguments))
    demo.main(
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
    assert settings == demo.Settings(output_dir=tmp_path / "out", steps=9, data=file, seed=4, threads=2)
    assert settings.sft_steps == 3 and demo.Settings().threads == 1
    assert (len(prepared.rows["train"]), len(prepared.rows["held_out"]), len(prepared.prompts)) == (
        20,
        1000,
        512,
    )


def test_sentences_without_positive_ones_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    file = tmp_path / "sentences.txt"
    file.write_bytes(lines_of([own for own in SENTENCES if own.rating < 0.5]))
    with pytest.raises(
        data.DataError,
        match=r"sentences.txt: 0 sentences to tune on, 0 held out and \d+ prompts; at least 1, 1 and 2",
    ):
        demo.prepare(demo.Settings(tmp_path / "out", data=file, held_out=20))


def test_sentences_without_negative_ones_and_samples_without_sentiment_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    file = tmp_path / "sentences.txt"
    file.write_bytes(lines_of([own for own in SENTENCES if own.rating > -0.5]))
    with pytest.raises(
        data.DataError,
        match=r"0 pairs of positively and negatively rated sentences to train on, 0 held out and \d+ prompts",
    ):
        demo.prepare(demo.Settings(tmp_path / "out", data=file, held_out=20))
    monkeypatch.setattr(demo_align.reward, "run", lambda config: {})
    monkeypatch.setattr(
        demo_align, "sample", lambda *arguments: [Sample("p", "a", 0.0), Sample("p", "b", 0.0)]
    )
    settings = demo.Settings(tmp_path / "out", data=file)
    (settings.output_dir / "rows").mkdir()
    with pytest.raises(
        data.DataError,
        match="2 completions by the tuned model: 0 pairs to learn from, 0 good ones and 2 others",
    ):
        demo_align.align(settings, tokenizer, [], [], {})


def short_run(folder: Path, data: Path, *shapes: Shape) -> demo_report.Outcome:
    small = {
        "held_out": 24,
        "prompts": 8,
        "new_tokens": 6,
        "sampled": 30,
        "policy_tokens": 24,
        "shapes": shapes,
    }
    settings = demo.Settings(folder, steps=24, data=data, **small)  # type: ignore[arg-type]
    return demo.run(settings, demo.prepare(settings))


def test_a_run_leaves_a_report_and_a_second_one_replaces_it_with_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses: dict[tuple[str, str], object] = {}
    prepare = demo_steps.step

    def noted(folder: str, run: str, method: str) -> Callable[[], object]:
        call = prepare(folder, run, method)
        losses[run, method] = call()
        return call

    def peaks_of(
        target: str, calls: list[dict[str, str]]
    ) -> list[float]:  # without a process that loads all of it again
        assert target == "fastalign.demo_steps:step" and all(
            (call["run"], call["method"]) in losses for call in calls
        )
        return [float(number) for number in range(len(calls))]

    monkeypatch.setattr(demo_steps, "ROUNDS", 1)
    monkeypatch.setattr(demo_steps, "peak_memories", peaks_of)
    monkeypatch.setattr(demo_steps, "step", noted)
    folder, archive = tmp_path / "out", archive_of(lines_of(SENTENCES), tmp_path / "sentences.zip")
    outcome = short_run(folder, archive, Shape(64, 16, 97))
    printed = capsys.readouterr().out
    for stage, steps in (("pretrain", 24), ("sft", 9)):
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
        own.way: sum(other.way == own.way for other in outcome.completions) for own in outcome.completions
    } == {
        "greedy": 12,
        "sampled": 16,
    }
    peaks = {own.method: own.peak_mib for own in outcome.heads}
    assert [own.peak_mib for own in outcome.stages.steps] == list(range(2 * len(demo_steps.TITLES)))
    assert min(own.milliseconds for own in outcome.stages.steps) > 0
    for run in demo_steps.TITLES.keys() - {"rollout"}:
        torch.testing.assert_close(
            losses[run, "fastalign"], losses[run, "plain PyTorch"], rtol=1e-4, atol=1e-6
        )
    assert list(peaks) == ["fastalign", "plain PyTorch"] and (
        sys.platform != "linux" or None not in peaks.values()
    )
    lines = (folder / "completions.jsonl").read_text().splitlines()
    assert [Completion(**json.loads(line)) for line in lines] == list(outcome.completions)

    report = (folder / "report.md").read_text()
    for line in demo_report.key_figures(outcome):
        assert f"- {line}" in report and line in printed
    for part in (
        "![Pre-training](pretrain.png)",
        "![SFT](sft.png)",
        "N 64, H 16, V 97 | fastalign",
        "| torch | ",
        "--seed 0 --threads 1",
    ):
        assert part in report
    alignment = outcome.alignment
    assert [policy.name for policy in alignment.policies] == [
        "SFT",
        "DPO, β 0.05",
        "DPO, β 0.5",
        "KTO, β 0.05",
        "PPO, VADER",
        "PPO, reward model",
    ]
    for policy in alignment.policies:
        assert (len(policy.rewards), len(policy.scores), len(policy.kls)) == (4, 16, 16)
    sft, *others = alignment.policies
    assert max(map(abs, sft.kls)) < 1e-4 and all(max(policy.kls) > 1e-3 for policy in others)
    for name, steps in (
        ("reward", 12),
        ("dpo-0.05", 7),
        ("dpo-0.5", 7),
        ("kto", 7),
        ("ppo-vader", 1),
        ("ppo-reward", 1),
    ):
        assert (
            alignment.lines[name][-1]["step"] == steps and f"--config {folder}/{name}/config.yaml" in report
        )
    rows = {path.stem: demo_data.read_rows(path) for path in (folder / "rows").iterdir()}
    held_out = {row["text"] for row in rows["held_out"]}
    assert not held_out & {row[name] for row in rows["reward_train"] for name in ("chosen", "rejected")}
    judged = {own.prompt for own in outcome.completions}
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
        "| PPO, rollout |",
    ):
        assert part in report
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in demo_align.PLOTS)
    assert {path.name for path in folder.iterdir()} == {*demo.MADE, demo.MARKER}
    assert f"report: {folder / 'report.md'}" in printed and "replacing" not in printed

    (folder / "data").mkdir()
    (folder / "data" / "kept").write_text("x")
    for name in ("reward", "dpo-0.5", "reference"):
        (folder / name / "stale").write_text("x")
    monkeypatch.setattr(demo_steps, "measure", lambda folder: outcome.stages.steps)
    again = short_run(folder, archive)
    assert "replacing the earlier demo" in capsys.readouterr().out and (folder / "data" / "kept").exists()
    assert (
        again.curves == outcome.curves
        and again.completions == outcome.completions
        and not list(folder.rglob("stale"))
    )
    assert again.alignment.policies == alignment.policies
