"""The configuration of the stages that learn from completions which they draw and score themselves."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass

from .config import CONFIG, TrainConfig


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class RolloutOptions:
    """How completions are drawn and scored: what `draw_completions` takes."""

    max_new_tokens: PositiveInt = 64
    """Longest completion in tokens."""
    temperature: PositiveFloat = 1.0
    """Divides the logits, in the rollout and in all log-probabilities."""
    top_k: int = Field(default=0, ge=0)
    """Draw among the so many likeliest tokens; 0: among all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw among the likeliest tokens that hold this probability."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Draw among tokens at least this fraction as likely as the likeliest."""
    filtered_policy: bool = True
    """Where top_k, top_p or min_p filter, train the policy that drew: all log-probabilities are over the ids
    that the filter kept at each token. It takes memory and time in proportion to these ids, so it does not
    pay where they are thousands a token. false: the policy before the filters, over the whole vocabulary."""
    compile_rollout: bool = False
    """Run the policy through torch.compile where it draws: fewer kernels a token, after a minute of
    compiling."""
    rescore: bool = False
    """Take the old log-probabilities from a pass of the trainer over the rollout; false: as the rollout
    returned them."""
    importance_cap: float | None = Field(default=None, gt=0)
    """Weigh each token's policy loss by the ratio of trainer's and rollout's probabilities, at most this
    (needs rescore)."""

    missing_eos_penalty: float | None = Field(default=None, gt=0)
    """Subtracted from the score of a completion that did not end within max_new_tokens."""
    kl_coef: NonNegativeFloat = 0.05
    """Weight of the KL divergence from the reference, nats a token."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL divergence counts: in each token's reward, or in the policy's loss."""
    kl_estimator: Literal["auto", "k1", "k2", "k3"] = "auto"
    """With d the log-ratio of policy and reference: k1 is d, k2 d²/2, k3 exp(-d) - 1 + d. auto: k1 in the
    reward, k3 in the loss."""

    minibatches: PositiveInt = 1
    """Optimizer steps in a pass."""
    clip: PositiveFloat = 0.2
    """The ratio of new and old probabilities is held within 1 - clip and 1 + clip."""
    clip_high: float | None = Field(default=None, gt=0)
    """Another bound above, 1 + clip_high."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Bounds the loss of a token with a negative advantage by this times its advantage."""
    entropy_coef: float = 0.0
    """Weight of the policy's entropy (nats), which is subtracted from the loss."""

    @model_validator(mode="after")
    def _check_importance(self) -> Self:
        if self.importance_cap is not None and not self.rescore:
            raise ValueError(
                f"importance_cap: got {self.importance_cap} with rescore=false, expected rescore=true, "
                "which gives the trainer's log-probabilities"
            )
        return self

    @property
    def keeps_sets(self) -> bool:
        """Whether the ids that the filter kept at each token are handed on."""
        return self.filtered_policy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def estimator(self) -> str:
        """The estimator of the KL divergence: kl_estimator, or what `auto` stands for."""
        return self.kl_estimator if self.kl_estimator != "auto" else "k1" if self.kl_in == "reward" else "k3"


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class PPOOptions(RolloutOptions):
    """How completions are drawn and learnt from: what `rollout` and `ppo_step` take."""

    target_kl: float | None = Field(default=None, gt=0)
    """Adapt kl_coef so that the KL divergence comes near this (nats a completion). Default: kl_coef is
    fixed."""
    kl_horizon: PositiveInt = 10_000
    """Completions after which an adaptive kl_coef has changed by a factor of about 1.2 at most."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount a token."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """GAE's lambda: 1 takes the rewards to come, 0 the value of the next token."""
    whiten_rewards: bool = False
    """Scale the rewards of all tokens of a step to variance 1."""
    whiten_advantages: bool = True
    """Shift and scale the advantages of all tokens of a step, on all ranks, to mean 0 and variance 1."""

    ppo_epochs: PositiveInt = 4
    """Passes over the completions of a step."""
    value_clip: float | None = Field(default=0.2, gt=0)
    """A value counts as moved at most this far from the old one; null: no bound."""
    vf_coef: NonNegativeFloat = 0.1
    """Weight of the value loss."""

    @model_validator(mode="after")
    def _check_target(self) -> Self:
        if self.target_kl is not None and not self.kl_coef:
            raise ValueError(f"target_kl: got {self.target_kl} with kl_coef=0, expected a kl_coef above 0")
        return self


