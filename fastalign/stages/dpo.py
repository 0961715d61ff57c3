"""Direct preference optimisation: a causal LM learns to prefer the chosen completions of pairs.

ORPO, SimPO and CPO (loss_type) take no reference: none is loaded, and no pass of one runs.

fastalign dpo model=runs/sft/model train_data=pairs.jsonl output_dir=runs/dpo beta=0.1 lora_rank=16 bf16=true
fastalign dpo model=runs/sft/model train_data=pairs.jsonl output_dir=runs/simpo loss_type=simpo beta=2 gamma=1
torchrun --nproc-per-node 8 -m fastalign.stages.dpo --config dpo.yaml
"""

import math
from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from ..data.preference_pairs import collate_pairs, sequences_of, tokenize_pairs
from ..data.sequence_batches import sequence_logps
from .batches import Batch, epoch_batches, held_out_batches, sequences_to_score, total_steps
from .command import run_stage
from .estimate import Part, announce
from .loop import LossFn, start, train
from .models.adapters import load_architecture
from .models.loading import check_fit, choose_attention, load_model, load_tokenizer, padding_id, stop_at
from .models.reference_model import Reference, make_reference, parts_of
from .packers import make_packer, pack_rows, without_dropout
from .pair_loss import pair_loss
from .stage_configs import DPOConfig
from .stage_rows import read_rows


def run(config: DPOConfig) -> dict[str, float]:
    """Align as configured; return the last line of metrics.jsonl, or nothing for a dry run.

    Raises ValueError for data, a tokenizer or a model that cannot be used, before the model is loaded.
    """
    with start(config) as world:
        attention = choose_attention(config, world)
        tokenizer = load_tokenizer(config.tokenizer or config.model)
        architecture = load_architecture(config.model)

        tokenize = partial(
            tokenize_pairs, tokenizer=tokenizer, max_length=config.max_length, too_long=config.too_long
        )
        rows = read_rows(config, world, tokenizer, tokenize)
        longest = check_fit(architecture, tokenizer, sequences_of(rows.both))
        pad_id = padding_id(tokenizer, architecture)
        collate = partial(pack_rows, pad_id=pad_id, attention=attention, packing=config.packing)
        parts = [Part("model", architecture)] if config.reference_free else parts_of(config, architecture)
        announce(config, world, parts, sequences_of(rows.train), collate=collate, upstream="logp")
        if config.dry_run:
            return {}
        model = load_model(
            config, world, architecture, weights=config.model, attention=attention, packed=config.packing
        )
        stop_at(model, rows.ends)
        without_dropout(model)
        packer = make_packer(config, world, model, attention=attention, pad_id=pad_id, longest=longest)
        to_batch = partial(collate_pairs, packer=packer)
        batches_of = epoch_batches(rows.train, to_batch, config, world)
        evaluated = held_out_batches(rows.held_out, to_batch, config, world)
        reference = None
        if not config.reference_free:
            # Later epochs have the rows of the first.
            epoch = math.ceil(len(rows.train) / config.batch_size)
            scored = sequences_to_score(
                evaluated, batches_of, range(min(total_steps(config, len(rows.train)), epoch))
            )
            reference = make_reference(config, world, model, scored)
        return train(
            config,
            world,
            model,
            tokenizer,
            rows=len(rows.train),
            batches_of=batches_of,
            loss_fn=preference_loss(config, reference),
            held_out=evaluated,
            count_items=lambda batch: len(batch["both"]["places"]) // 2,
            items_name="pairs",
        )


def preference_loss(config: DPOConfig, reference: Reference | None) -> LossFn:
    """The loss, and means over pairs of rewards, their margin and accuracy, and log P in nats."""
    options = config.loss_options

    def loss_fn(model: nn.Module, batch: Batch, items: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        # The reference runs first: switching adapters off and on between a forward pass and its backward
        # pass is a risk.
        reference_logps = () if reference is None else reference(batch["both"]).chunk(2)
        chosen, rejected = sequence_logps(model, batch["both"]).chunk(2)
        output = pair_loss(
            [chosen, rejected, *reference_logps],
            batch["both"]["lengths"].chunk(2),
            **options,
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


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: `--config FILE key=value …`."""
    run_stage("dpo", run, argv)


if __name__ == "__main__":
    main()
