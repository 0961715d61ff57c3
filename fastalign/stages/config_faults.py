"""What is refused of a configuration, and the lines that say so: unknown keys, and values of a wrong kind."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

NO_FP16 = (
    "expected bf16=true or dtype=bfloat16: the stages have no loss scale, without which gradients in fp16 "
    "underflow to 0"
)
# What other trainers call fields.
ELSEWHERE = {
    **{"lr": "learning_rate", "max_seq_length": "max_length", "max_seq_len": "max_length"},
    **{"sequence_length": "max_length", "max_length": "sequence_length"},
    **{"model_name_or_path": "model", "dataset": "train_data", "dataset_name": "train_data"},
    **{"num_train_epochs": "epochs", "num_epochs": "epochs", "lr_scheduler_type": "schedule"},
    **{"gradient_accumulation_steps": "micro_batch_size", "per_device_train_batch_size": "micro_batch_size"},
    **{"save_steps": "save_every", "eval_steps": "eval_every", "lora_r": "lora_rank"},
    **{"resume_from_checkpoint": "resume", "config": "--config FILE"},
    **{"max_completion_length": "max_new_tokens", "num_generations": "group_size", "reward_model": "reward"},
}


def refuse_unknown_keys(given: Iterable[str], allowed: Sequence[str]) -> None:
    """Raise ValueError for a key that does not exist, with the close ones.

    pydantic's extra="forbid" alone says just that the key is unexpected.
    """
    for key in given:
        if key == "fp16" and "bf16" in allowed:
            raise ValueError(f"fp16: got the key fp16, {NO_FP16}")
        if key not in allowed:
            raise ValueError(unknown_key(key, allowed))


def refuse_ambiguous_values(given: Mapping[str, Any], annotations: Mapping[str, Any]) -> None:
    """Raise ValueError for values that pydantic takes for others.

    It takes True for the number 1. An empty text, which a shell gives for a variable that is not set, passes
    for a name.
    """
    for key, value in given.items():
        kinds = {annotations[key], *get_args(annotations[key])}
        if isinstance(value, bool) and kinds & {int, float}:
            raise ValueError(f"{key}: got {value}, expected a number")
        if value == "" and str in kinds:
            raise ValueError(f"{key}: got an empty text, expected a value; leave {key} out for its default")


def unknown_key(key: str, allowed: Sequence[str]) -> str:
    """The message for a key that does not exist: the closest keys, or else all that are allowed."""
    elsewhere = ELSEWHERE.get(key, "")
    if elsewhere in allowed or elsewhere.startswith("--"):
        return f"got the unknown key {key!r}, expected {elsewhere}"
    close = difflib.get_close_matches(key, allowed, n=3)
    known = " or ".join(close) if close else f"one of {', '.join(sorted(allowed))}"
    return f"got the unknown key {key!r}, expected {known}"


def fault_line(fault: Any) -> str:
    """The line for one of pydantic's faults: `key: got X, expected Y`."""
    place = ".".join(str(part) for part in fault["loc"])
    message = fault["msg"].removeprefix("Value error, ")
    if not place:
        return str(message)
    if fault["type"] == "missing":
        return f"{place}: got no value, expected one"
    if message.startswith("Input should be "):
        expected = message.removeprefix("Input should be ").partition(", unable to ")[0]
        number = "a number " if expected.startswith(("greater", "less")) else ""
        return f"{place}: got {fault['input']!r}, expected {number}{expected}"
    return f"{place}: {message}"
