"""One dataclass per stage is its configuration, its command line and its documentation.

A field's docstring is its description. Values come from a YAML or JSON file and from `key=value` arguments,
which win. Wrong types, ranges and unknown keys are refused by name, with the closest keys.
"""

import argparse
import dataclasses
import inspect
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from annotated_types import Ge, Gt, Le, Lt
from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo
from pydantic_core import ArgsKwargs

from ..faults import Parser
from .config_faults import NO_FP16, fault_line, refuse_ambiguous_values, refuse_unknown_keys
from .config_text import read_json, read_yaml, write_yaml
from .runs.files import write_text

# The fields that name files and folders.
PLACES = (
    *("train_data", "eval_data", "output_dir", "tokenizer", "cache_dir"),
    *("model", "model_config", "reference_dir", "reward", "value_model"),
)
CONFIG = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _refuse_fp16(value: object) -> object:
    if str(value).removeprefix("torch.") in ("float16", "fp16", "half"):
        raise ValueError(f"got {value}, {NO_FP16}")
    return value


Names = Annotated[list[str], BeforeValidator(_split)]
Reporters = Annotated[
    list[Literal["tensorboard", "wandb", "trackio"]],
    BeforeValidator(lambda value: [] if value is None else _split(value)),  # report_to=none
]


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class Options:
    """What the configuration of every command refuses."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_keys_and_values(cls, given: Any) -> Any:
        values = (given.kwargs or {}) if isinstance(given, ArgsKwargs) else given
        refuse_unknown_keys(values, [field.name for field in dataclasses.fields(cls)])
        refuse_ambiguous_values(values, {name: field.annotation for name, field in _fields(cls).items()})
        return given

    @field_validator(*PLACES, check_fields=False)
    @classmethod
    def _expand_home(cls, place: Any) -> Any:
        # No shell expands ~ in a file of YAML; sh and zsh do not in key=value.
        return os.path.expanduser(place) if isinstance(place, str) else place


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class TrainConfig(Options):
    """What every stage shares: data, model loading, optimisation, evaluation, checkpoints and reports."""

    train_data: str
    """Rows to train on: a file or glob (.jsonl, .json, .parquet, .csv, or .txt with one document a line; all
    but Parquet also as .gz, .bz2, .xz or .zst), a folder of such files, or the name of a data set that
    `datasets` loads."""
    train_split: str = "train"
    """Split of `train_data`."""
    eval_data: str | None = None
    """Held-out rows in the same format. Without them nothing is evaluated."""
    eval_split: str = "train"
    """Split of `eval_data`."""
    output_dir: str
    """Folder for model/, checkpoints/, metrics.jsonl and config.yaml."""
    tokenizer: str | None = None
    """Folder or name of the tokenizer. Default: the model's own."""

    dtype: Annotated[Literal["float32", "bfloat16", "float64"], BeforeValidator(_refuse_fp16)] = "float32"
    """Type of the weights and of the optimizer's state."""
    bf16: bool = False
    """Compute in bfloat16 under autocast; the weights keep `dtype`."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """auto: flash_attention_2 where flash-attn, CUDA and half precision are there, else sdpa."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train. auto: CUDA where there is a device, else the CPU."""
    gradient_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Run the model through torch.compile."""
    liger: bool = False
    """Liger's kernels for a model's layers (RMSNorm, RoPE, SwiGLU), never its losses; CUDA and liger-kernel
    needed."""

    dp_shard: PositiveInt = 1
    """Ranks that share one copy of weights, gradients and optimizer state (FSDP2). 1: each rank has its own
    (DistributedDataParallel)."""
    dp_replicate: int | None = Field(default=None, gt=0)
    """Groups of dp_shard x tp ranks. Default: as many as there are ranks for."""
    tp: PositiveInt = 1
    """Ranks that share each layer and the vocabulary of the head, by the model's plan in transformers
    (tp_plan). They train on the same rows."""
    cpu_offload: bool = False
    """Keep the shards and the optimizer's state in the host's memory, and step there (needs dp_shard)."""

    tail_eps: float | None = Field(default=None, gt=0, lt=1)
    """Leave columns of the softmax below this probability out of the head's backward matrix products, but for
    a rank-1 matrix of their sums: faster where the model is sure, with a small error (docs/tail.md). null:
    exact."""
    screen: bool = False
    """Compute the head's logits in 8 bits, and again exactly where they matter, in all passes: evaluation,
    rollouts, the reference, the old policy, and training, where it goes with tail_eps (docs/screen.md). CPUs
    with AVX-512 VNNI; GPUs of compute capability 9.0 with tail_eps, where rollouts stay exact."""

    lora_rank: NonNegativeInt = 0
    """Rank of LoRA adapters; 0 trains all weights."""
    lora_alpha: PositiveInt = 32
    """Adapters are scaled by lora_alpha / lora_rank."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout in front of the adapters."""
    lora_targets: Names = Field(default_factory=lambda: ["all-linear"])
    """Modules that get adapters, separated by commas; all-linear: every linear layer but the head, which
    lm_head names."""

    max_steps: int | None = Field(default=None, gt=0)
    """Optimizer steps. Default: what `epochs` needs."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the rows, rounded up to whole steps. Default: 1, unless max_steps is given."""
    batch_size: PositiveInt = 32
    """Rows in one optimizer step, over all devices and micro-batches together."""
    micro_batch_size: int | None = Field(default=None, gt=0)
    """Rows in one forward pass on one device. Default: batch_size / devices, that is, no accumulation."""
    learning_rate: PositiveFloat = 2e-5
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate after warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Steps in which the learning rate rises linearly to its peak."""
    final_fraction: float = Field(default=0.0, ge=0, le=1)
    """Fraction of the peak that linear and cosine fall to."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of matrices (vectors, such as norms and biases, never decay)."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's decay of the mean of gradients."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW's decay of the mean of squared gradients."""
    adam_eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Gradients are scaled down to this L2 norm; null: never."""

    seed: NonNegativeInt = 0
    """Seed of the initial weights, the order of rows and dropout."""
    eval_every: int | None = Field(default=None, gt=0)
    """Evaluate every so many steps, besides before the first step and after the last."""
    save_every: int | None = Field(default=None, gt=0)
    """Checkpoint every so many steps and after the last. Default: no checkpoints."""
    keep_checkpoints: PositiveInt = 2
    """How many of the latest checkpoints stay on disk."""
    cache_dir: str | None = None
    """Folder of the tokenized rows, which runs may share: rows that were tokenized before, from the same data
    with the same tokenizer and options, are read from there. Default: output_dir/tokens with several
    processes, none with one."""
    async_checkpoints: bool = False
    """Write checkpoints in a thread beside the training. It takes a copy of the weights and the optimizer's
    state in the host's memory, and a kill may lose the checkpoint that is being written."""
    timeout: PositiveFloat = 30.0
    """Minutes without a sign of life from one process after which all ranks end, and report which one it
    was."""
    resume: bool = False
    """Continue from the latest checkpoint of output_dir, or start where there is none."""
    dry_run: bool = False
    """Check data, configuration and model, print what the run takes in memory, tokens and steps, and stop
    before the model is loaded."""
    report_to: Reporters = Field(default_factory=list)
    """Besides metrics.jsonl: any of tensorboard, wandb, trackio, separated by commas."""
    project: str = "fastalign"
    """Project name for wandb and trackio; the run is named after output_dir."""

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError(
                f"max_steps: got {self.max_steps} and epochs {self.epochs}, expected one of the two"
            )
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size: got {self.batch_size}, expected a multiple of micro_batch_size "
                f"({self.micro_batch_size})"
            )
        if self.bf16 and self.dtype == "float64":
            raise ValueError("dtype: got float64 with bf16, expected float32 or bfloat16")
        if self.dp_shard == 1 and self.cpu_offload:
            raise ValueError("cpu_offload: got true with dp_shard=1, expected dp_shard of at least 2")
        if self.dp_shard > 1 and self.compile:
            raise ValueError(f"compile: got true with dp_shard={self.dp_shard}, expected false")
        if self.tp > 1:
            self._check_tp()
        if self.screen and self.lora_rank and "lm_head" in self.lora_targets:
            raise ValueError(
                "screen: got true with lora_targets=lm_head, expected false: a head with adapters has exact "
                "logits alone"
            )
        if self.eval_every is not None and self.eval_data is None:
            raise ValueError(f"eval_every: got {self.eval_every} without eval_data, expected both")
        return self

    def _check_tp(self) -> None:
        """Refuse what the tests of tensor parallelism do not cover."""
        for name in ("cpu_offload", "compile", "liger", "screen"):
            if getattr(self, name):
                raise ValueError(f"{name}: got true with tp={self.tp}, expected false")
        if self.lora_rank and "lm_head" in self.lora_targets:
            raise ValueError(
                f"lora_targets: got lm_head with tp={self.tp}, expected other modules: the vocabulary of a "
                "head with adapters cannot be split"
            )


