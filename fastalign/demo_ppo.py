"""The demo's third part: PPO with a critic and GAE, by VADER's sentiment and by the demo's own reward
model."""

from collections.abc import Sequence

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from .demo_settings import Settings, shared
from .stages import ppo

TITLES = {"ppo-vader": "PPO, VADER", "ppo-reward": "PPO, reward model"}
# The reward model's scores of SFT's completions have a standard deviation of 1.6, VADER's one of 0.33. At
# 0.05 PPO by the reward model went 13.7 nats from SFT, at 0.1 8.4 to 10.1 and at 0.2 5.6 to 7.2.
KL_COEFFICIENTS = {"ppo-vader": 0.05, "ppo-reward": 0.2}
PROMPTS = 64  # of a step
JUDGE = SentimentIntensityAnalyzer()


def vader(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """VADER's compound score of each completion: what the stage takes as a reward."""
    return [JUDGE.polarity_scores(text)["compound"] for text in completions]


def ppo_config(settings: Settings, name: str) -> ppo.PPOConfig:
    """PPO of the tuned model, on the prompts that DPO's and KTO's samples complete.

    The critic starts from the tuned model with values of 0, or from the reward model where that gives the
    rewards. There is no warm-up in so few steps. By VADER the sentiment rose by 0.38 at a KL divergence of
    5.3 nats; at a learning rate of 3e-4 by 0.17 at 1.5 nats; with a critic from the reward model by 0.32 at
    5.4; at a KL coefficient of 0.02 by 0.59 at 11.9.
    """
    folder = settings.output_dir
    return ppo.PPOConfig(
        train_data=str(folder / "rows" / "prompts.jsonl"),
        model=str(folder / "sft" / "model"),
        reward=f"{__name__}:vader" if name == "ppo-vader" else str(folder / "reward" / "model"),
        output_dir=str(folder / name),
        max_new_tokens=settings.policy_tokens,
        learning_rate=1e-3,
        kl_coef=KL_COEFFICIENTS[name],
        ppo_epochs=2,
        **shared(settings, settings.ppo_steps)
        | {"batch_size": PROMPTS, "weight_decay": 0.0, "warmup_steps": 0},
    )
