"""What a run takes, printed before its models are loaded: parameters, tokens, steps and memory.

The models are built without memory (FakeTensorMode: each operation gives only shapes and dtypes, and picks
the kernels of the real device). One forward pass of each backbone counts what autograd would save. So
attention, adapters, autocast and any architecture are counted as they are. Only the head and PPO's cache
come from formulas.
"""

import heapq
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from fastalign_kernels import plan_head

from ..data.tokens import IGNORE_INDEX, Tokenized
from .batches import micro_batch_size, total_steps
from .config import TrainConfig
from .models.adapters import add_adapters
from .models.sharding import gathered_weights
from .models.tensor_parallel import check_plan, local_share
from .models.weights import Task
from .runs.distributed import World

GIB = 2**30
Upstream = Literal["scalar", "logp"]
ADAM_MOMENTS = 2
TRANSIENTS = 2  # tensors as large as the largest kept one that a layer's backward pass holds besides
CGROUP = Path("/sys/fs/cgroup")


class Part(NamedTuple):
    """A model that a step needs on the device."""

    name: str
    architecture: PretrainedConfig
    task: Task = "CAUSAL_LM"
    trained: bool = True


class Shape(NamedTuple):
    """The properties of a micro-batch that decide its memory."""

    rows: int
    width: int
    targets: int
    masked: bool
    """Whether transformers builds a mask, which keeps packed sequences apart."""

    @staticmethod
    def of(arguments: Mapping[str, Any]) -> "Shape":
        """The shape of `fastalign.data.collate`'s arguments."""
        rows, width = arguments["input_ids"].shape
        targets = int((arguments["labels"][:, 1:] != IGNORE_INDEX).sum())
        several = int((arguments["position_ids"] == 0).sum()) > rows
        return Shape(rows, width, targets, several and "cu_seq_lens_q" not in arguments)


class Estimate(NamedTuple):
    """Parameters, and bytes of one process.

    `weights`, `gradients` and `moments` are what it keeps: a shard, if ranks share the model. `gathered` is
    what a pass then gathers of weights and gradients, and `cache` has a rollout's whole model.

    `activations` is None if the model cannot be traced; `why` is the reason. tp does not lower it here.
    """

    parameters: int = 0
    trained: int = 0
    weights: int = 0
    gradients: int = 0
    moments: int = 0
    activations: int | None = 0
    head: int = 0
    cache: int = 0
    gathered: int = 0
    why: str = ""

    @property
    def total(self) -> int:
        """Bytes at the peak. A rollout's cache and whole models are freed before the update."""
        return (
            self.weights
            + self.gradients
            + self.moments
            + max((self.activations or 0) + self.head + self.gathered, self.cache)
        )

    def plus(self, other: "Estimate") -> "Estimate":
        """The sum of both models."""
        known = self.activations is not None and other.activations is not None
        return Estimate(
            self.parameters + other.parameters,
            self.trained + other.trained,
            self.weights + other.weights,
            self.gradients + other.gradients,
            self.moments + other.moments,
            (self.activations or 0) + (other.activations or 0) if known else None,
            self.head + other.head,
            max(self.cache, other.cache),
            self.gathered + other.gathered,
            self.why or other.why,
        )


def announce(
    config: TrainConfig,
    world: World,
    parts: Sequence[Part],
    rows: Sequence[Sequence[Tokenized]],
    *,
    collate: Callable[[Sequence[Sequence[Tokenized]]], Mapping[str, Any]],
    upstream: Upstream = "scalar",
    micro: int | None = None,
    cached: tuple[int, int] | None = None,
) -> None:
    """Print what the run takes, on the main process, with warnings if rows or memory are too few.

    Raises ValueError for a model that tp cannot split, and for a warm-up of more steps than the run has.
    `rows` are all rows in tokens; the longest ones make the micro-batch that is counted. `collate` gives
    its arguments, those of `fastalign.data.collate`. `upstream` is `plan_head`'s. `micro`: rows of a
    forward pass. `cached`: rows and tokens of a rollout's cache.
    """
    if config.tp > 1:
        for part in parts:
            check_plan(part.architecture, config.tp)
    number = total_steps(config, len(rows))
    if not world.main:
        return
    shape = Shape.of(collate(heapq.nlargest(micro or micro_batch_size(config, world), rows, key=_tokens)))
    total = Estimate()
    for part in parts:
        found = estimate(config, world, part, shape, upstream=upstream, cached=cached)
        world.say(f"{part.name}: {found.parameters:,} parameters, {found.trained:,} of them trained")
        total = total.plus(found)
    tokens = round(sum(map(_tokens, rows)) * config.batch_size / len(rows))
    each = f"{number:,} steps of {config.batch_size}, about {tokens:,} tokens each"
    world.say(f"data: {len(rows):,} rows; {each}")
    if len(rows) < config.batch_size:
        world.say(
            f"warning: batch_size: got {config.batch_size}, expected at most the {len(rows)} rows: a step "
            "takes some of them more than once"
        )
    free = free_memory(world)
    world.say(_memory_line(total, free, world))
    if free is not None and total.total > free:
        world.say(
            f"warning: memory: a step is estimated to take {total.total / GIB:.2f} GiB and {free / GIB:.2f} "
            "GiB are free: lower micro_batch_size or the length of rows, or set gradient_checkpointing=true "
            "or lora_rank"
        )


