"""Small runs of every stage that are to be the same on one process and on ranks that share a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from fastalign.stages import dpo, grpo, kto, ppo, pretrain, reward, sft
from fastalign.stages.models import loading
from tests.stages.tiny import LLAMA, save_base, save_tokenizer, sentence, write

STAGES: dict[str, Any] = {
    "pretrain": (pretrain, pretrain.PretrainConfig, "text"),
    "sft": (sft, sft.SFTConfig, "answers"),
    "reward": (reward, reward.RewardConfig, "pairs"),
    "dpo": (dpo, dpo.DPOConfig, "pairs"),
    "kto": (kto, kto.KTOConfig, "judged"),
    "ppo": (ppo, ppo.PPOConfig, "prompts"),
    "grpo": (grpo, grpo.GRPOConfig, "prompts"),
}


class Case(NamedTuple):
    """A run of a stage: its fields, and those of the sharded run alone."""

    stage: str
    options: Mapping[str, Any] = {}
    sharded: Mapping[str, Any] = {}

    def layout(self, ranks: int) -> dict[str, int]:
        """Two ranks share a model. With tp these share its layers, and of four ranks two share a part."""
        return {"dp_shard": 2 if "tp" not in self.sharded else ranks // 2}


NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
# GPT-2 with a tied embedding in fp64, but for the Llamas, whose norms are in fp32.
CASES = {
    "pretrain": Case("pretrain", {"model_config": LLAMA | {"tie_word_embeddings": False}, "model": None}),
    "sft": Case("sft", {"gradient_checkpointing": True}),
    "sft, untied, offloaded": Case("sft", {"model": "llama"}, {"cpu_offload": True}),
    "sft, LoRA, tied head too": Case("sft", {"lora_rank": 4, "lora_targets": ["c_attn", "lm_head"]}),
    "reward": Case("reward", {"center_coefficient": 0.1}),
    "dpo": Case("dpo"),
    "dpo, LoRA, head too": Case(
        "dpo", {"model": "llama", "lora_rank": 4, "lora_targets": ["q_proj", "lm_head"]}
    ),
    "dpo, without a reference": Case("dpo", {"loss_type": "orpo"}),
    "kto": Case("kto"),
    "kto, LoRA, precomputed": Case("kto", {"lora_rank": 4, "reference": "precomputed"}),
    "ppo": Case("ppo", {"reward": "reward_model", "rescore": True}),
    "grpo": Case("grpo", {"group_size": 4, "kl_coef": 0.1, "top_p": 0.9, "loss_type": "grpo"}),
    "ppo, shared, LoRA": Case("ppo", {"value": "shared", "lora_rank": 4, "rollout_batch_size": 3}),
}


# Models with a tensor-parallel plan and norms in fp64. Phi has biases everywhere, and an odd width;
# Starcoder2 has a tied embedding and fewer key-value heads.
PHI = {"model_type": "phi", "hidden_size": 32, "intermediate_size": 47, "num_hidden_layers": 1}
PHI |= {"num_attention_heads": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
STARCODER = {"model_type": "starcoder2", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
STARCODER |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
STARCODER |= {"sliding_window": None, "bos_token_id": 0, "eos_token_id": 1}
STARCODER |= {"residual_dropout": 0.0, "embedding_dropout": 0.0}
TP = {"tp": 2}
# Few passes, because one through DTensors costs a CPU some time.
TWO: dict[str, Any] = {"micro_batch_size": 4, "eval_every": 10}
ONE: dict[str, Any] = {"micro_batch_size": 8, "eval_every": 10}
TP_CASES = {
    "tp: pretrain": Case("pretrain", {"model_config": PHI, "model": None, **TWO}, TP),
    "tp: sft": Case("sft", {"model": "starcoder", "gradient_checkpointing": True, **TWO}, TP),
    "tp: reward": Case("reward", {"model": "starcoder", **ONE}, TP),
    "tp: dpo": Case("dpo", {"model": "starcoder", **ONE}, TP),
    "tp: kto, LoRA": Case("kto", {"model": "starcoder", "lora_rank": 4, **ONE}, TP),
}


# On one process a model in bf16. The ranks keep fp32 weights, of which they gather bf16.
BF16 = Case("sft", {"model": "llama", "dtype": "bfloat16", "bf16": True}, {"dtype": "float32"})
EXACT = "sft, untied, offloaded"  # the same run in fp64


def make_files(folder: Path) -> dict[str, str]:
    """Data of all stages, a tied GPT-2, an untied Llama, a reward model and a reward function."""
    pairs = [
        {"prompt": sentence(n), "chosen": " good " + sentence(n + 50), "rejected": " bad " + sentence(n + 81)}
        for n in range(24)
    ]
    judged = [
        {
            "prompt": row["prompt"],
            "completion": row["chosen"] if n % 3 else row["rejected"],
            "label": n % 3 > 0,
        }
        for n, row in enumerate(pairs)
    ]
    rows: dict[str, list[Any]] = {
        "text": [{"text": sentence(n)} for n in range(40)],
        "answers": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs],
        "pairs": pairs,
        "judged": judged,
        "prompts": [{"prompt": row["prompt"]} for row in pairs],
    }
    paths = {name: write(folder / f"{name}.jsonl", records) for name, records in rows.items()}
    # Five rows (sixteen texts are packed into about as many) give ranks different numbers of micro-batches.
    paths |= {
        f"held_out_{name}": write(folder / f"held_{name}.jsonl", records[: 16 if name == "text" else 5])
        for name, records in rows.items()
    }
    tokenizer = save_tokenizer(folder / "tokenizer")
    paths |= {"tokenizer": tokenizer, "gpt2": save_base(folder / "gpt2", tokenizer, length=96, **NO_DROPOUT)}
    loaded = loading.load_tokenizer(tokenizer)
    torch.manual_seed(3)
    untied = loading.scratch_config(LLAMA | {"tie_word_embeddings": False}, loaded, length=96)
    AutoModelForCausalLM.from_config(untied, dtype=torch.float64).save_pretrained(folder / "llama")
    tied = loading.scratch_config(STARCODER, loaded, length=96)
    AutoModelForCausalLM.from_config(tied, dtype=torch.float64).save_pretrained(folder / "starcoder")
    for name in ("llama", "starcoder"):
        loaded.save_pretrained(folder / name)
    (folder / "functions.py").write_text(
        "def count(prompts, completions):\n    return [float(len(text) % 7) for text in completions]\n"
    )
    paths |= {name: str(folder / name) for name in ("llama", "starcoder")}
    paths |= {"count": f"{folder / 'functions.py'}:count"}
    made = configure(Case("reward", {"max_steps": 1}), paths, folder / "reward")
    reward.run(made)
    return paths | {"reward_model": str(folder / "reward" / "model")}


def configure(case: Case, files: Mapping[str, str], output_dir: Path, **more: Any) -> Any:
    """The configuration of a case: ten steps of eight rows in fp64, with evaluations after some."""
    _, config, data = STAGES[case.stage]
    values: dict[str, Any] = {"train_data": files[data], "output_dir": str(output_dir), "model": "gpt2"}
    values |= {"eval_data": files["held_out_" + data], "eval_every": 4, "max_steps": 10}
    values |= {"batch_size": 8, "micro_batch_size": 2, "learning_rate": 1e-3, "max_grad_norm": 0.5}
    values |= {"dtype": "float64", "device": "cpu", "adam_eps": 1e-6}
    if case.stage == "pretrain":
        values |= {"tokenizer": files["tokenizer"], "sequence_length": 40}
    elif case.stage in ("ppo", "grpo"):
        values |= {"reward": "count", "max_new_tokens": 8, "max_steps": 5, "minibatches": 2}
        values |= {"ppo_epochs": 1} if case.stage == "ppo" else {}
    else:
        values |= {"max_length": 64}
    values |= dict(case.options) | more
    for name in ("model", "reward"):
        if values.get(name) is not None:
            values[name] = files[values[name]]
    return config(**values)
