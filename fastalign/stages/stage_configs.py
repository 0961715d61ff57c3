"""The configuration of every stage, of `merge` and of `tokenizer`.

Each is a dataclass that is also the command line and its documentation.

These classes are apart from the stages so that `fastalign COMMAND --help` needs no torch: importing this
file takes a fifth of a second.
"""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from pydantic.dataclasses import dataclass

from .config import CONFIG, Options, TrainConfig
from .policy_configs import GRPOConfig, PPOConfig

REFERENCE_FREE = ("orpo", "simpo", "cpo")  # the keys of pair_loss.REFERENCE_FREE, whose import needs torch


def _pair_loss_types() -> tuple[str, ...]:
    """The names of `dpo_loss`'s losses, read from the table's source, and of those without a reference.

    Importing the table would import torch.
    """
    package = find_spec("fastalign_kernels")
    assert package is not None and package.origin is not None
    source = Path(package.origin).parent.joinpath("preference", "formulas.py").read_text(encoding="utf-8")
    names = re.findall(r'^    "(\w+)": PairLoss\(', source, flags=re.MULTILINE)
    return (*(name for name in names if name != "odds_ratio"), *REFERENCE_FREE)  # odds_ratio is ORPO's


if TYPE_CHECKING:
    PairLossType = str
else:
    PairLossType = Literal[_pair_loss_types()]


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class PretrainConfig(TrainConfig):
    """Train a causal LM on plain text, from scratch or from a model that exists."""

    model: str | None = None
    """Folder or name of a model to go on training; or else give `model_config`."""
    model_config: str | dict[str, Any] | None = None
    """A model from scratch: a transformers config.json, or {model_type: llama, hidden_size: 256, …}, where
    fields left out keep the type's defaults and vocab_size and special ids follow the tokenizer."""
    text_column: str = "text"
    """Column that holds the documents."""
    sequence_length: int = Field(default=1024, ge=2)
    """Tokens in a row. Documents are packed into rows and do not see each other."""
    too_long: Literal["split", "refuse", "drop", "truncate"] = "split"
    """What to do with a document longer than sequence_length: split it into pieces, refuse it, leave it out
    or keep its beginning; the log counts the documents of the latter two."""

    @model_validator(mode="after")
    def _check_model(self) -> Self:
        if (self.model is None) == (self.model_config is None):
            given = "neither" if self.model is None else "both"
            raise ValueError(
                f"model and model_config: got {given}, expected model (to go on training) or model_config "
                "(from scratch)"
            )
        if self.model is None and self.tokenizer is None:
            raise ValueError(
                "tokenizer: got null with model_config, expected one: a model from scratch has none"
            )
        if self.model is None and self.lora_rank:
            raise ValueError(
                f"lora_rank: got {self.lora_rank} with model_config, expected 0: the initial weights below "
                "would not be saved"
            )
        return self


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class SFTConfig(TrainConfig):
    """Train a causal LM on the answers in rows of `messages`, or of `prompt` and `completion`."""

    model: str
    """Folder or name of the model."""
    max_length: int = Field(default=1024, ge=2)
    """Longest conversation in tokens."""
    too_long: Literal["refuse", "drop", "truncate"] = "drop"
    """What to do with a row that is longer: refuse it, leave it out or cut it at the right; the log counts
    the rows."""
    packing: bool = False
    """Pack conversations into rows of max_length, blind to each other; batch_size then counts such rows."""


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class PreferenceConfig(TrainConfig):
    """What every preference stage has."""

    model: str
    """Folder or name of the model."""
    max_length: int = Field(default=1024, ge=2)
    """Longest prompt with its completion in tokens."""
    too_long: Literal["refuse", "drop", "truncate"] = "drop"
    """What to do with a row that is longer: refuse it, leave it out or cut it at the right; the log counts
    the rows."""
    packing: bool = True
    """Pack sequences that share a forward pass into rows as long as the longest, blind to each other, and
    compute the prompt that two of them share once, where the attention takes a mask and it pays."""


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class RewardConfig(PreferenceConfig):
    """Train a reward model on rows of `prompt`, `chosen` and `rejected`, with a `margin` where there is such
    a column."""

    center_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the squared sum of a pair's scores, which holds their mean at zero."""
    zero_head: bool = False
    """Start from scores of zero: the first loss is ln 2."""

    @model_validator(mode="after")
    def _check_tail(self) -> Self:
        if self.tail_eps is not None:
            raise ValueError(
                f"tail_eps: got {self.tail_eps}, expected null, because a reward model has no softmax over a "
                "vocabulary"
            )
        if self.screen:
            raise ValueError(
                "screen: got true, expected false, because a reward model has no softmax over a vocabulary"
            )
        return self

    @model_validator(mode="after")
    def _check_targets(self) -> Self:
        if self.lora_rank and "lm_head" in self.lora_targets:
            raise ValueError(
                f"lora_targets: got {', '.join(self.lora_targets)}, expected names without lm_head: a reward "
                "model has a score head in its place, which is trained whole"
            )
        return self


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class ReferenceConfig(PreferenceConfig):
    """What the stages that compare a policy with a reference have."""

    learning_rate: PositiveFloat = 1e-6
    """Peak learning rate of AdamW."""
    reference: Literal["auto", "copy", "adapters_off", "precomputed"] = "auto"
    """Where the log-probabilities of the model before training come from: a frozen copy of it, the model
    without its LoRA adapters, or one pass before the first step, kept in a file. auto: adapters_off with
    LoRA, else copy."""
    reference_dir: str | None = None
    """Folder of the precomputed log-probabilities; runs that share it score a sequence once. Default:
    output_dir."""

    @model_validator(mode="after")
    def _check_reference(self) -> Self:
        if self.reference == "adapters_off" and not self.lora_rank:
            raise ValueError(
                "reference: got adapters_off without adapters (lora_rank=0), expected auto, copy or "
                "precomputed"
            )
        if self.reference_dir is not None and self.reference != "precomputed":
            raise ValueError(
                f"reference_dir: got {self.reference_dir!r} with reference={self.reference}, expected "
                "precomputed"
            )
        return self


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class DPOConfig(ReferenceConfig):
    """Align a causal LM with rows of `prompt`, `chosen` and `rejected`."""

    loss_type: PairLossType = "sigmoid"
    """The loss of a pair: sigmoid is DPO's. ipo and sigmoid_norm take log-probabilities per token. orpo,
    simpo and cpo have no reference, and none is loaded."""
    beta: PositiveFloat | None = None
    """Strength of the pull to the reference: rewards are beta times the log-ratio of policy and reference.
    Without a reference, the scale of the log-probabilities (simpo, cpo) or the weight of the odds ratio
    (orpo). Default: 0.1, and 2 for simpo."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of pairs in the wrong order, for sigmoid (cDPO), sigmoid_norm, robust, simpo, cpo and
    exo_pair, which needs one."""
    gamma: float | None = None
    """simpo: by how much beta times the chosen completion's log-probability a token should exceed the
    rejected one's. Default: 1."""
    alpha: float | None = Field(default=None, ge=0)
    """Weight of the chosen completion's NLL, for the losses without a reference. Default: 1 for orpo and cpo,
    0 for simpo. The NLL is a mean over the completion's tokens; CPO's is a sum."""
    nll_mean: bool = False
    """cpo: the NLL is a mean over the completion's tokens too."""

    @model_validator(mode="after")
    def _check_loss(self) -> Self:
        from .pair_loss import check_pair_loss  # here: --help needs no torch

        check_pair_loss(**self.loss_options)
        for name, default in (("reference", "auto"), ("reference_dir", None)):
            value = getattr(self, name)
            if self.reference_free and value != default:
                raise ValueError(
                    f"{name}: got {value} with loss_type={self.loss_type}, which has no reference, expected "
                    f"{default or 'none'}"
                )
        return self

    @property
    def reference_free(self) -> bool:
        """Whether the loss compares the policy with no reference."""
        return self.loss_type in REFERENCE_FREE

    @property
    def loss_options(self) -> dict[str, Any]:
        """What `pair_loss` takes; a number that was not given has the loss's default."""
        numbers = {"beta": self.beta, "gamma": self.gamma, "alpha": self.alpha}
        numbers |= {"label_smoothing": self.label_smoothing or None}
        given = {name: value for name, value in numbers.items() if value is not None}
        return {"loss_type": self.loss_type, "nll_mean": self.nll_mean, **given}


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class KTOConfig(ReferenceConfig):
    """Align a causal LM with rows of `prompt`, `completion` and `label`, which is true for a desirable
    completion."""

    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """kto, or APO-zero's loss, which takes the KL divergence to be zero."""
    beta: PositiveFloat = 0.1
    """Strength of the pull to the reference: rewards are beta times the log-ratio of policy and reference."""
    desirable_weight: NonNegativeFloat = 1.0
    """Weight of desirable rows. Weight times number of rows of one kind should be 1 to 4/3 of that of the
    other kind."""
    undesirable_weight: NonNegativeFloat = 1.0
    """Weight of undesirable rows."""

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        if self.loss_type == "kto" and self.batch_size < 2:
            raise ValueError(
                "batch_size: got 1, expected at least 2: a prompt is paired with the completion of another "
                "row of its step"
            )
        return self


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class MergeConfig(Options):
    """Write base and adapters as one plain model, with its tokenizer and generation_config."""

    model: str
    """Folder of adapters. Where their base is a folder of adapters too, all are merged."""
    output_dir: str
    """Folder for the model: a new or empty one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Type of the merged weights. auto: that of the base."""


ROLES = ("system", "user", "assistant")
_SMALLEST = 256 + 3 + len(ROLES)  # the bytes; BOS, EOS and padding; a token for each role


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class TokenizerConfig(Options):
    """Train a byte-level BPE tokenizer with a chat template for turns of system, user and assistant."""

    train_data: str
    """Rows of text: a JSONL, JSON or Parquet file, or the name of a data set that `datasets` loads."""
    train_split: str = "train"
    """Split of `train_data`."""
    text_column: str = "text"
    """Column that holds the documents."""
    output_dir: str
    """Folder for the tokenizer: a new or empty one."""
    vocab_size: int = Field(default=8192, ge=_SMALLEST)
    """Tokens at most: 256 bytes, BOS, EOS, padding, one for each role, and merges. A short text has fewer
    merges."""


CONFIGS: dict[str, type[Options]] = {
    "pretrain": PretrainConfig,
    "sft": SFTConfig,
    "reward": RewardConfig,
    "dpo": DPOConfig,
    "kto": KTOConfig,
    "ppo": PPOConfig,
    "grpo": GRPOConfig,
    "merge": MergeConfig,
    "tokenizer": TokenizerConfig,
}