def _tokens(row: Sequence[Tokenized]) -> int:
    return sum(len(sequence.input_ids) for sequence in row)


def _memory_line(total: Estimate, free: int | None, world: World) -> str:
    shares = {"weights": total.weights, "gradients": total.gradients, "AdamW": total.moments}
    shares |= {} if total.activations is None else {"activations": total.activations}
    shares |= {"head": total.head} | ({"gathered": total.gathered} if total.gathered else {})
    drawing = "cache and whole model of a rollout" if total.gathered else "rollout's cache"
    shares |= {drawing: total.cache} if total.cache else {}
    listed = ", ".join(f"{name} {share / GIB:.2f}" for name, share in shares.items())
    known = (
        f"{free / GIB:.2f} GiB free on {world.device.type}"
        if free is not None
        else f"what is free on {world.device.type} is not known"
    )
    left_out = f"; activations not counted ({total.why})" if total.activations is None else ""
    return f"memory: about {total.total / GIB:.2f} GiB a step ({listed}{left_out}), {known}"


def estimate(
    config: TrainConfig,
    world: World,
    part: Part,
    shape: Shape,
    *,
    upstream: Upstream,
    cached: tuple[int, int] | None = None,
) -> Estimate:
    """What a model takes: its parameters and, if it is trained, what a micro-batch saves."""
    dtype = getattr(torch, config.dtype)
    with torch.device("meta"):  # PEFT cannot put adapters on fake tensors
        model, whole = _build(config, part, dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(world.device.type):
        _on_device(whole)
        parameters, trained = (
            sum(w.numel() for w in weights) for weights in (whole.parameters(), _trained(whole))
        )
        weights = sum(w.numel() * w.element_size() for w in whole.parameters())
        gathered, drawing, split = 0, 0, local_share(whole, config.tp)
        if config.dp_shard > 1:
            size = 2 if config.bf16 else dtype.itemsize
            # A rollout makes its models whole, one at a time.
            gathered = round(size * gathered_weights(whole) * split)
            drawing = size * parameters if cached else 0
        kept = 0 if config.cpu_offload and world.device.type == "cuda" else split / config.dp_shard
        if not part.trained:
            return Estimate(parameters, 0, round(weights * kept), cache=drawing, gathered=gathered)
        gradients = round(sum(w.numel() * w.element_size() for w in _trained(whole)) * kept)
        activations, why = _activations(config, world, model, shape)
        head = _head(config, world, model, shape, upstream) if part.task == "CAUSAL_LM" else 0
    cache = _cache(part.architecture, cached, dtype) if part.task == "CAUSAL_LM" else 0
    return Estimate(
        parameters,
        trained,
        round(weights * kept),
        gradients,
        ADAM_MOMENTS * gradients,
        activations,
        head,
        cache + drawing,
        2 * gathered if trained == parameters else gathered,
        why,
    )


def _build(config: TrainConfig, part: Part, dtype: torch.dtype) -> tuple[PreTrainedModel, nn.Module]:
    """The model and, if it is trained with adapters, the module that holds both."""
    auto = AutoModelForCausalLM if part.task == "CAUSAL_LM" else AutoModelForSequenceClassification
    # sdpa stands for flash_attention_2 too: both save the inputs, the output and one number per row.
    options = {"dtype": dtype, "attn_implementation": "eager" if config.attention == "eager" else "sdpa"}
    model: PreTrainedModel = auto.from_config(part.architecture, **options)
    if not (part.trained and config.lora_rank):
        return model.requires_grad_(part.trained), model
    return model, add_adapters(model, config, task=part.task, base=None)


def _on_device(model: nn.Module) -> None:
    """Replace weights and buffers on the meta device by ones of the default device; sharing is kept."""
    replaced: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in replaced:
                    new: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
                    replaced[id(tensor)] = (
                        nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
                    )
                tensors[name] = replaced[id(tensor)]


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in model.parameters() if weight.requires_grad]


