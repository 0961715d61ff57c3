"""Folders of PEFT adapters, accepted wherever a model is: their base is found, and they are merged into it.

Adapters that a stage trains on such a model lie on the merged one. Their base is then the folder of the
earlier adapters, and so on down to plain weights: runs/dpo/model -> runs/sft/model -> runs/base/model. A
saved folder names its base twice, so that both may be moved together: by its absolute path in
adapter_config.json, where PEFT and other libraries look too, and relative to the folder.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import GENERATION_CONFIG_NAME

from ...data.errors import one_line
from ...finite import find_not_finite
from ..config import TrainConfig
from .hub_names import check_name
from .weights import Task, load_whole, names_classifier

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
RELATIVE_BASE = "base_model.json"  # {"relative_path": the base, seen from this folder}


class Source(NamedTuple):
    """What a model is made of: plain weights, and folders of adapters in the order of merging."""

    base: str
    adapters: list[str]

    @property
    def parts(self) -> list[str]:
        """The adapters from the last to the first, then the base."""
        return [*reversed(self.adapters), self.base]


def has_adapters(name: str) -> bool:
    """Whether `name` is a folder of adapters, without the weights of a whole model."""
    return Path(name, ADAPTER_CONFIG).is_file() and not Path(name, "config.json").is_file()


def find_source(name: str, *, argument: str = "model") -> Source:
    """The parts of the model in a folder or of a name.

    Raises ValueError, which begins with `argument`, if a base is not found.
    """
    adapters: list[str] = []
    while has_adapters(name):
        if str(Path(name).resolve()) in [str(Path(folder).resolve()) for folder in adapters]:
            raise ValueError(
                f"{argument}: got adapters in {name!r} that name themselves as their base, expected the "
                "folder of a model there"
            )
        adapters.append(name)
        name = _base_of(name, argument)
    if adapters:
        check_name(argument, name)
    return Source(name, adapters[::-1])


def _base_of(folder: str, argument: str) -> str:
    named = _read(Path(folder, ADAPTER_CONFIG)).get("base_model_name_or_path")
    if not named:
        raise ValueError(
            f"{argument}: got adapters in {folder!r} without base_model_name_or_path in {ADAPTER_CONFIG}, "
            "expected the folder of the base model there"
        )
    candidates = [named, str(Path(folder, named))]  # as PEFT reads it, and seen from the folder
    if Path(folder, RELATIVE_BASE).is_file():
        candidates.append(str(Path(folder, _read(Path(folder, RELATIVE_BASE))["relative_path"]).resolve()))
    for candidate in candidates:
        if Path(candidate).is_dir():
            return candidate
    if Path(named).is_absolute() or named.startswith(".") or named.count("/") > 1:
        looked = " or ".join(repr(candidate) for candidate in dict.fromkeys(candidates))
        raise ValueError(
            f"{argument}: got adapters in {folder!r} whose base model is no folder, expected {looked}: move "
            f"it back, or write its path into {ADAPTER_CONFIG} as base_model_name_or_path"
        )
    return str(named)  # of a hub


def _read(path: Path) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], json.loads(path.read_text()))


def is_classifier(source: Source, architecture: PretrainedConfig) -> bool:
    """Whether these are the weights of a sequence classifier, not of a causal LM."""
    if any(_task(folder) == "SEQ_CLS" for folder in source.adapters):
        return True
    return names_classifier(architecture)


def _task(folder: str) -> str | None:
    return cast(str | None, _read(Path(folder, ADAPTER_CONFIG)).get("task_type"))


def load_architecture(name: str, *, task: Task = "CAUSAL_LM", argument: str = "model") -> PretrainedConfig:
    """The configuration of the model in a folder or of a name; for a folder of adapters, that of its base.

    A classifier has the number of labels of its trained head. Raises ValueError if the base is not found,
    or if the adapters are a classifier's and a causal LM is expected.
    """
    source = find_source(name, argument=argument)
    classifiers = [folder for folder in source.adapters if _task(folder) == "SEQ_CLS"]
    if task == "CAUSAL_LM" and classifiers:
        raise ValueError(
            f"{argument}: got {name!r}, the adapters of a sequence classifier ({classifiers[0]!r}), "
            "expected a causal LM"
        )
    labels = {} if not classifiers else {"num_labels": _labels(classifiers[-1], argument)}
    architecture: PretrainedConfig = AutoConfig.from_pretrained(
        source.base, trust_remote_code=False, **labels
    )
    return architecture


def _labels(folder: str, argument: str) -> int:
    """The number of labels of the head in a classifier's adapters."""
    if not Path(folder, ADAPTER_WEIGHTS).is_file():
        raise ValueError(
            f"{argument}: got {folder!r} without {ADAPTER_WEIGHTS}, expected the adapters' weights there"
        )
    with safe_open(Path(folder, ADAPTER_WEIGHTS), framework="pt") as weights:
        heads = [name for name in weights.keys() if name.endswith(("score.weight", "classifier.weight"))]  # noqa: SIM118
        if not heads:
            raise ValueError(
                f"{argument}: got adapters of a classifier in {folder!r} without a weight of its head, "
                "expected score.weight"
            )
        return int(weights.get_slice(heads[0]).get_shape()[0])


