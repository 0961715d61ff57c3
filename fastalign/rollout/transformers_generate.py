"""Rollouts through transformers' `model.generate(..., custom_generate=custom_generate)`."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicCache
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    GenerationMode,
    MaxLengthCriteria,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..transformers_names import CACHE
from ..versions import noting_newer_packages
from .decoding import id_bits
from .generation import Rollout, generate


@dataclass
class RolloutOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns with `return_dict_in_generate`.

    `sequences` is [B, T + R]: the prompts followed by the drawn tokens. `rollout` is the Rollout.
    """

    rollout: Rollout | None = None


@noting_newer_packages()
def custom_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> Tensor | RolloutOutput:
    """Generate inside of `model.generate(..., custom_generate=custom_generate)`.

    transformers prepares the arguments, and `fastalign.rollout.generate` draws the tokens.

    The seed comes from torch's CPU generator, so torch.manual_seed repeats a call. Sampling options and end
    ids are read from the processors and criteria that transformers made. transformers hands no streamer,
    assistant model or synced_gpus to a custom_generate, so these have no effect.

    Raises:
        ValueError: a request that `generate` cannot serve exactly, by name: beams and other modes, other
            processors and criteria, scores, inputs beside the prompt. Also what `generate` raises.
    """
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(f"generation_config: got mode {mode.value!r}, expected greedy_search or sample")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(generation_config, name):
            raise ValueError(
                f"{name}: got True, expected False; Rollout has the log-probabilities of the tokens"
            )
    mask = model_kwargs.pop("attention_mask", None)
    mask = torch.ones_like(input_ids) if mask is None else mask  # transformers drops a mask of ones only
    positions, past = model_kwargs.pop("position_ids", None), model_kwargs.pop(CACHE, None)
    unserved = [
        name
        for name, value in model_kwargs.items()
        if name not in ("use_cache", "logits_to_keep") and value is not None
    ]
    if unserved:
        raise ValueError(
            f"model inputs: got {', '.join(unserved)}, expected input_ids and attention_mask only"
        )
    if positions is not None and not torch.equal(
        positions.expand_as(mask), (mask.long().cumsum(1) - 1).clamp(min=0)
    ):
        raise ValueError("position_ids: got other numbers, expected 0, 1, ... from each row's first token")
    if past is not None and (type(past) not in (DynamicCache, StaticCache) or past.get_seq_length()):
        raise ValueError(
            f"{CACHE}: got a {type(past).__name__} of {past.get_seq_length()} tokens, expected none"
        )
    options = _sampling_options(
        logits_processor, input_ids, mask, model.config.get_text_config(decoder=True).vocab_size
    )
    limits: dict[type, Any] = {type(criterion): criterion for criterion in stopping_criteria}
    unknown = [kind.__name__ for kind in limits if kind not in (MaxLengthCriteria, EosTokenCriteria)]
    if unknown or MaxLengthCriteria not in limits:
        raise ValueError(
            f"stopping_criteria: got {', '.join(unknown) or 'no length'}, expected a length and "
            "end-of-sequence ids"
        )
    eos = limits[EosTokenCriteria].eos_token_id.tolist() if EosTokenCriteria in limits else None
    sampled = generation_config.do_sample
    rollout = generate(
        model,
        input_ids,
        mask,
        max_new_tokens=limits[MaxLengthCriteria].max_length - input_ids.shape[1],
        seed=int(torch.randint(2**63 - 1, ())) if sampled else 0,
        eos_id=eos,
        pad_id=0 if generation_config._pad_token_tensor is None else int(generation_config._pad_token_tensor),
        **options if sampled else options | {"temperature": 0.0},
    )
    sequences = torch.cat((input_ids, rollout.tokens), 1)
    return (
        RolloutOutput(sequences=sequences, rollout=rollout)
        if generation_config.return_dict_in_generate
        else sequences
    )


# In the order in which `sample` applies them, with the name of the option in both.
_PROCESSORS: dict[type, str] = {
    RepetitionPenaltyLogitsProcessor: "penalty",
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
    MinPLogitsWarper: "min_p",
}


def _sampling_options(
    processors: LogitsProcessorList, input_ids: Tensor, mask: Tensor, vocab_size: int
) -> dict[str, Any]:
    """The processors as options of `generate`.

    They are read from the processors, not from the config: a processor that the user hands over replaces
    the config's.
    """
    order, options = list(_PROCESSORS), {}
    served = ", ".join(kind.__name__ for kind in _PROCESSORS)
    for processor in processors:
        kind = type(processor)
        if kind not in order:
            raise ValueError(
                f"logits_processor: got {kind.__name__}, expected some of {served}, in this order"
            )
        order = order[order.index(kind) + 1 :]
        name = _PROCESSORS[kind]
        options["repetition_penalty" if name == "penalty" else name] = getattr(processor, name)
        kept = 1 if kind is TopKLogitsWarper else getattr(processor, "min_tokens_to_keep", 1)
        if kept != 1 or getattr(processor, "filter_value", -math.inf) != -math.inf:
            raise ValueError(
                f"logits_processor: got {kind.__name__} with min_tokens_to_keep {kept} or a filter_value, "
                "expected 1 and -inf"
            )
        if kind is RepetitionPenaltyLogitsProcessor:
            ignored = 0 if processor.prompt_ignore_length is None else processor.prompt_ignore_length
            padding = mask == 0
            if bool((padding.sum(1) < ignored).any()):
                raise ValueError(
                    f"logits_processor: got prompt_ignore_length {ignored}, expected at most the padding of "
                    "each row"
                )
            # A processor counts the padding that it does not ignore. Those of older versions of
            # transformers, such as 5.17, ignore none.
            first = torch.as_tensor(ignored, device=mask.device).reshape(-1, 1)
            counted = padding & (torch.arange(mask.shape[1], device=mask.device) >= first)
            if bool(counted.any()):
                options["seen"] = id_bits(input_ids, counted, vocab_size)
    return options