def _activations(
    config: TrainConfig, world: World, model: PreTrainedModel, shape: Shape
) -> tuple[int | None, str]:
    """Bytes that a forward pass of the backbone saves, and what the backward pass adds; or None and why."""
    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, so that its address is not another's later
        return tensor

    inputs: dict[str, Tensor] = {"input_ids": torch.zeros(shape.rows, shape.width, dtype=torch.int64)}
    if shape.masked:
        inputs["attention_mask"] = torch.ones(shape.rows, 1, shape.width, shape.width, dtype=torch.bool)
    try:
        model.train()
        with (
            saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast(world.device.type, torch.bfloat16, enabled=config.bf16),
        ):
            model.base_model(**inputs, use_cache=False)
    # A model's own code, on tensors without values; an estimate must not end a run
    except Exception as error:
        return None, f"{type(model).__name__} cannot be traced: {type(error).__name__}"
    sizes = [storage.nbytes() for storage in kept.values()]
    text = model.config.get_text_config()
    everything = sum(sizes)
    if config.gradient_checkpointing:
        layers = int(text.num_hidden_layers)
        everything = (
            everything // layers + layers * shape.rows * shape.width * text.hidden_size * model.dtype.itemsize
        )
    return everything + TRANSIENTS * max(sizes, default=0), ""


def _head(config: TrainConfig, world: World, model: PreTrainedModel, shape: Shape, upstream: Upstream) -> int:
    """Bytes of the head's workspace and of the gradients that it makes, for this rank's part of it."""
    text = model.config.get_text_config()
    weight: Any = model.get_output_embeddings().weight
    hidden_size, vocab_size = weight.shape[1], math.ceil(weight.shape[0] / config.tp)
    plan = plan_head(
        shape.targets,
        hidden_size,
        vocab_size,
        dtype=torch.bfloat16 if config.bf16 else weight.dtype,
        device=world.device,
        weight_grad=weight.requires_grad,
        upstream=upstream,
        tail_eps=config.tail_eps,
        lora_rank=config.lora_rank if "lm_head" in config.lora_targets else 0,
    )
    size = max(4, weight.element_size())
    # If the weight is the embedding's too, both gradients exist before they are added.
    apart = weight.requires_grad and (
        getattr(text, "tie_word_embeddings", False) or weight.element_size() < 4
    )
    codes = vocab_size * (hidden_size + 72) if config.screen else 0  # of linear/screen_weight.py
    return (
        plan.workspace_bytes
        + codes
        + shape.targets * hidden_size * size
        + (vocab_size * hidden_size * size if apart else 0)
    )


def _cache(architecture: PretrainedConfig, cached: tuple[int, int] | None, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of a rollout."""
    if cached is None:
        return 0
    text = architecture.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * cached[0] * cached[1] * heads * width * dtype.itemsize)


def free_memory(world: World) -> int | None:
    """Bytes free for this process; None if unknown.

    They are those free on its GPU, or its share of what the machine and its cgroups leave.
    """
    if world.device.type == "cuda":
        return int(torch.cuda.mem_get_info(world.device)[0])
    free = [limit for limit in (_available(), _cgroup_left()) if limit is not None]
    return min(free) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if free else None


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def _cgroup_left(root: Path = CGROUP, membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """What the tightest memory limit of this process's cgroups leaves. Page cache counts as free.

    The cgroups are v2, or v1's memory controller.
    """
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return None
    left = []
    for number, controllers, path in lines:
        if number == "0":
            top, limit, used = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = top / path.lstrip("/")
        for place in [folder, *folder.parents]:
            if place == top.parent:
                break
            if (most := _number(place / limit)) is not None and (now := _number(place / used)) is not None:
                left.append(most - now + _page_cache(place / "memory.stat"))
    return min(left, default=None)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max": no limit


def _page_cache(path: Path) -> int:
    try:
        entries = dict(line.split() for line in path.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(entries.get("total_inactive_file", entries.get("inactive_file", 0)))