def load_plain(name: str, *, task: Task, argument: str = "model", **options: Any) -> PreTrainedModel:
    """The model in a folder or of a name, with adapters merged into it and all weights trainable.

    `options` are from_pretrained's. A classifier's head may be missing in a causal LM's folder: it is then
    drawn. Raises ValueError if weights are missing, left over, of another shape or not finite, and if the
    adapters do not fit the base or cannot be merged.
    """
    source = find_source(name, argument=argument)
    model = load_whole(source.base, task=task, argument=argument, **options)
    for folder in source.adapters:
        model = _merge(model, folder, argument)
        if model.can_generate() and Path(folder, GENERATION_CONFIG_NAME).is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _merge(model: PreTrainedModel, folder: str, argument: str) -> PreTrainedModel:
    config = PeftConfig.from_pretrained(folder)
    if config.is_prompt_learning:
        raise ValueError(
            f"{argument}: got adapters in {folder!r} of type {config.peft_type.value}, expected ones that "
            "can be merged"
        )
    # A causal LM's adapters are also put on a classifier, which PEFT's task types would refuse.
    config.task_type, config.inference_mode = None, True
    try:
        # PEFT draws weights that the loaded ones replace. Later draws must be those of a plain model.
        with torch.random.fork_rng(devices=[]):
            adapted = PeftModel(model, config)
        loaded = adapted.load_adapter(folder, "default")
    except (ValueError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"{argument}: got adapters in {folder!r} ({one_line(error)}), expected ones that fit their base "
            f"{model.name_or_path!r}"
        ) from error
    if broken := find_not_finite(adapted.named_parameters()):
        raise ValueError(
            f"{argument}: got adapters in {folder!r}, of which {broken}, expected finite numbers"
        )
    # A classifier has no lm_head, so an adapter of the lm_head has nothing to act on.
    extra = [name for name in loaded.unexpected_keys if hasattr(model, "lm_head") or "lm_head" not in name]
    if wrong := [*loaded.missing_keys, *extra]:
        raise ValueError(
            f"{argument}: got adapters in {folder!r} of which {len(wrong)} weights are missing or left over, "
            f"{wrong[0]} among them, expected ones that fit their base {model.name_or_path!r}"
        )
    _untie(model)
    merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    return merged.requires_grad_(True)


def _untie(model: PreTrainedModel) -> None:
    """Give lm_head a weight of its own if LoRA is on it or on the embeddings, and they share one.

    An adapter of one acts on that one alone. Merged into a shared weight, it would change the other too.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers: list[Any] = [getattr(module, "base_layer", module) for module in (embeddings, head)]
    adapted = layers != [embeddings, head]
    if adapted and head is not None and layers[0].weight is layers[1].weight:
        layers[1].weight = nn.Parameter(layers[1].weight.detach().clone())
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def add_adapters(model: PreTrainedModel, config: TrainConfig, *, task: Task, base: str | None) -> PeftModel:
    """The model with new LoRA adapters as configured. `base` is the folder or name it was loaded from."""
    targets: Any = _targets(model, config.lora_targets, task)
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        task_type=task,
    )
    adapted: Any = get_peft_model(model, lora)
    adapted.base_source = base
    return cast(PeftModel, adapted)


def _targets(model: PreTrainedModel, names: list[str], task: Task) -> str | list[str]:
    """The modules that get adapters. A classifier, such as PPO's value model, has no lm_head to adapt.

    Raises ValueError for a name that no module has, which PEFT would leave out silently, and if none is left.
    """
    if names == ["all-linear"]:
        return "all-linear"
    modules = [name for name, _ in model.named_modules()]
    found = [name for name in names if any(f".{module}".endswith(f".{name}") for module in modules)]
    missing = [name for name in names if name not in found and not (task == "SEQ_CLS" and name == "lm_head")]
    if missing or not found:
        raise ValueError(
            f"lora_targets: got {', '.join(missing or names)}, expected modules of {type(model).__name__}, "
            f"such as {', '.join(_linear_names(model))}"
        )
    return found


def _linear_names(model: nn.Module) -> list[str]:
    """Last parts of the names of its linear layers, each once; Conv1D is GPT-2's."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return list(dict.fromkeys(name.rpartition(".")[2] for name in linear))


def record_base(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Write beside saved adapters where their base is, and how the model generates.

    Other models have that already.
    """
    if not isinstance(model, PeftModel):
        return
    if generation := getattr(model, "generation_config", None):
        generation.save_pretrained(folder)
    base = str(cast(Any, model).base_source)
    path = folder / ADAPTER_CONFIG
    if Path(base).is_dir():
        absolute = Path(base).resolve()
        relative = Path(os.path.relpath(absolute, folder.resolve()))
        (folder / RELATIVE_BASE).write_text(json.dumps({"relative_path": relative.as_posix()}) + "\n")
        base = str(absolute)
    path.write_text(
        json.dumps({**_read(path), "base_model_name_or_path": base}, indent=2, sort_keys=True) + "\n"
    )
