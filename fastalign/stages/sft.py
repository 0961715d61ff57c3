"""Supervised fine-tuning: a causal LM on conversations or prompts with completions; the answers are trained.

fastalign sft model=my-model train_data=chats.jsonl output_dir=runs/sft max_length=2048 bf16=true
torchrun --nproc-per-node 8 -m fastalign.stages.sft --config sft.yaml
"""

from collections.abc import Sequence
from functools import partial

from transformers import PreTrainedTokenizerBase

from ..data.packing import pack
from ..data.rows import Rows
from ..data.tokenization import TooLong, tokenize_sft
from ..data.tokens import Tokenized
from .batches import epoch_batches, held_out_batches, micro_batch_size
from .command import run_stage
from .estimate import Part, announce
from .loop import language_model_loss, start, train
from .models.adapters import load_architecture
from .models.loading import check_fit, choose_attention, load_model, load_tokenizer, padding_id, stop_at
from .packers import collate_rows
from .stage_configs import SFTConfig
from .stage_rows import read_rows


def run(config: SFTConfig) -> dict[str, float]:
    """Fine-tune as configured; return the last line of metrics.jsonl, or nothing for a dry run.

    Raises ValueError for data, a tokenizer or a model that cannot be used, before the model is loaded.
    """
    with start(config) as world:
        attention = choose_attention(config, world)
        tokenizer = load_tokenizer(config.tokenizer or config.model)
        architecture = load_architecture(config.model)
        tokenize = partial(
            pack_answers,
            tokenizer=tokenizer,
            max_length=config.max_length,
            too_long=config.too_long,
            packing=config.packing,
        )
        rows = read_rows(config, world, tokenizer, tokenize)
        alone = not config.packing and micro_batch_size(config, world) == 1
        check_fit(architecture, tokenizer, rows.both, alone=alone)
        to_batch = partial(collate_rows, pad_id=padding_id(tokenizer, architecture), attention=attention)
        announce(config, world, [Part("model", architecture)], rows.train, collate=to_batch)
        if config.dry_run:
            return {}
        model = load_model(
            config, world, architecture, weights=config.model, attention=attention, packed=config.packing
        )
        stop_at(model, rows.ends)
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


def pack_answers(
    loaded: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    too_long: TooLong,
    packing: bool,
) -> list[list[Tokenized]]:
    """Demonstrations, each in a row of its own or packed into rows of at most `max_length` tokens."""
    examples = tokenize_sft(loaded, tokenizer, max_length=max_length, too_long=too_long)
    if not packing:
        return [[example] for example in examples]
    lengths = [len(example.input_ids) for example in examples]
    return [[examples[number] for number in row] for row in pack(lengths, max_length)]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: `--config FILE key=value …`."""
    run_stage("sft", run, argv)


if __name__ == "__main__":
    main()
