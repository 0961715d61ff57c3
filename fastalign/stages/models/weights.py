"""The weights in a folder, compared with those that the model has.

transformers itself would draw missing weights and go on.
"""

from typing import Any, Literal

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from ...finite import find_not_finite

Task = Literal["CAUSAL_LM", "SEQ_CLS"]
SHOWN = 5  # names in a message
_AUTO = {"CAUSAL_LM": AutoModelForCausalLM, "SEQ_CLS": AutoModelForSequenceClassification}
_HEAD = "score."  # of transformers' classifiers of decoders, those that fastalign takes


def names_classifier(architecture: PretrainedConfig) -> bool:
    """Whether the configuration is that of a sequence classifier."""
    return any(kind.endswith("ForSequenceClassification") for kind in architecture.architectures or [])


def load_whole(name: str, *, task: Task, argument: str, **options: Any) -> PreTrainedModel:
    """The model in a folder or of a name. All its weights must come from there.

    `options` are from_pretrained's. A causal LM becomes a classifier with a new head and loses its lm_head;
    transformers reports that.

    Raises ValueError, which begins with `argument`, with the names of weights that are missing, have
    another shape, are unknown to the model, or hold NaN or inf.
    """
    new_head = task == "SEQ_CLS" and not names_classifier(
        AutoConfig.from_pretrained(name, trust_remote_code=False)
    )
    options |= {"trust_remote_code": False, "output_loading_info": True, "ignore_mismatched_sizes": True}
    loaded, found = _AUTO[task].from_pretrained(name, **options)
    model: PreTrainedModel = loaded
    missing = sorted(key for key in found["missing_keys"] if not (new_head and key.startswith(_HEAD)))
    shapes = sorted(
        f"{key} {list(there)} (expected {list(expected)})"
        for key, there, expected in found["mismatched_keys"]
    )
    unknown = [key for key in sorted(found["unexpected_keys"]) if _lies_inside(model, key)]
    kind = type(model).__name__
    for what, keys in {
        "lacks the weights": missing,
        "has other shapes of the weights": shapes,
        "has the unknown weights": unknown,
    }.items():
        if keys:
            more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
            raise ValueError(
                f"{argument}: got {name!r}, which {what} {', '.join(keys[:SHOWN])}{more}, expected those of "
                f"its config.json's {kind}"
            )
    if wrong := find_not_finite([*model.named_parameters(), *model.named_buffers()]):
        raise ValueError(f"{argument}: got {name!r}, of which {wrong}, expected finite numbers")
    return model


def _lies_inside(model: PreTrainedModel, key: str) -> bool:
    """Whether an unknown weight belongs to a known part, such as another layer.

    It is then no other head or image tower.
    """
    first, *rest = key.split(".")
    part = getattr(getattr(model, first, None), rest[0] if rest else "", None)
    # Older folders hold buffers too: position_ids, inv_freq.
    return part is not None and key.endswith((".weight", ".bias"))
