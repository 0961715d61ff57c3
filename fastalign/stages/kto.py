"""Kahneman-Tversky optimisation: a causal LM learns from completions judged good or bad, one by one.

fastalign kto model=runs/sft/model train_data=judged.jsonl output_dir=runs/kto beta=0.1 lora_rank=16 bf16=true
torchrun --nproc-per-node 8 -m fastalign.stages.kto --config kto.yaml

The point of reference is the KL divergence of policy and reference, estimated on prompts with other rows'
completions: over all rows of a step, whatever its micro-batches and ranks, with the weights as they are
before the step.
"""

from collections.abc import Sequence
from functools import partial
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastalign_kernels.preference.losses import kto_kl, kto_loss

from ..data.preference_pairs import Unpaired, collate_unpaired, mismatch, mismatch_bounds, tokenize_unpaired
from ..data.readers import load_rows
from ..data.sequence_batches import sequence_logps
from ..data.tokenization import turn_ends
from .adapters import load_architecture
from .batches import Batch, epoch_batches, held_out_batches, rows_of_step, total_steps
from .command import run_stage
from .distributed import World
from .estimate import announce
from .loading import check_fit, choose_attention, load_model, load_tokenizer, padding_id, stop_at
from .loop import LossFn, Prepare, start, train
from .packers import make_packer, pack_rows, without_dropout
from .reference_model import Reference, make_reference, parts_of
from .stage_configs import KTOConfig


def run(config: KTOConfig) -> dict[str, float]:
    """Align as configured; return the last line of metrics.jsonl, or nothing for a dry run.

    Raises ValueError for data, a tokenizer or a model that cannot be used, before the model is loaded.
    """
    with start(config) as world:
        attention = choose_attention(config, world)
        tokenizer = load_tokenizer(config.tokenizer or config.model)
        architecture = load_architecture(config.model)

        ends: list[int] = []

        def rows_of(source: str, split: str) -> list[Unpaired]:
            loaded = load_rows(source, split=split)
            tokenized = tokenize_unpaired(
                loaded, tokenizer, max_length=config.max_length, too_long=config.too_long
            )
            ends.extend(turn_ends(loaded, tokenizer))
            return tokenized

        def arrange(rows: list[Unpaired], step: int) -> list[Unpaired]:
            if config.loss_type != "kto" or not rows:
                return rows
            return mismatch(rows, seed=config.seed, step=step, max_length=config.max_length)

        rows = rows_of(config.train_data, config.train_split)
        steps = range(total_steps(config, len(rows)))
        if config.loss_type == "kto":
            check_steps(config, rows, steps)
        held_out = rows_of(config.eval_data, config.eval_split) if config.eval_data else []
        try:
            held_out = arrange(held_out, 0)
        except ValueError as error:
            raise ValueError(f"eval_data: {error}") from error
        sequences = [row.answered for row in [*rows, *held_out]]
        mismatches = [
            made
            for part in (rows, held_out)
            if part
            for made in mismatch_bounds(part, max_length=config.max_length)
        ]
        longest = check_fit(architecture, tokenizer, [[*sequences, *mismatches]])
        collate = partial(
            pack_rows, pad_id=padding_id(tokenizer, architecture), attention=attention, packing=config.packing
        )
        announce(
            config,
            world,
            parts_of(config, architecture),
            [[row.answered] for row in rows],
            collate=collate,
            upstream="logp",
        )
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
        to_batch = partial(collate_unpaired, packer=packer)
        batches_of = epoch_batches(rows, to_batch, config, world, arrange)
        evaluated = held_out_batches(held_out, to_batch, config, world)
        scored = (
            batch["both"] for batches in chain([evaluated], map(batches_of, steps)) for batch in batches
        )
        reference = make_reference(config, world, model, scored)
        return train(
            config,
            world,
            model,
            tokenizer,
            rows=len(rows),
            batches_of=batches_of,
            loss_fn=judged_loss(config),
            held_out=evaluated,
            count_items=lambda batch: len(batch["desirable"]),
            items_name="rows",
            prepare=with_reference(world, model, reference),
        )


def check_steps(config: KTOConfig, rows: Sequence[Unpaired], steps: Sequence[int]) -> None:
    """Raise ValueError for a step whose rows all have the same completion: none can be paired."""
    numbers = {completion: number for number, completion in enumerate({row.completion: None for row in rows})}
    completions = [numbers[row.completion] for row in rows]
    for step in steps:
        picked = rows_of_step(step, rows=len(rows), batch_size=config.batch_size, seed=config.seed)
        if len({completions[number] for number in picked}) < 2:
            raise ValueError(
                f"batch_size: got {config.batch_size}, with which all rows of step {step + 1} have the same "
                "completion, expected different ones, because KTO pairs a prompt with another row's; "
                f"{len(numbers)} of the {len(rows)} rows' completions differ: a larger batch_size or another "
                "seed may do"
            )


def with_reference(world: World, model: nn.Module, reference: Reference) -> Prepare:
    """Add each micro-batch's `reference` log-probabilities [S], and the step's `kl` and `counts` of labels.

    `kl` is in nats.

    Mismatched completions need no gradient. So the policy scores them in a separate forward pass, which
    keeps nothing; the reference scores both kinds in one.
    """

    def prepare(batches: Sequence[Batch]) -> Sequence[Batch]:
        references, policy_mismatched, reference_mismatched = [], [], []
        for batch in batches:
            logps = reference(world.place(batch["both"]))
            references.append(logps[: len(batch["desirable"])])
            if "mismatched" in batch:
                reference_mismatched.append(logps[len(batch["desirable"]) :])
                policy_mismatched.append(sequence_logps(model, world.place(batch["mismatched"])))
        kl = None
        if policy_mismatched:
            group = dist.group.WORLD if world.size > 1 else None
            kl = kto_kl(torch.cat(policy_mismatched), torch.cat(reference_mismatched), group=group)
        desirable = world.count(sum(int(batch["desirable"].sum()) for batch in batches))
        shared = {
            "kl": kl,
            "counts": (desirable, world.count(sum(len(batch["desirable"]) for batch in batches)) - desirable),
        }
        kept = [{name: batch[name] for name in ("answered", "desirable")} for batch in batches]
        return [batch | shared | {"reference": logps} for batch, logps in zip(kept, references, strict=True)]

    return prepare


def judged_loss(config: KTOConfig) -> LossFn:
    """The loss, each label's mean reward and log P (nats), their margin, and the KL divergence (nats).

    A label that the step lacks has no mean.
    """

    def loss_fn(model: nn.Module, batch: Batch, items: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logps = sequence_logps(model, batch["answered"])
        output = kto_loss(
            logps,
            batch["reference"],
            batch["desirable"],
            batch["kl"],
            beta=config.beta,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
            loss_type=config.loss_type,
            reduction="sum",
        )
        metrics = {}
        labels = {"chosen": batch["desirable"], "rejected": ~batch["desirable"]}
        for (name, has_label), count in zip(labels.items(), batch["counts"], strict=True):
            if count:
                metrics[f"rewards/{name}"] = (output.rewards * has_label).sum().double() / count
                metrics[f"logps/{name}"] = (logps.detach() * has_label).sum().double() / count
        if all(batch["counts"]):
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        if batch["kl"] is not None:
            metrics["kl"] = batch["kl"].double() * len(logps) / items
        return output.loss / items, metrics

    return loss_fn


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: `--config FILE key=value …`."""
    run_stage("kto", argv)


if __name__ == "__main__":
    main()
