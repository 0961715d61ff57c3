"""Pre-training: a causal LM on plain text, packed into full rows whose documents do not see each other.

    fastalign pretrain train_data=text.jsonl model_config='{model_type: llama, hidden_size: 256}' \\
        tokenizer=my-tokenizer output_dir=runs/base sequence_length=1024 learning_rate=1e-3 bf16=true
    torchrun --nproc-per-node 8 -m fastalign.stages.pretrain --config base.yaml
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.packing import pack
from ..data.rows import Rows
from ..data.tokenization import tokenize_text
from ..data.tokens import Tokenized
from .batches import epoch_batches, held_out_batches
from .command import run_stage
from .estimate import Part, announce
from .loop import language_model_loss, start, train
from .models.adapters import load_architecture
from .models.loading import (
    check_fit,
    choose_attention,
    load_model,
    load_tokenizer,
    padding_id,
    scratch_config,
)
from .packers import collate_rows
from .stage_configs import PretrainConfig
from .stage_rows import read_rows


def run(config: PretrainConfig) -> dict[str, float]:
    """Pre-train as configured; return the last line of metrics.jsonl, or nothing for a dry run.

    Raises ValueError for data, a tokenizer or a model that cannot be used, before the model is loaded.
    """
    with start(config) as world:
        attention = choose_attention(config, world)
        tokenizer = load_tokenizer(config.tokenizer or str(config.model))
        architecture = (
            load_architecture(config.model)
            if config.model is not None
            else scratch_config(config.model_config or {}, tokenizer, length=config.sequence_length)
        )
        tokenize = partial(
            pack_text,
            tokenizer=tokenizer,
            max_length=config.sequence_length,
            column=config.text_column,
            too_long=config.too_long,
        )
        rows = read_rows(config, world, tokenizer, tokenize, generates=False)
        check_fit(architecture, tokenizer, rows.both)
        length = config.sequence_length if config.compile else None  # one shape is compiled once
        to_batch = partial(
            collate_rows, pad_id=padding_id(tokenizer, architecture), length=length, attention=attention
        )
        announce(config, world, [Part("model", architecture)], rows.train, collate=to_batch)
        if config.dry_run:
            return {}
        model = load_model(
            config, world, architecture, weights=config.model, attention=attention, packed=True
        )
        return train(
            config,
            world,
            model,
            tokenizer,
            rows=len(rows.train),
            batches_of=epoch_batches(rows.train, to_batch, config, world),
            loss_fn=language_model_loss,
            held_out=held_out_batches(rows.held_out, to_batch, config, world),
        )


def pack_text(
    loaded: Rows, tokenizer: PreTrainedTokenizerBase, *, max_length: int, **options: Any
) -> list[list[Tokenized]]:
    """Documents packed into rows of at most `max_length` tokens; options are those of `tokenize_text`."""
    documents = tokenize_text(loaded, tokenizer, max_length=max_length, **options)
    lengths = [len(document.input_ids) for document in documents]
    return [[documents[number] for number in row] for row in pack(lengths, max_length)]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: `--config FILE key=value …`."""
    run_stage("pretrain", run, argv)


if __name__ == "__main__":
    main()
