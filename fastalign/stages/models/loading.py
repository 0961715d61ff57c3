"""Load the tokenizer and the model of a run, checked before anything large is loaded."""

import difflib
import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils.import_utils import is_flash_attn_2_available

from fastalign_kernels.linear.gpu.device import no_screen

from ...causal_lm import fuse_head
from ...classifier import score_packed
from ...data.packing import check_packing
from ...data.tokens import Tokenized
from ...rope import check_lengths
from ...servable_heads import adapted_head
from ...transformers_names import enable_checkpointing
from ..config import TrainConfig
from ..config_faults import unknown_key
from ..policy_configs import RolloutOptions
from ..runs.distributed import World
from .adapters import add_adapters, find_source, has_adapters, load_plain
from .main_values import has_values, without_values
from .weights import Task

Model = TypeVar("Model", bound=nn.Module)


def choose_attention(config: TrainConfig, world: World) -> str:
    """The attention to use. Raises ValueError if flash_attention_2 is asked for and cannot run."""
    if config.attention not in ("auto", "flash_attention_2"):
        return config.attention
    missing = [
        what
        for what, there in (
            ("the flash-attn package", is_flash_attn_2_available()),
            ("a CUDA device", world.device.type == "cuda"),
            ("half precision (bf16=true or dtype=bfloat16)", config.bf16 or config.dtype == "bfloat16"),
        )
        if not there
    ]
    if not missing:
        return "flash_attention_2"
    if config.attention == "flash_attention_2":
        raise ValueError(
            f"attention: got flash_attention_2, expected auto, sdpa or eager without {' and '.join(missing)}"
        )
    if world.device.type == "cuda":
        world.say(f"attention: sdpa (flash_attention_2 needs {' and '.join(missing)})")
    return "sdpa"


def check_liger(config: TrainConfig, world: World) -> None:
    """Raise ValueError if Liger's layers are asked for and cannot run."""
    missing = [
        what
        for what, there in (
            ("the liger-kernel package", importlib.util.find_spec("liger_kernel") is not None),
            ("a CUDA device", world.device.type == "cuda"),
        )
        if not there
    ]
    if config.liger and missing:
        raise ValueError(f"liger: got true, expected false without {' and '.join(missing)}")


def check_screen(config: TrainConfig, world: World) -> None:
    """Raise ValueError if 8-bit logits are asked for and this device or dtype has none."""
    if not config.screen:
        return
    dtype = torch.bfloat16 if config.bf16 else getattr(torch, config.dtype)
    if refused := no_screen(world.device, dtype):
        raise ValueError(f"screen: got true, expected false: {refused}")
    if world.device.type == "cuda":
        if config.tail_eps is None:
            raise ValueError(
                "screen: got true without tail_eps, expected false: on a GPU it saves nothing in training so"
            )
        if isinstance(config, RolloutOptions):
            world.say("screen: the rollouts draw from exact logits: on a GPU the draws have no screen")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or name. Adapters that were saved without one use their base's."""
    parts = find_source(name, argument="tokenizer").parts
    whole = (
        part for part in parts if not has_adapters(part) or Path(part, "tokenizer_config.json").is_file()
    )
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(next(whole), trust_remote_code=False)
    return tokenizer


