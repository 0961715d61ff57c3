"""Generation for reinforcement learning: tokens with the log-probabilities that their policy gave them.

One prefill, then one token of every row a step, over a static cache and into buffers on the device: a step
reads nothing back, so that on a GPU it is captured once as a CUDA graph and replayed, and on a CPU the same
function runs. `fastalign_kernels.sampling.sample` draws, with noise that a sequence's id and a token's
position in it decide, so a row's tokens do not depend on its batch, its slot or its padding.

The static cache holds every layer at full length, sliding-window ones too: transformers' windowed layer
decides on the host when it is full and rolls, which a graph cannot replay. The window itself stays in the
attention mask.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicCache, StaticLayer
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

from fastalign_kernels import checks as check
from fastalign_kernels import native, sample

from .probe import probing, unsupported
from .rollout_checks import check_prompts, servable_model
from .transformers_names import CACHE
from .versions import noting_newer_packages

# Steps between two looks at the device. A look drains the queue of launches, which costs a fraction of one
# step; once the last row has ended, half of POLL steps on average are taken in vain.
POLL = 8
# Steps on the capture's stream before the capture: the first compiles and loads kernels and makes cuBLAS's
# workspace, the second recompiles what torch.compile had specialised.
WARM_UP = 2


class Rollout(NamedTuple):
    """R is the longest length. tokens [B, R] int64; mask [B, R] bool, the tokens drawn, EOS among them;
    lengths [B] int64, their number.

    logp, log_kept, logp_raw, entropy [B, R] fp32 (fp64 from fp64 logits), nats, as `sample` defines them:
    logp is the token's under the filtered policy, logp + log_kept under the tempered one, logp_raw and
    entropy at temperature 1 without penalty. Outside of the mask tokens are pad_id and the numbers 0.
    """

    tokens: Tensor
    mask: Tensor
    logp: Tensor
    log_kept: Tensor
    logp_raw: Tensor
    entropy: Tensor
    lengths: Tensor


@noting_newer_packages()
def generate(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    max_new_tokens: int,
    seed: int,
    eos_id: int | Sequence[int] | None,
    pad_id: int,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    repetition_penalty: float | Tensor = 1.0,
    seen: Tensor | None = None,
    allowed: Tensor | None = None,
    finished: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    positions: Tensor | None = None,
    check: bool = False,
    progress: bool = False,
    cuda_graph: bool = True,
) -> Rollout:
    """Draw up to max_new_tokens for every prompt, in eval mode and without gradient; the training flags are
    restored.

    Args:
        model: a transformers causal LM, or PEFT's wrapper of one, on one device; its attention "eager" or "sdpa".
        input_ids, attention_mask: [B, T] int64 or int32 (the mask 0 and 1, or bool); prompts padded on the left.
        seed, temperature, top_k, top_p, min_p, allowed: as in `sample`: numbers or [B]; 0 to 2^63 - 1; int32 bits [B, ceil(V / 32)].
        repetition_penalty: a number or [B], for the ids of the row's prompt and of what it drew, and those that `seen` marks.
        seen: int32 bit masks [B, ceil(V / 32)] as in `sample`: ids that the penalty counts as drawn, beside the prompt's.
        finished: [B] bool: rows that draw nothing. They have length 0.
        eos_id: ids that end a row, which keeps the one it drew.
        pad_id: the token behind a row's end; an id of the model's, which reads it.
        sequence_ids: [B] integers that key the noise, the row numbers by default; give running numbers where a rollout has many batches.
        positions: [B] integers, the position that keys the noise of each row's first token; later tokens count on from there. Default:
            the number of the prompt's tokens. With it, a prompt that was cut goes on with the noise of the whole one. The model's own
            positions count from the prompt's first token, whatever is given here.
        check: look at the device after every step, so that logits that are not finite raise at the step that has them. By default every
            8th step looks.
        progress: show a bar of the steps.
        cuda_graph: False runs every step eagerly on a GPU too. A model that transformers does not declare fit for one graph, or whose RoPE
            depends on the length, does so anyway.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range, a prompt that is empty or not padded on the left, more positions
            than the model has or than its LongRoPE or dynamic RoPE has the same frequencies for, or (UnsupportedModelError) a model
            without a static cache of keys and values.
        FloatingPointError: NaN, +inf or no finite allowed logit in a row that is not finished, with the first step and the rows; seen at
            the next look at the device.
    """
    base = servable_model(model)
    eos = [] if eos_id is None else [eos_id] if isinstance(eos_id, int) else list(eos_id)
    check_prompts(base, input_ids, attention_mask, max_new_tokens, {"eos_id": eos, "pad_id": [pad_id]})
    options: dict[str, Any] = {
        "seed": seed,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
    }
    options |= {"sequence_ids": sequence_ids, "repetition_penalty": repetition_penalty}
    one_id = input_ids.new_zeros(len(input_ids), 1, dtype=torch.float32)
    sample(
        one_id, positions=positions, finished=finished, check=True, **options
    )  # raises before the model runs
    if positions is not None and int(positions.max()) >= 2**32 - max_new_tokens:
        raise ValueError(
            f"positions: got {positions.tolist()[:8]}, expected numbers below 2^32 - max_new_tokens"
        )
    rows = {"seen": seen, "finished": finished, "positions": positions}

    bar = tqdm(total=max_new_tokens, unit="step", disable=not progress)
    with probing(model), torch.cuda.device_of(input_ids), bar:
        options |= {"allowed": allowed}
        state = _Decoding(
            model, base, input_ids, attention_mask.long(), max_new_tokens, eos, pad_id, options, **rows
        )
        steps = _run(state.step, capture=cuda_graph and _can_capture(base, state.logs))
        poll = 1 if check else POLL
        for done in range(1, max_new_tokens):
            if done % poll == 0:
                bar.update(poll)
                if state.all_ended():
                    break
            next(steps)
        state.all_ended()  # raises for what failed since the last look
        bar.update(state.column.item() - bar.n)
    lengths = state.mask.sum(1)
    longest = int(lengths.max())
    tokens, mask, logs = (
        buffer[..., :longest].contiguous() for buffer in (state.tokens, state.mask, state.logs)
    )
    logp, log_kept, logp_raw, entropy = logs
    return Rollout(tokens, mask, logp, log_kept, logp_raw, entropy, lengths)


@dataclass
class RolloutOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns with `return_dict_in_generate`: `sequences` [B, T + R], the prompts with their
    tokens, and the Rollout."""

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
    """`model.generate(..., custom_generate=custom_generate)`: transformers prepares the arguments, `generate`
    above draws the tokens.

    The seed comes from torch's CPU generator, so torch.manual_seed repeats a call. Sampling options and ends
    are read off the processors and criteria that transformers made. It hands a streamer, an assistant model
    and synced_gpus to no custom_generate: they do nothing.

    Raises:
        ValueError: what `generate` above does not do exactly, by name: beams and other modes, other processors and criteria, scores,
            inputs beside the prompt; and what `generate` raises itself.
    """
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(f"generation_config: mode {mode.value!r} seen, greedy_search or sample wanted")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(generation_config, name):
            raise ValueError(
                f"{name}: True seen, False wanted; Rollout has the log-probabilities of the tokens"
            )
    mask = model_kwargs.pop("attention_mask", None)
    mask = torch.ones_like(input_ids) if mask is None else mask  # transformers drops one that is all 1
    positions, past = model_kwargs.pop("position_ids", None), model_kwargs.pop(CACHE, None)
    others = [
        name
        for name, value in model_kwargs.items()
        if name not in ("use_cache", "logits_to_keep") and value is not None
    ]
    if others:
        raise ValueError(f"{', '.join(others)}: input_ids and attention_mask are all that is served")
    if positions is not None and not torch.equal(
        positions.expand_as(mask), (mask.long().cumsum(1) - 1).clamp(min=0)
    ):
        raise ValueError("position_ids: others than 0, 1, ... from each row's first token seen; those wanted")
    if past is not None and (type(past) not in (DynamicCache, StaticCache) or past.get_seq_length()):
        raise ValueError(
            f"{CACHE}: a {type(past).__name__} of {past.get_seq_length()} tokens seen, none wanted"
        )
    options = _sampling_options(
        logits_processor, input_ids, mask, model.config.get_text_config(decoder=True).vocab_size
    )
    limits: dict[type, Any] = {type(criterion): criterion for criterion in stopping_criteria}
    unknown = [kind.__name__ for kind in limits if kind not in (MaxLengthCriteria, EosTokenCriteria)]
    if unknown or MaxLengthCriteria not in limits:
        raise ValueError(
            f"stopping_criteria: {', '.join(unknown) or 'no length'} seen, a length and end-of-sequence ids wanted"
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


_PROCESSORS: dict[
    type, str
] = {  # in the order in which `sample` applies their numbers, with the name of each in both
    RepetitionPenaltyLogitsProcessor: "penalty",
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
    MinPLogitsWarper: "min_p",
}


def _sampling_options(
    processors: LogitsProcessorList, input_ids: Tensor, mask: Tensor, vocab_size: int
) -> dict[str, Any]:
    """The processors as options of `generate`. Their own numbers, because one handed to transformers'
    generate replaces the config's."""
    order, options = list(_PROCESSORS), {}
    for processor in processors:
        kind = type(processor)
        if kind not in order:
            raise ValueError(
                f"logits_processor: {kind.__name__} seen, at most {', '.join(k.__name__ for k in _PROCESSORS)}, in this order, served"
            )
        order = order[order.index(kind) + 1 :]
        name = _PROCESSORS[kind]
        options["repetition_penalty" if name == "penalty" else name] = getattr(processor, name)
        kept = 1 if kind is TopKLogitsWarper else getattr(processor, "min_tokens_to_keep", 1)
        if kept != 1 or getattr(processor, "filter_value", -math.inf) != -math.inf:
            raise ValueError(
                f"logits_processor: {kind.__name__} with min_tokens_to_keep {kept} or a filter_value seen, 1 and -inf wanted"
            )
        if kind is RepetitionPenaltyLogitsProcessor:
            ignored = 0 if processor.prompt_ignore_length is None else processor.prompt_ignore_length
            padding = mask == 0
            if bool((padding.sum(1) < ignored).any()):
                raise ValueError(
                    f"logits_processor: prompt_ignore_length {ignored} seen, at most the padding of each row wanted"
                )
            # A processor counts the padding that it does not ignore; those of older versions of transformers,
            # such as 5.17, ignore none.
            first = torch.as_tensor(ignored, device=mask.device).reshape(-1, 1)
            counted = padding & (torch.arange(mask.shape[1], device=mask.device) >= first)
            if bool(counted.any()):
                options["seen"] = _bits(input_ids, counted, vocab_size)
    return options


class _Decoding:
    """A rollout under way, on the device. `step` and `draw` keep the host out: shapes are fixed, addresses
    too, nothing is read back."""

    def __init__(
        self,
        model: Any,
        base: Any,
        ids: Tensor,
        mask: Tensor,
        new: int,
        eos: list[int],
        pad_id: int,
        options: dict[str, Any],
        *,
        seen: Tensor | None = None,
        finished: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> None:
        (B, T), device = ids.shape, ids.device
        self.model, self.options = model, options | {"pad_id": pad_id}
        self.accepted = inspect.signature(base.forward).parameters
        self.cache = _static_cache(base, T + new - 1)  # the last token is drawn, not read
        self.attention = torch.cat((mask, mask.new_ones(B, new - 1)), 1)
        self.position = mask.sum(1) - 1  # of the latest token in its own sequence
        self.noise = (
            None if positions is None else positions.long() - 1 - self.position
        )  # from there to the position that keys the noise
        self.eos = torch.tensor(eos, dtype=torch.int64, device=device)
        self.tokens = torch.empty(B, new, dtype=torch.int64, device=device)
        self.mask = torch.zeros(B, new, dtype=torch.bool, device=device)
        self.token = torch.empty(B, 1, dtype=torch.int64, device=device)
        self.column = torch.zeros(1, dtype=torch.int64, device=device)
        self.finished = (
            torch.zeros(B, dtype=torch.bool, device=device) if finished is None else finished.clone()
        )
        self.failed = torch.full((B,), -1, device=device)  # the column of a row's first failure

        logits = self.forward(ids, (mask.cumsum(1) - 1).clamp(min=0))
        _check_written(base, self.cache, T)
        self.logs = torch.empty(
            4, B, new, dtype=torch.promote_types(logits.dtype, torch.float32), device=device
        )
        penalty = options["repetition_penalty"]
        self.seen = _bits(ids, mask, logits.shape[1]) if isinstance(penalty, Tensor) or penalty != 1 else None
        if seen is not None:
            check.shape("seen", seen, (B, -(-logits.shape[1] // 32)), "[B, ceil(V / 32)]")
            check.dtype("seen", seen, (torch.int32,))
            check.device("seen", seen, "input_ids", ids)
            self.seen = None if self.seen is None else self.seen | seen
        self.draw(logits)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits [B, V] behind the last of the ids [B, t] at positions [B, t]."""
        optional = {"position_ids": positions, "logits_to_keep": 1}
        given = {name: value for name, value in optional.items() if name in self.accepted}
        given |= {"attention_mask": self.attention, CACHE: self.cache, "use_cache": True}
        return self.model(input_ids=ids, return_dict=True, **given).logits[:, -1]

    def step(self) -> None:
        self.draw(self.forward(self.token, self.position[:, None]))

    def draw(self, logits: Tensor) -> None:
        self.position.add_(1)
        positions = self.position if self.noise is None else self.position + self.noise
        drawn = sample(logits, positions=positions, seen=self.seen, finished=self.finished, **self.options)
        self.token.copy_(drawn.token[:, None])
        self.tokens.index_copy_(1, self.column, self.token)
        self.mask.index_copy_(1, self.column, ~self.finished[:, None])
        logs = torch.stack((drawn.logp, drawn.log_kept, drawn.logp_raw, drawn.entropy))
        self.logs.index_copy_(2, self.column, logs[..., None])
        self.failed.copy_(torch.where(drawn.valid | (self.failed >= 0), self.failed, self.column))
        self.finished.logical_or_((self.token == self.eos).any(1))
        if self.seen is not None:
            word = self.token >> 5
            bit = (1 << (self.token & 31)).int()
            self.seen.scatter_(1, word, self.seen.gather(1, word) | bit)
        self.column.add_(1)

    def all_ended(self) -> bool:
        """Whether every row has ended. Waits for the device; raises FloatingPointError for rows that
        failed."""
        ended, failed = torch.stack((self.finished.all(), (self.failed >= 0).any())).tolist()
        if failed:
            columns = self.failed.tolist()
            first = min(column for column in columns if column >= 0)
            rows = [row for row, column in enumerate(columns) if column == first]
            raise FloatingPointError(
                f"model: NaN, +inf or no finite allowed logit at step {first} (from 0) in {len(rows)} rows, {rows[:8]} first"
            )
        return ended


def _run(step: Callable[[], None], *, capture: bool) -> Iterator[None]:
    """Takes one step for every item asked for: the first ones for real on a side stream, then as a CUDA graph
    of the same function."""
    if capture:
        stream = torch.cuda.Stream()
        for _ in range(WARM_UP):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step()
            torch.cuda.current_stream().wait_stream(stream)
            yield
        graph = torch.cuda.CUDAGraph()
        # Without autocast's cache, which would keep weights cast in the graph's own memory; and other threads
        # (pinning batches, say) may go on calling CUDA.
        cast = torch.autocast(
            "cuda",
            torch.get_autocast_dtype("cuda"),
            enabled=torch.is_autocast_enabled("cuda"),
            cache_enabled=False,
        )
        try:
            with cast, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                step()
        except RuntimeError as error:
            error.add_note(
                "fastalign: the decode step cannot be captured in a CUDA graph; cuda_graph=False runs it eagerly"
            )
            raise
        step = graph.replay
    while True:
        step()
        yield


def _can_capture(base: Any, logs: Tensor) -> bool:
    """Where a step has no host in it: `sample` native and without FASTALIGN_CHECK, a model that says so of
    itself."""
    native_sampler = (
        logs.is_cuda
        and logs.dtype == torch.float32
        and "cuda" in native.samples_on
        and not check.everywhere()
    )
    ropes = " ".join(str(getattr(module, "rope_type", "")) for module in base.modules())
    return (
        native_sampler and base._can_compile_fullgraph and "dynamic" not in ropes and "longrope" not in ropes
    )


class _Layer(StaticLayer):
    """transformers' layer, but keys and values have each their own dtype: autocast makes them differ."""

    values: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.values = self.values.to(value_states.dtype)


def _static_cache(base: Any, length: int) -> StaticCache:
    """Keys and values of `length` tokens in every layer that has its own."""
    try:
        cache = StaticCache(config=base.config, max_cache_len=length)
    except KeyError as error:
        raise unsupported(base, f"has layers of type {error}, which have no static cache") from error
    kinds = [type(layer).__name__ for layer in cache.layers]
    others = set(kinds) - {
        "StaticLayer",
        "StaticSlidingWindowLayer",
        "DummyLayer",
    }  # a dummy's layer reads another's keys and values
    if others:
        raise unsupported(
            base,
            f"keeps more than keys and values ({', '.join(sorted(others))}), which padding on the left would enter",
        )
    cache.layers = [
        layer if kind == "DummyLayer" else _Layer(length)
        for kind, layer in zip(kinds, cache.layers, strict=True)
    ]
    return cache


def _check_written(base: Any, cache: StaticCache, tokens: int) -> None:
    lengths = [layer.cumulative_length.cpu() for layer in cache.layers if type(layer) is _Layer]
    if not lengths or any(length != tokens for length in lengths):
        raise unsupported(
            base,
            f"was given {tokens} tokens and wrote {[int(n) for n in lengths]} into the layers of its static cache",
        )


def _bits(ids: Tensor, mask: Tensor, V: int) -> Tensor:
    """The ids of each row where mask, as int32 words [B, ceil(V / 32)]; sorted, so that an id that comes
    twice adds its bit once."""
    ids = ids.long().masked_fill(mask == 0, -1).sort(1).values
    new = (ids >= 0) & (ids != torch.nn.functional.pad(ids, (1, 0), value=-1)[:, :-1])
    words = torch.zeros(len(ids), -(-V // 32), dtype=torch.int64, device=ids.device)
    return words.scatter_add_(1, ids.clamp(min=0) >> 5, torch.where(new, 1 << (ids & 31), 0)).int()
