"""Direct preference optimisation: a causal LM learns to prefer the chosen completions of pairs.

fastalign dpo model=runs/sft/model train_data=pairs.jsonl output_dir=runs/dpo beta=0.1 lora_rank=16 bf16=true
torchrun --nproc-per-node 8 -m fastalign.stages.dpo --config dpo.yaml
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fastalign_kernels.preference.formulas import PAIR_LOSSES
from fastalign_kernels.preference.losses import dpo_loss

from ..data.preference_pairs import Pair, collate_pairs, tokenize_pairs
from ..data.readers import load_rows
from ..data.sequence_batches import sequence_logps
from ..data.tokenization import turn_ends
from .adapters import load_architecture
from .batches import Batch, epoch_batches, held_out_batches, total_steps
from .command import run_stage
from .estimate import announce
from .loading import check_fit, choose_attention, load_model, load_tokenizer, padding_id, stop_at
from .loop import LossFn, start, train
from .packers import make_packer, pack_rows, without_dropout
from .reference_model import Reference, make_reference, parts_of
from .stage_configs import DPOConfig


def run(config: DPOConfig) -> dict[str, float]:
    """Align as configured; return the last line of metrics.jsonl, or nothing for a dry run.

    Raises ValueError for data, a tokenizer or a model that cannot be used, before the model is loaded.
    """
    with start(config) as world:
        attention = choose_attention(config, world)
        tokenizer = load_tokenizer(config.tokenizer or config.model)
        architecture = load_architecture(config.model)

        ends: list[int] = []

        def rows_of(source: str, split: str) -> list[Pair]:
            loaded = load_rows(source, split=split)
            tokenized = tokenize_pairs(
                loaded, tokenizer, max_length=config.max_length, too_long=config.too_long
            )
            ends.extend(turn_ends(loaded, tokenizer))
            return tokenized

        rows = rows_of(config.train_data, config.train_split)
        held_out = rows_of(config.eval_data, config.eval_split) if config.eval_data else []
        longest = check_fit(
            architecture, tokenizer, [[pair.chosen, pair.rejected] for pair in [*rows, *held_out]]
        )
        collate = partial(
            pack_rows, pad_id=padding_id(tokenizer, architecture), attention=attention, packing=config.packing
        )
        both = [[pair.chosen, pair.rejected] for pair in rows]
        announce(config, world, parts_of(config, architecture), both, collate=collate, upstream="logp")
        if config.dry_run:
            return {}
        model = load_model(
            config, world, architecture, weights=config.model, attention=attention, packed=config.packing
        )
        stop_at(model, ends)
        without_dropout(model)
        packer = make_packer(
            config,
            world,
            model,
            attention=attention,
            pad_id=padding_id(tokenizer, architecture),
            longest=longest,
        )
        to_batch = partial(collate_pairs, packer=packer)
        batches_of = epoch_batches(rows, to_batch, config, world)
        evaluated = held_out_batches(held_out, to_batch, config, world)
        # Later epochs have the rows of the first.
        first_epoch = range(min(total_steps(config, len(rows)), math.ceil(len(rows) / config.batch_size)))
        scored = (
            batch["both"] for batches in chain([evaluated], map(batches_of, first_epoch)) for batch in batches
        )
        return train(
            config,
            world,
            model,
            tokenizer,
            rows=len(rows),
            batches_of=batches_of,
            loss_fn=preference_loss(config, make_reference(config, world, model, scored)),
            held_out=evaluated,
            count_items=lambda batch: len(batch["both"]["places"]) // 2,
            items_name="pairs",
        )


def check_options(config: DPOConfig) -> None:
    """Raise ValueError for options of the loss that exclude each other."""
    logps, lengths = torch.zeros(4, 1), torch.ones(2, 1, dtype=torch.int64)
    pair_loss(config, *logps, *lengths)


def preference_loss(config: DPOConfig, reference: Reference) -> LossFn:
    """The loss, and means over pairs of rewards, their margin and accuracy, and log P in nats."""

    def loss_fn(model: nn.Module, batch: Batch, items: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        # The reference runs first: switching adapters off and on between a forward pass and its backward
        # pass is a risk.
        reference_chosen, reference_rejected = reference(batch["both"]).chunk(2)
        chosen, rejected = sequence_logps(model, batch["both"]).chunk(2)
        output = pair_loss(
            config, chosen, rejected, reference_chosen, reference_rejected, *batch["both"]["lengths"].chunk(2)
        )
        sums = {
            "rewards/chosen": output.chosen_rewards.sum(),
            "rewards/rejected": output.rejected_rewards.sum(),
            "rewards/margins": (output.chosen_rewards - output.rejected_rewards).sum(),
            "rewards/accuracies": (output.chosen_rewards > output.rejected_rewards).sum(),
            "logps/chosen": chosen.detach().sum(),
            "logps/rejected": rejected.detach().sum(),
        }
        return output.loss / items, {name: total.double() / items for name, total in sums.items()}

    return loss_fn


def pair_loss(
    config: DPOConfig,
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
) -> Any:
    """dpo_loss as configured, summed over pairs, with the lengths (in tokens) if the loss takes them."""
    lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    return dpo_loss(
        chosen,
        rejected,
        reference_chosen,
        reference_rejected,
        beta=config.beta,
        loss_type=config.loss_type,
        label_smoothing=config.label_smoothing,
        reduction="sum",
        **(lengths if PAIR_LOSSES[config.loss_type].lengths != "refused" else {}),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: `--config FILE key=value …`."""
    run_stage("dpo", argv)


if __name__ == "__main__":
    main()
