"""A tokenizer for a model from scratch: byte-level BPE, trained on the text that the model will read.

fastalign tokenizer train_data=text.jsonl output_dir=runs/tokenizer vocab_size=8192
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ..data.readers import load_rows
from ..data.rows import need_columns, read_each
from ..data.texts import read_text
from .command import run_stage
from .runs.files import new_folder
from .stage_configs import ROLES, TokenizerConfig

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
# One token opens a turn, EOS ends it: what ends a document in pre-training ends an answer too.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% if tools %}"
    "{{ raise_exception('this chat template has no place for tools') }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] or message['tool_calls'] %}"
    "{{ raise_exception('this chat template takes turns of system, user and assistant "
    "without tool calls') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def run(config: TokenizerConfig) -> PreTrainedTokenizerFast:
    """Train and save a tokenizer as configured.

    Raises ValueError for data that cannot be used and an output_dir that holds files.
    """
    folder = Path(config.output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"output_dir: got {config.output_dir!r}, which holds files, expected a new or empty folder"
        )
    rows = load_rows(config.train_data, split=config.train_split)
    need_columns(rows, config.text_column)
    texts = read_each(
        rows, [config.text_column], lambda row: read_text(config.text_column, row[config.text_column])
    )
    turns = [f"<|{role}|>" for role in ROLES]
    tokenizer = train_tokenizer(texts, config.vocab_size, chat_template=CHAT_TEMPLATE, special_tokens=turns)
    with new_folder(folder) as unfinished:
        tokenizer.save_pretrained(str(unfinished))
    fewer = (
        ""
        if len(tokenizer) == config.vocab_size
        else f" (vocab_size={config.vocab_size}, but the text has no more pairs to merge)"
    )
    print(
        f"{config.output_dir}: a tokenizer of {len(tokenizer)} tokens{fewer}, from {len(rows)} rows",
        flush=True,
    )
    return tokenizer


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, chat_template: str, special_tokens: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, which gives any text back unchanged.

    BOS goes before a text, and the chat template adds an EOS.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD, *special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: `--config FILE key=value …`."""
    run_stage("tokenizer", run, argv)


if __name__ == "__main__":
    main()
