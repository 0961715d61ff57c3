"""Model folders that lack weights, hold others or NaN, and weights that are not finite after training."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from fastalign.causal_lm import fuse_head
from fastalign.classifier import score_packed
from fastalign.stages import merge, ppo, pretrain, reward, sft
from fastalign.stages.policy import reward_functions
from tests.stages.tiny import lines, sentence, write

Tensors = dict[str, torch.Tensor]
NORM = "transformer.ln_f.weight"
WEIGHT = "transformer.h.1.mlp.c_fc.weight"


def changed(
    folder: str, target: Path, change: Callable[[Tensors], None], file: str = "model.safetensors"
) -> str:
    """A copy of a model folder with other weights."""
    shutil.copytree(folder, target)
    tensors = load_file(target / file)
    change(tensors)
    save_file(tensors, target / file, metadata={"format": "pt"})
    return str(target)


def without(*names: str) -> Callable[[Tensors], None]:
    def remove(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return remove


def with_value(name: str, value: float) -> Callable[[Tensors], None]:
    def put(tensors: Tensors) -> None:
        tensors[name].view(-1)[5] = value

    return put


def with_weight(name: str, *shape: int) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: torch.zeros(shape, dtype=torch.float64)})


WRONG = {
    "one missing": (
        without(WEIGHT),
        rf"lacks the weights {WEIGHT}, expected those of its config\.json's GPT2LMHeadModel",
    ),
    "tied ones missing": (
        without("transformer.wte.weight"),
        r"lacks the weights lm_head\.weight, transformer\.wte\.weight, expected",
    ),
    "another shape": (
        with_weight(NORM, 7),
        rf"has other shapes of the weights {NORM} \[7\] \(expected \[32\]\), expected",
    ),
    "a layer too many": (
        with_weight("transformer.h.2.ln_1.weight", 32),
        r"has the unknown weights transformer\.h\.2\.ln_1\.weight, exp",
    ),
    "NaN": (
        with_value(WEIGHT, math.nan),
        rf"{WEIGHT} holds 1 values of 4096 that are NaN or inf in torch\.float64, expected finite",
    ),
    "inf": (
        with_value(NORM, -math.inf),
        rf"{NORM} holds 1 values of 32 that are NaN or inf in torch\.float64, expected finite",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_folder_whose_weights_are_not_the_models_is_refused_by_name(
    tuning: Callable[..., sft.SFTConfig], base: str, tmp_path: Path, kind: str
) -> None:
    change, message = WRONG[kind]
    with pytest.raises(ValueError, match=rf"model: .*'.*wrong'.* {message}"):
        sft.run(tuning(model=changed(base, tmp_path / "wrong", change)))
    assert not Path(tuning().output_dir, "model").exists()


def test_another_models_head_is_left_out_and_a_new_classifiers_head_is_drawn(
    tuning: Callable[..., sft.SFTConfig], base: str, tmp_path: Path
) -> None:
    sft.run(tuning(model=changed(base, tmp_path / "critic", with_weight("v_head.summary.weight", 1, 32))))
    pairs = write(
        tmp_path / "pairs.jsonl",
        [{"prompt": sentence(n), "chosen": " good", "rejected": " bad"} for n in range(4)],
    )
    options: dict[str, Any] = {
        "train_data": pairs,
        "max_length": 64,
        "batch_size": 4,
        "max_steps": 1,
        "dtype": "float64",
        "device": "cpu",
    }
    first = reward.RewardConfig(model=base, output_dir=str(tmp_path / "reward"), **options)
    reward.run(first)  # a causal LM has no score.weight

    scorer = f"{tmp_path / 'reward'}/model"
    headless = changed(scorer, tmp_path / "headless", without("score.weight"))
    with pytest.raises(
        ValueError, match=r"model: got '.*headless', which lacks the weights score\.weight, expected"
    ):
        reward.run(reward.RewardConfig(model=headless, output_dir=str(tmp_path / "again"), **options))
    three = changed(scorer, tmp_path / "three", with_weight("score.weight", 3, 32))
    with pytest.raises(
        ValueError,
        match=r"model: got '.*three', which has other shapes of the weights score\.weight \[3, 32\]",
    ):
        reward.run(reward.RewardConfig(model=three, output_dir=str(tmp_path / "again"), **options))

    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": sentence(n)} for n in range(4)])
    scored: dict[str, Any] = (
        {"model": base, "max_new_tokens": 4, "output_dir": str(tmp_path / "ppo")}
        | options
        | {"train_data": prompts}
    )
    del scored["max_length"]
    with pytest.raises(ValueError, match=r"reward: got '.*headless', which lacks the weights score\.weight"):
        ppo.run(ppo.PPOConfig(**scored, reward=headless))
    with pytest.raises(
        ValueError, match=r"value_model: got '.*headless', which lacks the weights score\.weight"
    ):
        ppo.run(ppo.PPOConfig(**scored, reward=scorer, value_model=headless))


def test_wrong_weights_below_and_in_adapters_are_named(
    tuning: Callable[..., sft.SFTConfig], base: str, tmp_path: Path
) -> None:
    below = shutil.copytree(base, tmp_path / "base")
    config = tuning(model=str(below), lora_rank=2)
    sft.run(config)
    adapters = f"{config.output_dir}/model"
    name = next(iter(load_file(f"{adapters}/adapter_model.safetensors")))
    broken = changed(adapters, tmp_path / "adapters", with_value(name, math.nan), "adapter_model.safetensors")
    with pytest.raises(
        ValueError,
        match=r"model: got adapters in '.*adapters', .*lora_A.* holds 1 values of 64 that are NaN or inf",
    ):
        sft.run(tuning(model=broken))
    shutil.rmtree(below)
    changed(base, below, without(NORM))
    with pytest.raises(ValueError, match=rf"model: got '.*base', which lacks the weights {NORM}"):
        merge.run(merge.MergeConfig(model=adapters, output_dir=str(tmp_path / "merged")))
    shutil.rmtree(below)
    changed(base, below, with_value(NORM, 1e6))
    with pytest.raises(
        ValueError,
        match=rf"model: got '.*base', of which {NORM} holds 1 values of 32 that are NaN or inf",
    ):
        merge.run(merge.MergeConfig(model=adapters, output_dir=str(tmp_path / "merged"), dtype="float16"))
    assert not (tmp_path / "merged").exists()


def test_nan_is_told_as_nan_where_a_head_is_fused_or_a_classifier_packed(base: str) -> None:
    language_model = AutoModelForCausalLM.from_pretrained(base)
    classifier = AutoModelForSequenceClassification.from_config(
        AutoConfig.from_pretrained(base, num_labels=1)
    )
    for model, prepare in ((language_model, fuse_head), (classifier, score_packed)):
        with torch.no_grad():
            model.get_parameter(WEIGHT)[3, 4] = math.nan
        expected = (
            rf"model: got {type(model).__name__}, of which {WEIGHT} holds 1 values of 4096 "
            r"that are NaN or inf .*, expected finite numbers"
        )
        with pytest.raises(ValueError, match=expected):
            prepare(model)


def test_weights_that_are_not_finite_are_not_saved(
    pretraining: Callable[..., pretrain.PretrainConfig],
) -> None:
    several: list[dict[str, Any]] = [
        {},
        {"save_every": 1},
        {"eval_data": None},
        {"eval_data": None, "save_every": 1},
    ]
    for options in several:
        config = pretraining(max_steps=1, learning_rate=1e38, **options)
        with pytest.raises(
            FloatingPointError,
            match=r"step 1: .*weight holds \d+ values of \d+ that are NaN or inf .* neither a checkpoint nor",
        ):
            pretrain.run(config)
        assert sorted(path.name for path in Path(config.output_dir).iterdir()) == [
            "config.yaml",
            "lock",
            "metrics.jsonl",
        ]


def test_a_checkpoint_stays_where_a_later_steps_weights_are_not_finite(
    pretraining: Callable[..., pretrain.PretrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = torch.optim.AdamW.step
    steps = []

    def broken_at_3(self: torch.optim.AdamW, closure: None = None) -> None:
        step(self, closure)
        steps.append(1)
        if len(steps) == 3:
            self.param_groups[0]["params"][0].data.view(-1)[0] = math.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", broken_at_3)
    config = pretraining(save_every=1, max_steps=4)
    with pytest.raises(FloatingPointError, match="step 3: "):
        pretrain.run(config)
    assert sorted(path.name for path in Path(config.output_dir, "checkpoints").iterdir()) == [
        "step-00000001",
        "step-00000002",
    ]
    monkeypatch.undo()
    assert (
        pretrain.run(pretraining(save_every=1, max_steps=4, output_dir=config.output_dir, resume=True))[
            "step"
        ]
        == 4
    )
    assert [line["step"] for line in lines(config)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dtype": "float16"},
            "dtype: Value error, got float16, expected bf16=true or dtype=bfloat16: the stages have no loss "
            "scale",
        ),
        ({"dtype": "fp16"}, "got fp16, expected bf16=true or dtype=bfloat16"),
        (
            {"fp16": True},
            "fp16: got the key fp16, expected bf16=true or dtype=bfloat16: the stages have no loss scale",
        ),
    ],
)
def test_fp16_is_refused_with_what_to_use(
    pretraining: Callable[..., pretrain.PretrainConfig], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as refused:
        pretraining(**changes)
    assert message.removeprefix("dtype: Value error, ") in str(refused.value)


RETURNED: list[tuple[Any, str]] = [
    (None, r"got None \(NoneType\) from my\.py:score, expected a list of 2 numbers"),
    (0.5, r"got 0\.5 \(float\) from my\.py:score, expected a list of 2 numbers"),
    ("12", r"got '12' \(str\) from my\.py:score, expected a list of 2 numbers"),
    ({0: 1.0, 1: 2.0}, r"got \{0: 1\.0, 1: 2\.0\} \(dict\) from my\.py:score, expected a list of 2 numbers"),
    ({0.5, 1.5}, r"got \{.*\} \(set\) from my\.py:score, expected a list of 2 numbers"),
    (torch.tensor(1.0), r"got tensor\(1\.\) \(Tensor\) from my\.py:score, expected a list of 2 numbers"),
    ([1.0], r"got 1 scores from my\.py:score, expected 2"),
    ([1.0, 2.0, 3.0], r"got 3 scores from my\.py:score, expected 2"),
    (
        [1.0, None],
        r"got None \(NoneType\) from my\.py:score for completion 2 of 2, ' bad', expected a finite number",
    ),
    (
        [1.0, "2"],
        r"got '2' \(str\) from my\.py:score for completion 2 of 2, ' bad', expected a finite number",
    ),
    (
        [[1.0, 2.0], 3.0],
        r"got \[1\.0, 2\.0\] \(list\) from my\.py:score for completion 1 of 2, ' good', expected",
    ),
    (
        torch.ones(2, 2),
        r"got tensor\(\[1\., 1\.\]\) \(Tensor\) from my\.py:score for completion 1 of 2, ' good', expected",
    ),
    (
        [1j, 1.0],
        r"got 1j \(complex\) from my\.py:score for completion 1 of 2, ' good', expected a finite number",
    ),
    (
        [10**400, 1.0],
        r"got 1000.* \(int\) from my\.py:score for completion 1 of 2, ' good', expected a finite number",
    ),
    ([1.0, math.nan], r"got nan from my\.py:score for ' bad', expected a finite number"),
    ([1.0, -math.inf], r"got -inf from my\.py:score for ' bad', expected a finite number"),
]


class Words:
    """A tokenizer of two completions."""

    def batch_decode(self, completions: list[list[int]], *, skip_special_tokens: bool) -> list[str]:
        return [[" good", " bad"][ids[0]] for ids in completions]


class Prompt:
    row = {"prompt": "x"}


@pytest.mark.parametrize(("returned", "message"), RETURNED)
def test_what_a_reward_function_returned_is_named_where_it_is_no_number(returned: Any, message: str) -> None:
    function = reward_functions.Function("my.py:score", lambda prompts, completions: returned)
    score: Any = reward_functions.by_function(function, Words())
    with pytest.raises(ValueError, match=f"^reward: {message}"):
        score([Prompt(), Prompt()], [[0], [1]])


@pytest.mark.parametrize(
    "returned", [[1, 2.0], (True, 2), torch.tensor([1, 2]), torch.tensor([[1.0], [2.0]]), iter([1.0, 2.0])]
)
def test_lists_tensors_and_iterators_of_numbers_are_scores(returned: Any) -> None:
    score: Any = reward_functions.by_function(
        reward_functions.Function("f", lambda prompts, completions: returned), Words()
    )
    assert score([Prompt(), Prompt()], [[0], [1]]).tolist() == [1.0, 2.0]
