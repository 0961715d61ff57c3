"""Supervised fine-tuning: a causal LM on conversations or prompts with completions; the answers are trained.

fastalign sft model=my-model train_data=chats.jsonl output_dir=runs/sft max_length=2048 bf16=true
torchrun --nproc-per-node 8 -m fastalign.stages.sft --config sft.yaml
"""

from collections.abc import Sequence
from functools import partial

from ..data.packing import collate, pack
from ..data.readers import load_rows
from ..data.tokenization import tokenize_sft, turn_ends
from ..data.tokens import Tokenized
from .adapters import load_architecture
from .batches import epoch_batches, held_out_batches, micro_batch_size
from .command import run_stage
from .estimate import Part, announce
from .loading import check_fit, choose_attention, load_model, load_tokenizer, padding_id, stop_at
from .loop import language_model_loss, start, train
from .stage_configs import SFTConfig


def run(config: SFTConfig) -> dict[str, float]:
    """Fine-tune as configured; return the last line of metrics.jsonl, or nothing for a dry run.

    Raises ValueError for data, a tokenizer or a model that cannot be used, before the model is loaded.
    """
    with start(config) as world:
        attention = choose_attention(config, world)
        tokenizer = load_tokenizer(config.tokenizer or config.model)
        architecture = load_architecture(config.model)

        ends: list[int] = []

        def rows_of(source: str, split: str) -> list[list[Tokenized]]:
            loaded = load_rows(source, split=split)
            examples = tokenize_sft(loaded, tokenizer, max_length=config.max_length, too_long=config.too_long)
            ends.extend(turn_ends(loaded, tokenizer))
            if not config.packing:
                return [[example] for example in examples]
            lengths = [len(example.input_ids) for example in examples]
            return [[examples[number] for number in row] for row in pack(lengths, config.max_length)]

        rows = rows_of(config.train_data, config.train_split)
        held_out = rows_of(config.eval_data, config.eval_split) if config.eval_data else []
        alone = not config.packing and micro_batch_size(config, world) == 1
        check_fit(architecture, tokenizer, [*rows, *held_out], alone=alone)
        to_batch = partial(collate, pad_id=padding_id(tokenizer, architecture), attention=attention)
        announce(config, world, [Part("model", architecture)], rows, collate=to_batch)
        if config.dry_run:
            return {}
        model = load_model(
            config, world, architecture, weights=config.model, attention=attention, packed=config.packing
        )
        stop_at(model, ends)
        return train(
            config,
            world,
            model,
            tokenizer,
            rows=len(rows),
            batches_of=epoch_batches(rows, to_batch, config, world),
            loss_fn=language_model_loss,
            held_out=held_out_batches(held_out, to_batch, config, world),
        )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: `--config FILE key=value …`."""
    run_stage("sft", argv)


if __name__ == "__main__":
    main()
