"""What stages that learn from their own completions need beside the policy: prompts, reward, reference."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ...data.tokenization import tokenize_prompts
from ...data.tokens import Prompt, Tokenized
from ..estimate import Part, announce
from ..models.adapters import load_architecture
from ..models.loading import check_fit, load_tokenizer, padding_id
from ..models.sharding import shard
from ..optimization import autocast
from ..packers import pack_rows
from ..policy_configs import PolicyConfig, is_function
from ..runs.distributed import World
from ..stage_rows import StageRows, read_rows
from .reward_functions import Function, Reward, arguments_of, by_function, find_function
from .scorers import Classifier, check_classifier, find_classifier, load_classifier


class PolicyInputs(NamedTuple):
    """What is known before a model loads."""

    attention: str
    tokenizer: PreTrainedTokenizerBase
    architecture: PretrainedConfig
    """That of the policy."""
    scorer: Classifier | Function
    prompts: StageRows[Prompt]
    pad_id: int

    @property
    def reader(self) -> Classifier | None:
        """The reward model, if it reads the policy's tokens."""
        scorer = self.scorer
        return scorer if isinstance(scorer, Classifier) and scorer.reads(self.tokenizer) else None


def read_inputs(config: PolicyConfig, world: World) -> PolicyInputs:
    """Prompts, tokenizer and what scores; raises ValueError for any that cannot be used."""
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    architecture = load_architecture(config.model)
    scorer = find_scorer(config)
    tokenize = partial(
        tokenize_prompts, tokenizer=tokenizer, max_length=config.max_prompt_length, too_long=config.too_long
    )
    prompts = read_rows(config, world, tokenizer, tokenize)
    inputs = PolicyInputs(
        "sdpa" if config.attention == "auto" else config.attention,
        tokenizer,
        architecture,
        scorer,
        prompts,
        padding_id(tokenizer, architecture),
    )
    readers = [architecture, *([inputs.reader.architecture] if inputs.reader else [])]
    check_prompts(config, inputs, readers)
    if isinstance(scorer, Classifier):
        check_classifier(scorer, tokenizer, prompts.both, max_new_tokens=config.max_new_tokens)
    else:
        for part in (prompts.train, prompts.held_out):
            if part:
                arguments_of(scorer, part[0].row)  # refuses a function that the rows cannot serve
    return inputs


def announce_drawing(
    config: PolicyConfig, world: World, inputs: PolicyInputs, parts: Sequence[Part], *, copies: int = 1
) -> None:
    """Print what the run takes (`announce`): each prompt is completed `copies` times an epoch."""
    drawn = [[_full(prompt, config.max_new_tokens)] for prompt in inputs.prompts.train] * copies
    announce(
        config,
        world,
        parts,
        drawn,
        collate=partial(pack_rows, pad_id=inputs.pad_id, attention=inputs.attention, packing=config.packing),
        micro=micro_batch(config, world),
        cached=(rows_at_once(config, world), max(len(row[0].input_ids) for row in drawn)),
    )


def _full(prompt: Prompt, new_tokens: int) -> Tokenized:
    """A prompt followed by the longest completion."""
    return Tokenized(
        prompt.input_ids + [0] * new_tokens, [False] * len(prompt.input_ids) + [True] * new_tokens
    )


def parts_of(
    config: PolicyConfig, architecture: PretrainedConfig, scorer: Classifier | Function
) -> list[Part]:
    """The models that a step needs: policy, reward model, and a copied reference."""
    parts = [Part("model", architecture)]
    if isinstance(scorer, Classifier):
        parts.append(Part("reward model", scorer.architecture, "SEQ_CLS", trained=False))
    if config.has_reference and (
        config.reference == "copy" or (config.reference == "auto" and not config.lora_rank)
    ):
        parts.append(Part("reference", architecture, trained=False))
    return parts


