"""The configuration of every stage that the demo runs, and the reward that PPO and GRPO use."""

from collections.abc import Sequence
from typing import Any

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from ..stages import dpo, grpo, kto, ppo, pretrain, reward, sft
from .settings import ROW_TOKENS, Settings, shared

MODEL = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
MODEL |= {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}
BETAS = {"dpo-0.05": 0.05, "dpo-0.5": 0.5, "kto": 0.05}
PPO_TITLES = {"ppo-vader": "PPO, VADER", "ppo-reward": "PPO, reward model"}
DRAWN_TITLES = {**PPO_TITLES, "grpo-vader": "GRPO, VADER"}  # whose policies learn from their own completions
TITLES = {
    "reward": "Reward model",
    "dpo-0.05": "DPO, β 0.05",
    "dpo-0.5": "DPO, β 0.5",
    "kto": "KTO, β 0.05",
    **DRAWN_TITLES,
}
"""The runs after SFT; each has a folder of its name."""
REWARD_BATCH, DPO_BATCH, KTO_BATCH = 24, 16, 32  # pairs, pairs, judged completions
# The reward model's scores of SFT's completions have a standard deviation of 1.6, VADER's 0.33. At
# 0.05 PPO by the reward model went 13.7 nats from SFT, at 0.1 8.4 to 10.1 and at 0.2 5.6 to 7.2.
KL_COEFFICIENTS = {"ppo-vader": 0.05, "ppo-reward": 0.2}
DRAWN = 64  # completions of a step
JUDGE = SentimentIntensityAnalyzer()


def pretrain_config(settings: Settings) -> pretrain.PretrainConfig:
    """Pre-training from scratch on whole sentences, packed into rows in which they do not see each other."""
    folder = settings.output_dir
    return pretrain.PretrainConfig(
        train_data=str(folder / "rows" / "train.jsonl"),
        eval_data=str(folder / "rows" / "held_out.jsonl"),
        tokenizer=str(folder / "tokenizer"),
        output_dir=str(folder / "pretrain"),
        model_config=MODEL,
        sequence_length=ROW_TOKENS,
        learning_rate=3e-3,
        eval_every=max(1, settings.steps // 8),
        **shared(settings, settings.steps),
    )


def sft_config(settings: Settings) -> sft.SFTConfig:
    """SFT of the pre-trained model on the continuations of positively rated sentences."""
    folder = settings.output_dir
    return sft.SFTConfig(
        train_data=str(folder / "rows" / "sft_train.jsonl"),
        eval_data=str(folder / "rows" / "sft_held_out.jsonl"),
        model=str(folder / "pretrain" / "model"),
        output_dir=str(folder / "sft"),
        max_length=ROW_TOKENS,
        packing=True,
        learning_rate=3e-3,
        eval_every=max(1, settings.sft_steps // 8),
        **shared(settings, settings.sft_steps),
    )


def reward_config(settings: Settings) -> reward.RewardConfig:
    """The reward model starts from the pre-trained model, because SFT has seen only good sentences."""
    folder = settings.output_dir
    return reward.RewardConfig(
        train_data=str(folder / "rows" / "reward_train.jsonl"),
        eval_data=str(folder / "rows" / "reward_held_out.jsonl"),
        model=str(folder / "pretrain" / "model"),
        output_dir=str(folder / "reward"),
        max_length=ROW_TOKENS,
        learning_rate=1e-3,
        eval_every=max(1, settings.reward_steps // 4),
        **shared(settings, settings.reward_steps) | {"batch_size": REWARD_BATCH},
    )


def dpo_config(settings: Settings, name: str) -> dpo.DPOConfig:
    """DPO of the tuned model. Runs with another β share the reference's log-probabilities."""
    folder = settings.output_dir
    held_out = folder / "rows" / "pairs_held_out.jsonl"
    evaluated: dict[str, Any] = (
        {"eval_data": str(held_out), "eval_every": max(1, settings.policy_steps // 6)}
        if held_out.stat().st_size
        else {}
    )
    return dpo.DPOConfig(
        train_data=str(folder / "rows" / "pairs.jsonl"),
        **evaluated,
        reference="precomputed",
        reference_dir=str(folder / "reference"),
        **_policy(settings, name, DPO_BATCH),
    )


def kto_config(settings: Settings, desirable: int, undesirable: int) -> kto.KTOConfig:
    """KTO of the tuned model. The rarer label weighs more, so that both weigh the same in total."""
    return kto.KTOConfig(
        train_data=str(settings.output_dir / "rows" / "labels.jsonl"),
        desirable_weight=max(1.0, undesirable / desirable),
        undesirable_weight=max(1.0, desirable / undesirable),
        **_policy(settings, "kto", KTO_BATCH),
    )


def _policy(settings: Settings, name: str, batch_size: int) -> dict[str, Any]:
    folder = settings.output_dir
    fields = {
        "model": str(folder / "sft" / "model"),
        "output_dir": str(folder / name),
        "beta": BETAS[name],
        "learning_rate": 3e-4,
    }
    return (
        shared(settings, settings.policy_steps)
        | fields
        | {"max_length": ROW_TOKENS, "batch_size": batch_size, "weight_decay": 0.0}
    )


def vader(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """VADER's compound score of each completion: the reward of the stage."""
    return [JUDGE.polarity_scores(text)["compound"] for text in completions]


def ppo_config(settings: Settings, name: str) -> ppo.PPOConfig:
    """PPO of the tuned model, on the prompts that DPO's and KTO's samples complete.

    The critic starts from the tuned model with values of 0, or from the reward model where that gives the
    rewards. There is no warm-up in so few steps. By VADER the sentiment rose by 0.38 at a KL divergence of
    5.3 nats; at a learning rate of 3e-4 by 0.17 at 1.5 nats; with a critic from the reward model by 0.32 at
    5.4; at a KL coefficient of 0.02 by 0.59 at 11.9.
    """
    by_vader = name == "ppo-vader"
    return ppo.PPOConfig(
        reward=f"{__name__}:vader" if by_vader else str(settings.output_dir / "reward" / "model"),
        kl_coef=KL_COEFFICIENTS[name],
        ppo_epochs=2,
        **_drawn(settings, name),
    )


def grpo_config(settings: Settings) -> grpo.GRPOConfig:
    """GRPO of the tuned model by VADER, with as many completions and passes as PPO.

    Advantages are in units of a group's standard deviation, so the KL coefficient is larger than PPO's. At
    0.5 the last rollout scored 0.60 at a KL divergence of 4.5 nats; at 0.1 0.92 at 22, at 0.05 0.98 at 49.
    """
    return grpo.GRPOConfig(
        reward=f"{__name__}:vader", kl_coef=0.5, inner_epochs=2, **_drawn(settings, "grpo-vader")
    )


def _drawn(settings: Settings, name: str) -> dict[str, Any]:
    """The fields of a configuration that PPO and GRPO share."""
    folder = settings.output_dir
    fields = {
        "train_data": str(folder / "rows" / "prompts.jsonl"),
        "model": str(folder / "sft" / "model"),
        "output_dir": str(folder / name),
        "max_new_tokens": settings.policy_tokens,
        "learning_rate": 1e-3,
        "batch_size": DRAWN,
        "weight_decay": 0.0,
        "warmup_steps": 0,
    }
    return shared(settings, settings.ppo_steps) | fields
