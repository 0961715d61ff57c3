"""A tokenizer with a chat template, and what its tests read off tokenized rows."""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    PreTrainedTokenizerFast,
)

from fastalign.data import Tokenized

CORPUS = ["The film was great, really great.", "What did you think of the film?", "user assistant system\n\n"]


HEADER = "<|im_start|>{{ m['role'] }}\n"


PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


CHATML = "{% for m in messages %}" + HEADER + "{{ m['content'] }}<|im_end|>\n{% endfor %}" + PROMPT


MARKED = (
    "{% for m in messages %}"
    + HEADER
    + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}" + PROMPT
)


def build(template: str | None = None, *, bos: bool = False, trim: bool = False) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|im_end|>", "<|im_start|>", "<|bos|>"]
    core.train_from_iterator(
        CORPUS * 10,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    core.post_processor = processors.ByteLevel(trim_offsets=trim)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        bos_token="<|bos|>" if bos else None,
        chat_template=template,
    )


def trained_text(tokenizer: PreTrainedTokenizerFast, sequence: Tokenized) -> str:
    return str(tokenizer.decode([token for token, train in zip(*sequence, strict=True) if train]))


def sequence(*ids: int, trained: Sequence[bool] | None = None) -> Tokenized:
    return Tokenized(list(ids), [False] + [True] * (len(ids) - 1) if trained is None else list(trained))