def padding_id(tokenizer: PreTrainedTokenizerBase, model: PretrainedConfig) -> int:
    """An id of the model's that fills rows. It is never attended to and never trained on."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(i) for i in ids if i is not None and i < model.get_text_config().vocab_size)


def stop_at(model: PreTrainedModel | PeftModel, ends: Sequence[int]) -> None:
    """Add the ids that end a turn to those at which the model's `generate` stops.

    Rollouts stop at them too, and they are saved with the model.
    """
    config: Any = model.generation_config
    configured = config.eos_token_id
    known = [] if configured is None else configured if isinstance(configured, list) else [configured]
    if new := [end for end in dict.fromkeys(ends) if end not in known]:
        all_ends = [*known, *new]
        config.eos_token_id = all_ends if len(all_ends) > 1 else all_ends[0]


def scratch_config(
    model_config: str | dict[str, Any], tokenizer: PreTrainedTokenizerBase, *, length: int
) -> PretrainedConfig:
    """The architecture of a model to train from scratch, fitted to the tokenizer.

    `model_config` is a transformers config.json, or a mapping of `model_type` and the fields that differ
    from that type's defaults. In a mapping, vocab_size, special ids and max_position_embeddings follow the
    tokenizer and `length` unless given. If a model has several parts, they are set for the language model.
    Raises ValueError for an unknown model_type or field.
    """
    if isinstance(model_config, str):
        if not Path(model_config).is_file():
            raise ValueError(f"model_config: got {model_config!r}, which is no file, expected a config.json")
        config: PretrainedConfig = AutoConfig.from_pretrained(model_config, trust_remote_code=False)
        return config
    fields = dict(model_config)
    model_type = fields.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        close = difflib.get_close_matches(str(model_type), CONFIG_MAPPING, n=3)
        known = " or ".join(close) if close else "one that transformers knows, such as llama or gpt2"
        raise ValueError(f"model_config: got model_type {model_type!r}, expected {known}")
    default: PretrainedConfig = CONFIG_MAPPING[model_type]()
    _check_fields(fields, default)
    text = default.get_text_config()
    part = next((name for name in default.sub_configs if getattr(default, name) is text), None)
    if part is not None:
        _check_fields(dict(fields.get(part) or {}), text)
    fitted: dict[str, Any] = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id}
    fitted["eos_token_id"] = tokenizer.eos_token_id
    # An embedding row that is padding gets no gradient, so a pad token that also ends texts is not named.
    fitted["pad_token_id"] = (
        None if tokenizer.pad_token_id == tokenizer.eos_token_id else tokenizer.pad_token_id
    )
    if "max_position_embeddings" in [*text.to_dict(), *text.attribute_map]:
        fitted["max_position_embeddings"] = length
    fields = fitted | fields if part is None else fields | {part: fitted | dict(fields.get(part) or {})}
    try:
        config = CONFIG_MAPPING[model_type](**fields)
    except StrictDataclassError as error:
        raise ValueError(f"model_config: got {fields}, expected fields of {model_type}: {error}") from error
    return config


def _check_fields(fields: Mapping[str, Any], default: PretrainedConfig) -> None:
    allowed = [*default.to_dict(), *default.attribute_map]
    for name in fields:
        if name not in allowed:
            raise ValueError(f"model_config: {unknown_key(name, allowed)}")


def check_fit(
    model: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[Tokenized]],
    *,
    lower: str = "sequence_length or max_length",
    alone: bool | None = None,
) -> int:
    """The number of tokens of the longest sequence, after a check that the rows fit the model.

    `alone`: whether every forward pass has one sequence; None if a stage has no such choice. A tokenizer
    may have more ids than the model as long as no row uses them. Raises ValueError if a sequence's length
    or ids do not fit the model, or if sequences would change each other's rotary frequencies. The message
    says what to `lower`.
    """
    text = model.get_text_config()
    if len(tokenizer) > text.vocab_size:
        _check_ids(text.vocab_size, tokenizer, (sequence for row in rows for sequence in row))
    positions = getattr(text, "max_position_embeddings", None)
    lengths = [len(sequence.input_ids) for row in rows for sequence in row]
    length = max(lengths)
    if positions is not None and length > positions:
        raise ValueError(
            f"{lower}: got a sequence of {length} tokens, expected at most the model's {positions} "
            "(max_position_embeddings): lower it"
        )
    if not alone:
        choice = "" if alone is None else ", or set packing=false and micro_batch_size=1"
        check_lengths(model, lengths, remedy=f"lower {lower}{choice}")
    return length


def _check_ids(vocab_size: int, tokenizer: PreTrainedTokenizerBase, sequences: Iterable[Tokenized]) -> None:
    foreign = [sequence.input_ids for sequence in sequences if max(sequence.input_ids) >= vocab_size]
    if foreign:
        wrong = next(token for token in foreign[0] if token >= vocab_size)
        raise ValueError(
            f"tokenizer: got {len(tokenizer)} tokens, expected at most the model's vocab_size {vocab_size}: "
            f"{len(foreign)} sequences use ids beyond it, such as "
            f"{tokenizer.convert_ids_to_tokens(wrong)!r} (id {wrong}) in the row that begins "
            f"{tokenizer.decode(foreign[0])[:80]!r}"
        )


def load_model(
    config: TrainConfig,
    world: World,
    architecture: PretrainedConfig,
    *,
    weights: str | None,
    attention: str,
    packed: bool,
    task: Task = "CAUSAL_LM",
    argument: str = "model",
) -> PreTrainedModel | PeftModel:
    """The model with its head fused, its layers and adapters as configured.

    It is on the world's device. If it is to be sharded, it is still on rank 0's CPU, and without values on
    the other ranks: `sharding.shard` moves it.

    `task` is PEFT's name of a causal LM, or of a sequence classifier with one label, which scores packed
    sequences. `weights` is a folder or name, which errors call `argument`; None draws initial weights.
    Adapters in `weights` are merged before new ones are added.

    Raises ValueError for weights that are not the model's (`load_plain`), a model without Liger's layers
    (if they are asked for), a model that the head cannot serve, and one in which `packed` rows would see
    each other.
    """
    if config.liger:
        _check_liger_layers(architecture)
    torch.manual_seed(config.seed)
    load = partial(_load_fused, config, world, architecture, weights=weights, task=task, argument=argument)
    lm = load_on_main(world, partial(load, attention=attention, packed=packed))
    if task == "SEQ_CLS":
        score_packed(lm, verify=has_values(lm))
    lm.set_attn_implementation(attention)
    if config.liger:
        layers = {"rope": True, "rms_norm": True, "swiglu": True}
        apply_liger_kernel(lm, layers | {"cross_entropy": False, "fused_linear_cross_entropy": False})
    if config.gradient_checkpointing:
        enable_checkpointing(lm)
    if not config.lora_rank:
        return lm
    adapted = add_adapters(lm, config, task=task, base=weights)
    if task == "CAUSAL_LM" and (has_values(lm) or adapted_head(lm) is not None):
        # It verifies an adapter on lm_head, or refuses it.
        fuse_head(adapted, verify=has_values(lm), tail_eps=config.tail_eps, screen=config.screen)
    return adapted


def load_on_main(world: World, load: Callable[[], Model]) -> Model:
    """The model that `load` gives.

    If it is to be sharded, rank 0 alone calls `load`. The other ranks get a copy whose weights are on the
    meta device; buffers, which are small, come with their values. `sharding.shard` gives each rank its
    values. Until then rank 0 alone may run the model: `World.on_main`.
    """
    if world.sharding is None:
        return load()
    model = load() if world.main else None
    copied: list[Any] = [None if model is None else without_values(model)]
    dist.broadcast_object_list(copied)
    return copied[0] if model is None else model


def _load_fused(
    config: TrainConfig,
    world: World,
    architecture: PretrainedConfig,
    *,
    weights: str | None,
    attention: str,
    packed: bool,
    task: Task,
    argument: str,
) -> PreTrainedModel:
    """The checked model with a fused head, or a classifier, without adapters."""
    # flash-attn refuses the fp32 of the check in fuse_head, so it is switched on afterwards.
    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
    options["attn_implementation"] = "sdpa" if attention == "flash_attention_2" else attention
    classifier = task == "SEQ_CLS"
    options |= {"num_labels": 1} if classifier else {}
    if weights is None:
        auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
        lm: PreTrainedModel = auto.from_config(architecture, trust_remote_code=False, **options)
    else:
        lm = load_plain(weights, task=task, argument=argument, **options)
        base, adapters = find_source(weights)
        if adapters:
            world.say(f"model: {' and '.join(adapters)}: adapters, merged into {base}")
    if world.sharding is None:
        lm.to(device=world.device)
    if not classifier:
        fuse_head(lm, tail_eps=config.tail_eps, screen=config.screen)
    # flash-attn does not run on CPUs: sdpa stands for it in the check of a model that is to be sharded.
    checked = attention if lm.device.type == world.device.type else str(options["attn_implementation"])
    lm.set_attn_implementation(checked)
    if packed:
        with torch.autocast(lm.device.type, torch.bfloat16, enabled=config.bf16):
            packs = lm.base_model if classifier else lm
            check_packing(packs, attention=checked, lengths=())  # check_fit has seen the lengths
    return lm


def _check_liger_layers(architecture: PretrainedConfig) -> None:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    # Liger itself would go on silently.
    if architecture.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(
            f"liger: got true, expected false: liger-kernel has no layers for {architecture.model_type}"
        )
