"""A reward model: a sequence classifier that learns to score the chosen completion above the rejected one.

fastalign reward model=my-model train_data=pairs.jsonl output_dir=runs/reward bf16=true
torchrun --nproc-per-node 8 -m fastalign.stages.reward --config reward.yaml
"""

from collections.abc import Sequence
from functools import partial

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastalign_kernels.preference.losses import reward_loss

from ..data.preference_pairs import Pair, collate_pairs, sequences_of, tokenize_pairs
from ..data.sequence_batches import last_tokens
from ..data.shared_prefix import model_arguments
from .batches import Batch, epoch_batches, held_out_batches
from .command import run_stage
from .estimate import Part, announce
from .loop import LossFn, start, train
from .models.adapters import load_architecture
from .models.loading import check_fit, choose_attention, load_model, load_tokenizer, padding_id
from .packers import make_packer, pack_rows, without_dropout
from .stage_configs import RewardConfig
from .stage_rows import read_rows


def run(config: RewardConfig) -> dict[str, float]:
    """Train a reward model as configured; return the last line of metrics.jsonl, or nothing for a dry run.

    The score of a sequence is the classifier's at its last token. A model without a padding token gets the
    tokenizer's, by which transformers finds the last token in a padded batch. Raises ValueError for data, a
    tokenizer or a model that cannot be used, before the model is loaded.
    """
    with start(config) as world:
        attention = choose_attention(config, world)
        tokenizer = load_tokenizer(config.tokenizer or config.model)
        architecture = load_architecture(config.model, task="SEQ_CLS")

        tokenize = partial(
            tokenize_pairs, tokenizer=tokenizer, max_length=config.max_length, too_long=config.too_long
        )
        rows = read_rows(config, world, tokenizer, tokenize, generates=False)
        longest = check_fit(architecture, tokenizer, sequences_of(rows.both))
        pad_id = padding_id(tokenizer, architecture)
        configured = architecture.get_text_config().pad_token_id
        if tokenizer.eos_token_id == (pad_id if configured is None else configured):
            world.say(
                "warning: tokenizer: got EOS as the padding token, expected another: transformers' "
                "classifiers read a score at the last token that is no padding, which leaves out an "
                "answer's EOS"
            )
        collate = partial(pack_rows, pad_id=pad_id, attention=attention, packing=config.packing)
        parts = [Part("model", architecture, "SEQ_CLS")]
        announce(config, world, parts, sequences_of(rows.train), collate=collate)
        if config.dry_run:
            return {}
        model = load_model(
            config,
            world,
            architecture,
            weights=config.model,
            attention=attention,
            packed=config.packing,
            task="SEQ_CLS",
        )
        without_dropout(model)
        if config.zero_head:
            zero_head(model)
        text = model.config.get_text_config()
        text.pad_token_id = pad_id if text.pad_token_id is None else text.pad_token_id
        packer = make_packer(
            config, world, model, attention=attention, pad_id=text.pad_token_id, longest=longest
        )

        def to_batch(pairs: Sequence[Pair]) -> Batch:
            batch = collate_pairs(pairs, packer=packer)
            return batch | {"ends": last_tokens(batch["both"], pad_id=text.pad_token_id)}

        return train(
            config,
            world,
            model,
            tokenizer,
            rows=len(rows.train),
            batches_of=epoch_batches(rows.train, to_batch, config, world),
            loss_fn=bradley_terry(config),
            held_out=held_out_batches(rows.held_out, to_batch, config, world),
            count_items=lambda batch: len(batch["ends"]) // 2,
            items_name="pairs",
        )


def bradley_terry(config: RewardConfig) -> LossFn:
    """The loss, the share of pairs in the right order, the mean margin, and the mean of all scores."""

    def loss_fn(model: nn.Module, batch: Batch, items: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        # fp32 at least: under autocast, bfloat16 would round the differences of scores.
        scores = model(**model_arguments(batch["both"]), ends=batch["ends"], use_cache=False).logits[:, 0]
        scores = scores if scores.element_size() > 4 else scores.float()
        chosen, rejected = scores.chunk(2)
        if not len(chosen):  # of an empty micro-batch, whose means would be NaN
            zero = scores.sum()
            return zero, dict.fromkeys(("accuracy", "margin", "mean_reward"), zero.detach().double())
        output = reward_loss(
            chosen, rejected, batch.get("margins"), center_coefficient=config.center_coefficient
        )
        means = {"accuracy": output.accuracy, "margin": output.mean_margin, "mean_reward": scores.mean()}
        return output.loss * len(chosen) / items, {
            name: mean.double() * len(chosen) / items for name, mean in means.items()
        }

    return loss_fn


def zero_head(model: PreTrainedModel | PeftModel) -> None:
    """Make every score zero."""
    for name, weight in model.named_parameters():
        if "score" in name.split("."):
            nn.init.zeros_(weight)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: `--config FILE key=value …`."""
    run_stage("reward", run, argv)


if __name__ == "__main__":
    main()
