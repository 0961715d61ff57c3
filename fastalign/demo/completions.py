"""Completions of many prompts by a model, batch by batch."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from .. import rollout

GENERATED = 128  # completions in a batch


def draw(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], **options: Any
) -> Iterator[tuple[Sequence[str], dict[str, torch.Tensor], rollout.Rollout]]:
    """Completions of the prompts, batch by batch: the prompts, their tokens, and their Rollout.

    `options` are those of `rollout.generate`. A prompt's place in `prompts` keys its noise, which is the
    same for every model.
    """
    for first in range(0, len(prompts), GENERATED):
        batch = prompts[first : first + GENERATED]
        inputs = tokenizer(list(batch), return_tensors="pt", padding=True, return_token_type_ids=False)
        drawn = rollout.generate(
            model,
            inputs["input_ids"],
            inputs["attention_mask"],
            sequence_ids=torch.arange(first, first + len(batch)),
            eos_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
            **options,
        )
        yield batch, inputs, drawn