def find_scorer(config: PolicyConfig) -> Function | Classifier:
    """What `reward` names. Raises ValueError if there is no such function or classifier."""
    if is_function(config.reward):
        return find_function(config.reward)
    return find_classifier(config.reward, config.reward_label)


def rows_at_once(config: PolicyConfig, world: World) -> int:
    """Rows of one rollout on one device."""
    return config.rollout_batch_size or config.batch_size // world.size


def check_prompts(config: PolicyConfig, inputs: PolicyInputs, readers: Sequence[PretrainedConfig]) -> None:
    """Raise ValueError if a prompt, or a prompt and its completion, does not fit a model that reads them."""
    prompts = inputs.prompts.both
    rows = [Tokenized(prompt.input_ids, []) for prompt in prompts]
    rows += [Tokenized(prompt.input_ids + [0] * config.max_new_tokens, []) for prompt in prompts]
    for read in readers:
        check_fit(read, inputs.tokenizer, [rows], lower="max_prompt_length or max_new_tokens")


def micro_batch(config: PolicyConfig, world: World) -> int:
    """Sequences in one forward pass on one device.

    Raises ValueError if a minibatch does not divide among all devices.
    """
    size = config.batch_size // config.minibatches
    micro = config.micro_batch_size or max(size // world.size, 1)
    if size % (micro * world.size):
        raise ValueError(
            f"batch_size / minibatches: got {config.batch_size} / {config.minibatches}, expected a multiple "
            f"of micro_batch_size x devices ({micro} x {world.size})"
        )
    return micro


def make_reward(
    config: PolicyConfig,
    world: World,
    inputs: PolicyInputs,
) -> Reward:
    """The scores of completions, as configured."""
    if isinstance(inputs.scorer, Function):
        return by_function(inputs.scorer, inputs.tokenizer)
    options: dict[str, Any] = {
        "rows": micro_batch(config, world),
        "attention": inputs.attention,
        "packing": config.packing,
    }
    dtype = getattr(torch, config.dtype)
    return load_classifier(inputs.scorer, world, inputs.tokenizer, dtype=dtype, **options)


def make_reference(config: PolicyConfig, world: World, policy: Any) -> nn.Module | None:
    """The `reference` argument of `draw_completions`. The policy is still whole; a copy of it is sharded."""
    if not config.has_reference:
        return None
    if isinstance(policy, PeftModel) and config.reference != "copy":
        return policy
    frozen: nn.Module = copy.deepcopy(policy).requires_grad_(False).eval()
    return shard(world.sharding, frozen)


def end_ids(policy: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a completion: the tokenizer's EOS, and those at which the model's `generate` stops."""
    configured = policy.generation_config.eos_token_id
    ids = [*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id]
    known = policy.config.get_text_config().vocab_size
    # The model cannot draw any other id
    found = sorted({token_id for token_id in ids if token_id is not None and token_id < known})
    if not found:
        raise ValueError(
            "tokenizer: got no EOS token, and none in the model's generation_config, expected one, without "
            "which completions could not end"
        )
    return found


def draw_and_learn(
    config: PolicyConfig,
    world: World,
    policy: Any,
    inputs: PolicyInputs,
    reference: nn.Module | None,
    *,
    rollout: Callable[..., Any],
    step: Callable[..., dict[str, float]],
) -> tuple[Callable[..., Any], Callable[..., dict[str, float]]]:
    """`draw` and `learn` of `train_on_rollouts`: a stage's rollout and step, with where and how this run
    takes them."""
    of_both = {
        "pad_id": padding_id(inputs.tokenizer, policy.config),
        "packing": config.packing,
        "precision": autocast(config, world),
        "micro_batch_size": micro_batch(config, world),
        "world": world,
    }
    draw = partial(
        rollout,
        eos_id=end_ids(policy, inputs.tokenizer),
        reference=reference,
        rollout_batch_size=rows_at_once(config, world),
        **of_both,
    )
    return draw, partial(step, max_grad_norm=config.max_grad_norm, **of_both)
