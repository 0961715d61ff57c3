"""Small runs of every stage: their data, models and configurations, and what must be the same at the end of
two of them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from fastalign.stages import dpo, grpo, kto, ppo, pretrain, reward, sft
from fastalign.stages.config import TrainConfig
from tests.stages.tiny import LLAMA, lines, read_tensors, save_base, save_tokenizer, sentence, write

SCORE = """
def count(prompts, completions):
    return [text.count("a") - 0.05 * len(text) for text in completions]
"""


class Kind(NamedTuple):
    """A sort of run: a stage, and its configuration but for output_dir and resume."""

    stage: ModuleType
    configure: Callable[..., TrainConfig]


def prepare(folder: Path) -> None:
    """Write the tokenizer, the model and the rows that all runs start from."""
    folder.mkdir(parents=True)
    pairs = [
        {"prompt": sentence(n), "chosen": " good " + sentence(n + 50), "rejected": " bad " + sentence(n + 81)}
        for n in range(24)
    ]
    write(folder / "text.jsonl", [{"text": sentence(n)} for n in range(40)])
    write(folder / "held_out.jsonl", [{"text": sentence(n)} for n in range(100, 107)])
    write(folder / "pairs.jsonl", pairs)
    write(
        folder / "completions.jsonl",
        [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs],
    )
    judged = [
        {**row, "completion": row["chosen"] if n % 3 else row["rejected"], "label": n % 3 > 0}
        for n, row in enumerate(pairs)
    ]
    write(
        folder / "judged.jsonl",
        [{name: row[name] for name in ("prompt", "completion", "label")} for row in judged],
    )
    write(folder / "prompts.jsonl", [{"prompt": sentence(n)} for n in range(24)])
    (folder / "score.py").write_text(SCORE)
    save_base(folder / "base", save_tokenizer(folder / "tokenizer"), length=96)


def kinds(folder: Path) -> dict[str, Kind]:
    """Every stage; with LoRA, dropout, accumulation, evaluation and each sort of reference among them."""
    file = {path.stem: str(path) for path in folder.iterdir()}
    common: dict[str, Any] = {
        "device": "cpu",
        "learning_rate": 1e-3,
        "max_steps": 6,
        "save_every": 2,
        "batch_size": 8,
    }
    base = common | {"model": file["base"], "dtype": "float32"}
    tuned = base | {"max_length": 64}
    scratch = {
        "tokenizer": file["tokenizer"],
        "model_config": LLAMA | {"attention_dropout": 0.2},
        "sequence_length": 40,
    }
    text = {"train_data": file["text"], "eval_data": file["held_out"], "eval_every": 3}
    drawing = {
        "train_data": file["prompts"],
        "reward": file["score"] + ":count",
        "max_new_tokens": 8,
        "max_steps": 4,
    }
    grouped = {"group_size": 4, "minibatches": 2, "kl_coef": 0.05, "top_p": 0.9}
    shared: dict[str, Any] = {"ppo_epochs": 1, "value": "shared", "lora_rank": 4}
    adaptive = {"ppo_epochs": 1, "target_kl": 0.01, "kl_horizon": 8, "minibatches": 2}
    pairs: dict[str, Any] = {"train_data": file["pairs"]}
    lora: dict[str, Any] = {"lora_rank": 4, "lora_dropout": 0.1}
    return {
        "pretrain": Kind(pretrain, partial(pretrain.PretrainConfig, **common | scratch | text)),
        "pretrain, async": Kind(
            pretrain, partial(pretrain.PretrainConfig, **common | scratch | text, async_checkpoints=True)
        ),
        "sft": Kind(sft, partial(sft.SFTConfig, **tuned, train_data=file["completions"], micro_batch_size=4)),
        "sft, LoRA": Kind(sft, partial(sft.SFTConfig, **tuned, **lora, train_data=file["completions"])),
        "reward": Kind(reward, partial(reward.RewardConfig, **tuned | pairs)),
        "dpo": Kind(dpo, partial(dpo.DPOConfig, **tuned | pairs, reference="precomputed")),
        "dpo, LoRA": Kind(dpo, partial(dpo.DPOConfig, **tuned | pairs | lora)),
        "kto": Kind(kto, partial(kto.KTOConfig, **tuned, train_data=file["judged"], reference="precomputed")),
        "ppo": Kind(ppo, partial(ppo.PPOConfig, **base | drawing | adaptive)),
        "grpo": Kind(grpo, partial(grpo.GRPOConfig, **base | drawing | grouped)),
        "ppo, shared": Kind(ppo, partial(ppo.PPOConfig, **base | drawing | shared)),
    }


def differences(expected: TrainConfig, found: TrainConfig) -> list[str]:
    """How a run that was killed and resumed ended otherwise than one that was not."""
    wrong = [] if lines(found) == lines(expected) else ["metrics.jsonl has other lines"]
    names, found_names = _files(expected), _files(found)
    if names != found_names:
        wrong.append(f"files: {sorted(found_names - names)} too many, {sorted(names - found_names)} missing")
    for name in sorted(names & found_names):
        if name.endswith(".safetensors"):
            one, other = (load_file(Path(config.output_dir, name)) for config in (expected, found))
        elif name.endswith(".metadata"):
            one, other = (read_tensors(Path(config.output_dir, name).parent) for config in (expected, found))
        else:
            continue
        if one.keys() != other.keys() or not all(
            torch.equal(tensor, other[key]) for key, tensor in one.items()
        ):
            wrong.append(f"{name} holds other tensors")
    return wrong


def _files(config: TrainConfig) -> set[str]:
    return {
        str(path.relative_to(config.output_dir))
        for path in Path(config.output_dir).rglob("*")
        if path.is_file()
    }
