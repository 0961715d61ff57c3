"""The model that a run leaves: plain safetensors in output_dir/model, whatever the ranks hold of it."""

from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..peft_heads import save_weights
from .adapters import record_base
from .distributed import World
from .files import new_folder
from .sharding import state_to_save


def save_model(
    world: World,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    """Save the trained model, or its adapters, in folder/model, with the tokenizer.

    All ranks call it, and rank 0 writes.
    """
    state = state_to_save(model)
    if not world.main:
        return
    with new_folder(folder / "model") as unfinished:
        save_weights(model, unfinished, state_dict=state)
        record_base(model, unfinished)
        tokenizer.save_pretrained(str(unfinished))