def is_function(reward: str) -> bool:
    """Whether it names a Python function, "module:function" or "file.py:function", and not a model."""
    return ":" in reward


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class PolicyConfig(RolloutOptions, TrainConfig):
    """What the stages that learn from scores of their own completions have."""

    model: str
    """Folder or name of the model."""
    reward: str
    """What scores completions: folder or name of a sequence classifier, or a Python function,
    "module:function" or "file.py:function", with the parameters prompts and completions (or completions
    alone), and with the columns that it names. It returns a score for each completion."""
    reward_label: int | None = Field(default=None, ge=0)
    """Which label's logit is the score, where the classifier has several."""
    reference: Literal["auto", "copy", "adapters_off", "none"] = "auto"
    """What the policy is held near: a frozen copy of it as it was, the model without its LoRA adapters, or
    nothing (needs kl_coef=0). auto: adapters_off with LoRA, else copy."""
    max_prompt_length: PositiveInt = 512
    """Longest prompt in tokens."""
    too_long: Literal["refuse", "drop", "truncate"] = "drop"
    """What to do with a longer prompt: refuse it, leave it out or cut it at the left; the log counts them."""
    packing: bool = True
    """Pack sequences that share a forward pass into rows as long as the longest, blind to each other."""
    micro_batch_size: int | None = Field(default=None, gt=0)
    """Sequences in one forward pass on one device. Default: batch_size / minibatches / devices, that is, no
    accumulation."""
    rollout_batch_size: int | None = Field(default=None, gt=0)
    """Completions drawn at once on one device. Default: batch_size / devices."""

    @model_validator(mode="after")
    def _check_stage(self) -> Self:
        if self.batch_size % self.minibatches:
            raise ValueError(
                f"batch_size: got {self.batch_size}, expected a multiple of minibatches ({self.minibatches})"
            )
        if self.tp > 1:
            raise ValueError(
                f"tp: got {self.tp}, expected 1: rollouts do not sample from a vocabulary that ranks share; "
                "dp_shard shards this stage"
            )
        if self.compile_rollout and self.dp_shard > 1:
            raise ValueError(f"compile_rollout: got true with dp_shard={self.dp_shard}, expected false")
        if self.reference == "adapters_off" and not self.lora_rank:
            raise ValueError(
                "reference: got adapters_off without adapters (lora_rank=0), expected auto, copy or none"
            )
        if self.reference == "none" and self.kl_coef:
            raise ValueError(f"reference: got none with kl_coef={self.kl_coef}, expected kl_coef=0")
        if self.tail_eps is not None and self.keeps_sets:
            raise ValueError(
                f"tail_eps: got {self.tail_eps} with top_k, top_p or min_p, expected null or "
                "filtered_policy=false: a softmax over kept ids has no tail"
            )
        if self.screen and self.keeps_sets:
            raise ValueError(
                "screen: got true with top_k, top_p or min_p, expected false or filtered_policy=false: a "
                "softmax over kept ids has exact logits alone"
            )
        if self.reward_label is not None and is_function(self.reward):
            raise ValueError(
                f"reward_label: got {self.reward_label}, expected none, because reward is the function "
                f"{self.reward!r}"
            )
        if self.lora_dropout:
            raise ValueError(
                f"lora_dropout: got {self.lora_dropout}, expected 0, because the policy is compared with "
                "its rollout"
            )
        if self.attention == "flash_attention_2":
            raise ValueError(
                "attention: got flash_attention_2, expected auto, sdpa or eager, which read the static cache "
                "of rollouts"
            )
        return self

    @property
    def has_reference(self) -> bool:
        """Whether the policy is compared with a reference."""
        return self.reference != "none"


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class PPOConfig(PPOOptions, PolicyConfig):
    """Align a causal LM with the scores of its completions of rows of `prompt`."""

    value: Literal["own", "shared"] = "own"
    """A value model of its own, or a linear layer on the hidden states of the policy."""
    value_model: str | None = None
    """Folder or name that a value model of its own starts from. Default: the reward model, where it is a
    classifier with one label that reads the policy's tokens, else the policy, with values of zero."""
    value_learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of the value model or layer. Default: learning_rate."""
    batch_size: PositiveInt = 64
    """Prompts in one step, over all devices; each is completed once."""
    learning_rate: PositiveFloat = 3e-6
    """Peak learning rate of AdamW."""

    @model_validator(mode="after")
    def _check_value(self) -> Self:
        if self.value_model is not None and self.value == "shared":
            raise ValueError(f"value_model: got {self.value_model!r} with value=shared, expected value=own")
        return self


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class GRPOOptions(RolloutOptions):
    """How groups are drawn and learnt from: what `grpo_rollout` and `grpo_step` take."""

    group_size: int = Field(default=8, ge=2)
    """Completions of each prompt, which are compared with each other."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL divergence from the reference, nats a token; 0: there is none."""
    kl_in: Literal["reward", "loss"] = "loss"
    """Where the KL divergence counts: summed over a completion in its reward, or in the policy's loss."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What a reward's distance from its group's mean is divided by: the standard deviation of its group or of
    the batch, or nothing (Dr. GRPO)."""
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = "dapo"
    """How tokens are averaged: grpo over each completion and then over completions; dapo over all tokens of
    an optimizer step; dr_grpo sums them and divides by completions x max_new_tokens."""
    mask_truncated: bool = False
    """Leave completions that did not end within max_new_tokens out of the loss; their group still compares
    with them."""
    inner_epochs: PositiveInt = 1
    """Passes over the completions of a step."""


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class GRPOConfig(GRPOOptions, PolicyConfig):
    """Align a causal LM with scores of groups of its completions of rows of `prompt`."""

    reference: Literal["auto", "copy", "adapters_off", "none"] = "auto"
    """What the policy is held near: a frozen copy of it as it was, the model without its LoRA adapters, or
    nothing (needs kl_coef=0). auto: nothing with kl_coef=0, else adapters_off with LoRA, else copy."""
    batch_size: PositiveInt = 64
    """Completions in one step, over all devices: group_size of each of batch_size / group_size prompts."""
    learning_rate: PositiveFloat = 1e-6
    """Peak learning rate of AdamW."""

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if self.batch_size % self.group_size:
            raise ValueError(
                f"batch_size: got {self.batch_size}, expected a multiple of group_size ({self.group_size})"
            )
        return self

    @property
    def has_reference(self) -> bool:
        """Whether the policy is compared with a reference."""
        return self.reference != "none" and (self.kl_coef > 0 or self.reference != "auto")
