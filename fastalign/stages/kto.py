"""Kahneman-Tversky optimisation: a causal LM learns from completions judged good or bad, one by one.

fastalign kto model=runs/sft/model train_data=judged.jsonl output_dir=runs/kto beta=0.1 lora_rank=16 bf16=true
torchrun --nproc-per-node 8 -m fastalign.stages.kto --config kto.yaml

The point of reference is the KL divergence of policy and reference, estimated on prompts with other rows'
completions: over all rows of a step, whatever its micro-batches and ranks, with the weights as they are
before the step.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from fastalign_kernels.preference.losses import kto_kl, kto_loss

from ..data.preference_pairs import Unpaired, collate_unpaired, mismatch, mismatch_bounds, tokenize_unpaired
from ..data.sequence_batches import sequence_logps
from ..data.tokens import Tokenized
from .batches import (
    Batch,
    epoch_batches,
    held_out_batches,
    rows_of_step,
    sequences_to_score,
    total_steps,
)
from .command import run_stage
from .estimate import announce
from .loop import LossFn, Prepare, start, train
from .models.adapters import load_architecture
from .models.loading import check_fit, choose_attention, load_model, load_tokenizer, padding_id, stop_at
from .models.reference_model import Reference, make_reference, parts_of
from .packers import make_packer, pack_rows, without_dropout
from .runs.distributed import World
from .stage_configs import KTOConfig
from .stage_rows import read_rows

Arrange = Callable[[list[Unpaired], int], list[Unpaired]]


def run(config: KTOConfig) -> dict[str, float]:
    """Align as configured; return the last line of metrics.jsonl, or nothing for a dry run.

    Raises ValueError for data, a tokenizer or a model that cannot be used, before the model is loaded.
    """
    with start(config) as world:
        attention = choose_attention(config, world)
        tokenizer = load_tokenizer(config.tokenizer or config.model)
        architecture = load_architecture(config.model)

        tokenize = partial(
            tokenize_unpaired, tokenizer=tokenizer, max_length=config.max_length, too_long=config.too_long
        )
        rows = read_rows(config, world, tokenizer, tokenize)
        steps = range(total_steps(config, len(rows.train)))
        arrange = pair_completions(config, rows.train, steps)
        held_out = arrange_held_out(arrange, rows.held_out)
        longest = check_fit(architecture, tokenizer, [all_sequences(config, rows.train, held_out)])
        pad_id = padding_id(tokenizer, architecture)
        collate = partial(pack_rows, pad_id=pad_id, attention=attention, packing=config.packing)
        parts, answered = parts_of(config, architecture), [[row.answered] for row in rows.train]
        announce(config, world, parts, answered, collate=collate, upstream="logp")
        if config.dry_run:
            return {}
        model = load_model(
            config, world, architecture, weights=config.model, attention=attention, packed=config.packing
        )
        stop_at(model, rows.ends)
        without_dropout(model)
        packer = make_packer(config, world, model, attention=attention, pad_id=pad_id, longest=longest)
        to_batch = partial(collate_unpaired, packer=packer)
        batches_of = epoch_batches(rows.train, to_batch, config, world, arrange)
        evaluated = held_out_batches(held_out, to_batch, config, world)
        scored = sequences_to_score(evaluated, batches_of, steps)
        reference = make_reference(config, world, model, scored)
        return train(
            config,
            world,
            model,
            tokenizer,
            rows=len(rows.train),
            batches_of=batches_of,
            loss_fn=judged_loss(config),
            held_out=evaluated,
            count_items=lambda batch: len(batch["desirable"]),
            items_name="rows",
            prepare=with_reference(world, model, reference),
        )


def pair_completions(config: KTOConfig, rows: Sequence[Unpaired], steps: Sequence[int]) -> Arrange:
    """A function that adds to each row of a step another row's completion, if the loss has a KL term.

    Raises ValueError for a step in which that is impossible.
    """
    if config.loss_type != "kto":
        return lambda picked, step: picked
    check_steps(config, rows, steps)

    def arrange(picked: list[Unpaired], step: int) -> list[Unpaired]:
        return mismatch(picked, seed=config.seed, step=step, max_length=config.max_length) if picked else []

    return arrange


def arrange_held_out(arrange: Arrange, held_out: Sequence[Unpaired]) -> list[Unpaired]:
    """The held-out rows, arranged as those of step 0. Raises ValueError that names eval_data."""
    try:
        return arrange([*held_out], 0)
    except ValueError as error:
        raise ValueError(f"eval_data: {error}") from error


def all_sequences(
    config: KTOConfig, train: Sequence[Unpaired], held_out: Sequence[Unpaired]
) -> list[Tokenized]:
    """All sequences that the model may see: each row's own, and the bounds of the mismatched ones."""
    answered = [row.answered for row in [*train, *held_out]]
    parts = [part for part in (train, held_out) if part]
    bounds = (mismatch_bounds(part, max_length=config.max_length) for part in parts)
    return [*answered, *chain.from_iterable(bounds)]


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
        mismatching = any("mismatched" in batch for batch in batches)
        for batch in batches:
            logps = reference(world.place(batch["both"]))
            references.append(logps[: len(batch["desirable"])])
            if mismatching:
                # Of an empty micro-batch both are empty.
                mismatched = batch.get("mismatched", batch["answered"])
                reference_mismatched.append(logps[len(batch["desirable"]) :])
                policy_mismatched.append(sequence_logps(model, world.place(mismatched)))
        kl = None
        if policy_mismatched:
            kl = kto_kl(torch.cat(policy_mismatched), torch.cat(reference_mismatched), group=world.dp_group)
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
    run_stage("kto", run, argv)


if __name__ == "__main__":
    main()