Config = TypeVar("Config", bound=Options)


def parse(stage: type[Config], argv: Sequence[str] | None = None, *, prog: str) -> Config:
    """The configuration from `--config FILE` and `key=value` arguments; the arguments win.

    If a key, type or range is wrong, exits with status 2 and one line that names the faults, as argparse
    does.
    """
    parser = Parser(
        prog=prog,
        description=inspect.getdoc(stage),
        epilog=describe(stage),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", metavar="FILE", action="append", default=[], help="YAML or JSON file of the fields below"
    )
    parser.add_argument("values", metavar="key=value", nargs="*", help="fields, over those of the file")
    arguments, rest = parser.parse_known_intermixed_args(argv)
    try:
        if rest:
            name = rest[0].lstrip("-")
            raise ValueError(f"arguments: got {rest[0]!r}, expected key=value, as in {name.split('=')[0]}=…")
        if len(arguments.config) > 1:
            raise ValueError(f"config: got {' and '.join(arguments.config)}, expected one file")
        values = read_config(arguments.config[0]) if arguments.config else {}
        for argument in arguments.values:
            key, separator, value = argument.partition("=")
            if not separator:
                raise ValueError(f"arguments: got {argument!r}, expected key=value")
            values[key] = _value(value)
        return stage(**values)
    except ValidationError as error:
        parser.error("; ".join(fault_line(fault) for fault in error.errors()))
    except ValueError as error:
        parser.error(str(error))


