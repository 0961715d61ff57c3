"""Stages on chats: what ends a turn ends rollouts and is saved with the model; rows that are too long; no
code of others' is run."""

import builtins
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from fastalign import cli
from fastalign.stages import dpo, kto, merge, ppo, pretrain, reward, sft
from fastalign.stages.models import adapters, loading
from fastalign.stages.policy import rollouts
from tests.stages.tiny import LLAMA, lines, save_base, save_tokenizer, sentence, write

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
STAGES: dict[str, tuple[Any, Any]] = {
    "sft": (sft, sft.SFTConfig),
    "dpo": (dpo, dpo.DPOConfig),
    "kto": (kto, kto.KTOConfig),
    "ppo": (ppo, ppo.PPOConfig),
    "reward": (reward, reward.RewardConfig),
    "pretrain": (pretrain, pretrain.PretrainConfig),
}
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tokenizer whose template ends turns with <end> and not with its EOS, and chats and texts for each
    stage, one row too long."""
    folder = tmp_path_factory.mktemp("files")

    def chat(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    def row(number: int, as_chat: bool, length: int = 1) -> dict[str, Any]:
        asked, good, bad = (
            sentence(number) * length,
            " good " + sentence(number + 50),
            " bad " + sentence(number + 81),
        )
        values: dict[str, Any] = {"prompt": asked, "chosen": good, "rejected": bad, "completion": good}
        if as_chat:
            values = {
                name: chat("user" if name == "prompt" else "assistant", text) for name, text in values.items()
            }
        return values | {"label": number % 2 == 0, "text": asked + good}

    rows = {
        "chats": [row(n, True) for n in range(8)],
        "texts": [row(n, False) for n in range(8)],
        "long": [row(n, True, 1 + 49 * (n == 3)) for n in range(9)],
    }
    (folder / "score.py").write_text(
        "def score(prompts, completions):\n    return [float(len(text)) for text in completions]\n"
    )
    paths = {name: write(folder / f"{name}.jsonl", records) for name, records in rows.items()}
    paths["tokenizer"] = save_tokenizer(
        folder / "tokenizer", ("<eos>", "<pad>", "<s>", "<end>"), chat_template=CHAT
    )
    return paths | {
        "base": save_base(folder / "base", paths["tokenizer"], length=256),
        "reward": str(folder / "score.py") + ":score",
    }


@pytest.fixture
def make(files: dict[str, str], tmp_path: Path) -> Make:
    """A function from a stage's name and fields to a small configuration."""
    runs = itertools.count()

    def configure(stage: str, **changes: Any) -> Any:
        values: dict[str, Any] = {
            "train_data": files["chats"],
            "output_dir": str(tmp_path / f"run{next(runs)}"),
            "device": "cpu",
        }
        values |= {"batch_size": 8, "max_steps": 1, "dtype": "float64", "model": files["base"]}
        values |= {"reward": files["reward"], "max_new_tokens": 6, "ppo_epochs": 1} if stage == "ppo" else {}
        if stage == "pretrain":
            values = {**values, "model": None, "model_config": LLAMA, "tokenizer": files["tokenizer"]}
        return STAGES[stage][1](**values | changes)

    return configure


def run(stage: str, config: Any) -> Any:
    STAGES[stage][0].run(config)
    return config


def stops(config: Any) -> Any:
    return GenerationConfig.from_pretrained(Path(config.output_dir, "model")).eos_token_id


@pytest.mark.parametrize("stage", ["sft", "dpo", "kto", "ppo"])
def test_the_end_of_a_turn_goes_into_the_saved_generation_config(
    make: Make, files: dict[str, str], stage: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(files["tokenizer"])
    assert stops(run(stage, make(stage))) == tokenizer.convert_tokens_to_ids(["<eos>", "<end>"])
    assert stops(run(stage, make(stage, train_data=files["texts"]))) == tokenizer.eos_token_id


def test_the_end_of_a_turn_comes_along_with_adapters(make: Make, tmp_path: Path) -> None:
    config = run("sft", make("sft", lora_rank=2))
    assert stops(config) == [0, 3]
    merge.run(
        merge.MergeConfig(model=f"{config.output_dir}/model", output_dir=str(tmp_path / "run9" / "model"))
    )
    assert GenerationConfig.from_pretrained(tmp_path / "run9" / "model").eos_token_id == [0, 3]


@pytest.mark.parametrize(("data", "ends"), [("chats", [0, 3]), ("texts", [0])])
def test_the_end_of_a_turn_stops_rollouts(
    make: Make, files: dict[str, str], monkeypatch: pytest.MonkeyPatch, data: str, ends: list[int]
) -> None:
    seen = []
    generate = rollouts.generate

    def see(*given: Any, **options: Any) -> Any:
        seen.append(options["eos_id"])
        return generate(*given, **options)

    monkeypatch.setattr(rollouts, "generate", see)
    run("ppo", make("ppo", train_data=files[data]))
    assert seen and all(sorted(given) == ends for given in seen)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_the_choice_for_rows_that_are_too_long(
    make: Make, files: dict[str, str], stage: str
) -> None:
    limit = {"ppo": "max_prompt_length", "pretrain": "sequence_length"}.get(stage, "max_length")
    options: dict[str, Any] = {"train_data": files["long"], limit: 120}
    with pytest.raises(ValueError, match=rf"long\.jsonl, row 4: longer than {limit}=120 \(too_long=refuse"):
        run(stage, make(stage, too_long="refuse", **options))
    if stage == "pretrain":
        run(stage, make(stage, **options))  # which splits them
    with pytest.warns(
        UserWarning, match=rf"long\.jsonl, row 4: longer than {limit}=120, left out \(1 of 9 rows\)"
    ):
        config = run(stage, make(stage, **options, **({"too_long": "drop"} if stage == "pretrain" else {})))
    assert lines(config)[-1]["step"] == 1


def test_the_field_is_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    for stage in STAGES:
        with pytest.raises(SystemExit):
            cli.main([stage, "--help"])
        assert "too_long:" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_model_is_refused_without_a_question(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    def ask(*words: object) -> str:
        pytest.fail("a question was asked")

    monkeypatch.setattr(builtins, "input", ask)
    fields = {"config.json": {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}}
    fields["tokenizer_config.json"] = {
        "tokenizer_class": "Mine",
        "auto_map": {"AutoTokenizer": ["mine.Mine", None]},
    }
    (tmp_path / file).write_text(json.dumps(fields[file]))
    (tmp_path / "mine.py").write_text("raise RuntimeError('it ran')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        _ = (
            adapters.load_architecture(str(tmp_path))
            if file == "config.json"
            else loading.load_tokenizer(str(tmp_path))
        )
