"""Scores of completions by a sequence classifier of transformers.

A decoder that reads the policy's tokens scores them as they are. Another classifier, with its own
tokenizer, reads the text.
"""

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ...classifier import score_packed
from ...data.chat_template.trained_spans import ChatTemplate
from ...data.sequence_batches import last_tokens, pack_sequences
from ...data.tokens import Prompt, Tokenized
from ...rope import rope_switch
from ..models.adapters import find_source, is_classifier, load_architecture, load_plain
from ..models.loading import load_on_main, load_tokenizer, padding_id
from ..models.main_values import has_values
from ..models.sharding import shard, whole
from ..runs.distributed import World
from .reward_functions import Reward

_NO_LIMIT = 10**9  # transformers writes 10**30 where a tokenizer has no model_max_length


class Classifier(NamedTuple):
    """A sequence classifier that is not loaded yet."""

    folder: str
    architecture: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    label: int
    """The label whose logit is the score."""
    labels: int

    def reads(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether it reads the tokens that `tokenizer` writes."""
        return bool(self.tokenizer.get_vocab() == tokenizer.get_vocab())


def find_classifier(reward: str, label: int | None) -> Classifier:
    """The classifier in a folder or of a name.

    Raises ValueError for another kind of model or an unknown label.
    """
    tokenizer = load_tokenizer(reward)
    architecture = load_architecture(reward, task="SEQ_CLS", argument="reward")
    if not is_classifier(find_source(reward), architecture):
        kinds = ", ".join(architecture.architectures or [])
        raise ValueError(
            f"reward: got {reward!r}, which holds {kinds or 'no architecture'}, expected a sequence "
            "classifier"
        )
    labels = architecture.id2label
    if label is None and len(labels) > 1 or label is not None and label not in labels:
        known = ", ".join(f"{number} ({name})" for number, name in labels.items())
        raise ValueError(f"reward_label: got {label}, expected the number of a label of {reward!r}: {known}")
    return Classifier(reward, architecture, tokenizer, label or 0, len(labels))


def load_classifier(
    classifier: Classifier,
    world: World,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype,
    rows: int,
    attention: str,
    packing: bool,
) -> Reward:
    """Scores by the classifier, `rows` sequences at a time.

    It scores tokens if it reads those of `tokenizer`, else text.
    """
    load = partial(load_plain, classifier.folder, task="SEQ_CLS", argument="reward", dtype=dtype)
    model = load_on_main(world, partial(load, num_labels=classifier.labels))
    model.eval().requires_grad_(False)
    if world.sharding is None:
        model.to(device=world.device)
    of_tokens = classifier.reads(tokenizer) and hasattr(model, "score")
    if of_tokens:
        score_packed(model, verify=has_values(model))
    shard(world.sharding, model)
    template = ChatTemplate(classifier.tokenizer) if classifier.tokenizer.chat_template else None
    if hasattr(model, "score"):
        # transformers counts its positions from the first token, padding or not, and finds the last token by
        # its id. Padding on the left would move the tokens of shorter texts.
        classifier.tokenizer.padding_side = "right"
    padding = model.config.get_text_config().pad_token_id
    pad_id = padding_id(tokenizer, model.config) if padding is None else padding
    if padding is None and not of_tokens:
        # transformers finds the last token by it
        model.config.get_text_config().pad_token_id = classifier.tokenizer.pad_token_id
    limit = text_limit(classifier)

    def inputs_of(prompts: Sequence[Prompt], completions: Sequence[list[int]]) -> Mapping[str, Any]:
        if not of_tokens:
            texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
            return _encode(classifier.tokenizer, template, prompts, texts, limit)
        ids = [prompt.input_ids + completion for prompt, completion in zip(prompts, completions, strict=True)]
        sequences = [Tokenized(sequence, [False] * len(sequence)) for sequence in ids]
        packed = pack_sequences(sequences, pad_id=pad_id, attention=attention, packing=packing)
        inputs = {name: value for name, value in packed["arguments"].items() if name != "labels"}
        return inputs | {"ends": last_tokens(packed, pad_id=pad_id), "use_cache": False}

    @torch.no_grad()
    def score(prompts: Sequence[Prompt], completions: Sequence[list[int]]) -> Tensor:
        parts = [slice(first, first + rows) for first in range(0, len(prompts), rows)]
        with whole(model):
            inputs = (world.place(inputs_of(prompts[part], completions[part])) for part in parts)
            logits = [model(**arguments).logits for arguments in inputs]
        return torch.cat(logits)[:, classifier.label].double().cpu()

    return score


def check_classifier(
    classifier: Classifier,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
) -> None:
    """Raise ValueError if a classifier that reads text with its own tokenizer cannot score the prompts.

    The classifier is not loaded yet. It needs a pad token, by which it pads and finds last tokens; a chat
    template for messages; and room for each prompt with a completion of max_new_tokens, which is assumed to
    have as many tokens there as in the policy's tokenizer.
    """
    if classifier.reads(tokenizer) and hasattr(_on_meta(classifier), "score"):
        return
    reader, text = classifier.tokenizer, classifier.architecture.get_text_config()
    name = f"reward: {classifier.folder!r}"
    pad = reader.pad_token_id
    if pad is None or pad >= text.vocab_size:
        raise ValueError(
            f"{name}: got the pad token id {pad} in its tokenizer, expected one in [0, {text.vocab_size}): "
            "set pad_token and save it"
        )
    if text.pad_token_id not in (None, pad):
        raise ValueError(
            f"{name}: got the pad token id {pad} in its tokenizer and {text.pad_token_id} in its config, "
            "expected the same"
        )
    if isinstance(prompts[0].row["prompt"], list) and not reader.chat_template:
        raise ValueError(
            f"{name}: got a tokenizer without a chat template, expected one with it, because the prompts are "
            "messages"
        )
    limit = text_limit(classifier)
    template = ChatTemplate(reader) if reader.chat_template else None
    longest = max(_encode(reader, template, [prompt], [""], None)["input_ids"].shape[1] for prompt in prompts)
    if limit is not None and longest + max_new_tokens > limit:
        raise ValueError(
            f"{name}: got a prompt of {longest} of its tokens and a completion of {max_new_tokens}, expected "
            f"at most {limit} together: lower max_prompt_length or max_new_tokens"
        )


def text_limit(classifier: Classifier) -> int | None:
    """The most tokens of a text that a classifier reads; None if nothing bounds them."""
    text = classifier.architecture.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None:
        tables = [
            part
            for name, part in _on_meta(classifier).named_modules()
            if name.endswith("position_embeddings")
        ]
        padding = [part.padding_idx for part in tables if getattr(part, "padding_idx", None) is not None]
        positions -= padding[0] + 1 if padding else 0  # RoBERTa's positions begin behind the padding's
    switch = rope_switch(text)
    limits = (positions, None if switch is None else switch.tokens, classifier.tokenizer.model_max_length)
    limit = min(number for number in limits if number is not None)
    return limit if limit < _NO_LIMIT else None


def _on_meta(classifier: Classifier) -> PreTrainedModel:
    """The classifier's modules, without memory for weights."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(
            classifier.architecture, trust_remote_code=False
        )
    return model


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate | None,
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    limit: int | None,
) -> Mapping[str, Any]:
    """Whole conversations in a classifier's own tokens, at most `limit` of each.

    Messages need its chat template.
    """
    chat = isinstance(prompts[0].row["prompt"], list)
    if chat:
        template = template or ChatTemplate(tokenizer)  # which says that there is none
        texts = [
            template.answered(prompt.row, text) for prompt, text in zip(prompts, completions, strict=True)
        ]
    else:
        texts = [prompt.row["prompt"] + text for prompt, text in zip(prompts, completions, strict=True)]
    options: dict[str, Any] = {"return_tensors": "pt", "padding": True, "add_special_tokens": not chat}
    encoded = tokenizer(texts, **options)
    if limit is not None and encoded["input_ids"].shape[1] > limit:
        warnings.warn(
            f"reward: conversations of more than the {limit} tokens that the classifier reads are cut at "
            "the right",
            stacklevel=2,
        )
        encoded = tokenizer(texts, truncation=True, max_length=limit, **options)
    return dict(encoded)