def read_config(path: str) -> dict[str, Any]:
    """The fields in a YAML or JSON file. Raises ValueError if the file is missing or holds anything else."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"config: got {path!r}, which is no file, expected a YAML or JSON file")
    read = read_json if file.suffix.lower() == ".json" else read_yaml
    try:
        values = read(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"config: got {path!r}, which is no UTF-8 ({error}), expected UTF-8") from error
    except ValueError as error:
        raise ValueError(f"config: in {path!r} {error}") from error
    if values is None:
        return {}
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise ValueError(
            f"config: got a {type(values).__name__} in {path!r}, expected fields with their values"
        )
    return dict(values)


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the configuration as YAML that `--config` reads."""
    write_text(path, write_yaml(dataclasses.asdict(config), sort_keys=False))


def describe(stage: type[Options]) -> str:
    """Each field with its type, default and description, as text."""
    lines = ["fields:"]
    for name, field in _fields(stage).items():
        default = (
            " (required)"
            if field.is_required()
            else f" = {_show(field.get_default(call_default_factory=True))}"
        )
        lines.append(f"  {name}: {_type(field)}{default}")
        description = next(
            base_field.description
            for base in stage.__mro__
            if (base_field := _fields(base).get(name)) is not None and base_field.description
        )
        lines.append(textwrap.fill(description, 108, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines)


def _fields(stage: type) -> dict[str, FieldInfo]:
    # pydantic attaches a docstring only to the fields of the class that holds it, not to inherited ones.
    return getattr(stage, "__pydantic_fields__", {})


def _type(field: FieldInfo) -> str:
    annotation = field.annotation
    name = (
        annotation.__name__ if isinstance(annotation, type) and not hasattr(annotation, "__args__") else None
    )
    text = name or str(annotation).replace("typing.", "")
    bounds = []
    signs = {Gt: ("gt", ">"), Ge: ("ge", ">="), Lt: ("lt", "<"), Le: ("le", "<=")}
    for bound in field.metadata:
        if type(bound) in signs:
            attribute, sign = signs[type(bound)]
            bounds.append(f"{sign} {getattr(bound, attribute)}")
    return f"{text} ({', '.join(bounds)})" if bounds else text


def _show(value: object) -> str:
    return write_yaml(value, default_flow_style=True).removesuffix("...\n").strip()


def _value(text: str) -> Any:
    # Scalars stay text: pydantic reads 3e-4 by the type of the field; YAML would guess.
    if text in ("null", "None", "none") or text[:1] in ("{", "["):
        try:
            return None if text in ("None", "none") else read_yaml(text)
        except ValueError as error:
            raise ValueError(f"arguments: in {text!r} {error}") from error
    return text
