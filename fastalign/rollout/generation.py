"""Draw completions for every prompt, with the log-probabilities that the policy gave their tokens.

One prefill, then one token of every row a step, over a static cache and into buffers on the device. A step
reads nothing back from the device. So on a GPU it is captured once as a CUDA graph and replayed; on a CPU
the same function runs.

`fastalign_kernels.sampling.sample` draws the tokens. A sequence's id and a token's position in it decide
the noise, so a row's tokens do not depend on its batch, its slot or its padding.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastalign_kernels import checks, sample
from fastalign_kernels.sampling_kept import KeptIds

from ..probe import probing
from ..versions import noting_newer_packages
from .checks import check_bits, check_prompts, servable_model
from .decoding import Decoding, can_capture, run_steps
from .screened import screened_head

# Checking for the end synchronises with the device, so we check every POLL steps; a check costs a fraction
# of one step. On average POLL / 2 steps are wasted after the last row ends.
POLL = 8


class Rollout(NamedTuple):
    """What was drawn. R is the length of the longest row.

    tokens: [B, R] int64. mask: [B, R] bool, true for the drawn tokens, EOS included. lengths: [B] int64,
    the number of drawn tokens.

    logp, log_kept, logp_raw, entropy: [B, R] fp32 (fp64 from fp64 logits), in nats, as `sample` defines
    them. logp is the token's log-probability under the filtered policy, and logp + log_kept under the
    tempered one. logp_raw and entropy are those of the logits at temperature 1 without a penalty. Outside
    of the mask tokens are pad_id and the numbers are 0.

    kept_ids: with return_kept=True, the ids that the filters left at each token, in CSR over the B R tokens
    row by row, as `linear_logprobs(..., kept=)` takes them beside hidden states [B, R, H]. Those of token r
    of row b are ids[offsets[b * R + r] : offsets[b * R + r + 1]], int32. Outside of the mask there are none.
    """

    tokens: Tensor
    mask: Tensor
    logp: Tensor
    log_kept: Tensor
    logp_raw: Tensor
    entropy: Tensor
    lengths: Tensor
    kept_ids: KeptIds | None = None


@noting_newer_packages()
def generate(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    max_new_tokens: int,
    seed: int,
    eos_id: int | Collection[int] | None,
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
    return_kept: bool = False,
    screen: bool | None = None,
    check: bool = False,
    progress: bool = False,
    cuda_graph: bool = True,
    compile: bool = False,  # noqa: A002 - torch's name
) -> Rollout:
    """Draw up to max_new_tokens tokens for every prompt, in evaluation mode and without gradient.

    The training flags are restored afterwards.

    Args:
        model: a transformers causal LM, or PEFT's wrapper of one, on one device. Its attention is "eager"
            or "sdpa".
        input_ids, attention_mask: [B, T] int64 or int32 (the mask 0 and 1, or bool). Prompts are padded on
            the left.
        seed, temperature, top_k, top_p, min_p, allowed: as in `sample`. The seed is 0 to 2^63 - 1; the
            options are numbers or [B]; `allowed` is int32 bits [B, ceil(V / 32)].
        repetition_penalty: a number or [B]. It applies to the ids of the row's prompt, to those drawn so
            far and to those that `seen` marks.
        seen: int32 bit masks [B, ceil(V / 32)] as in `sample`: ids that the penalty counts as drawn, beside
            the prompt's.
        finished: [B] bool. These rows draw nothing and have length 0.
        eos_id: ids that end a row. The row keeps the one that it drew.
        pad_id: the token after a row's end. The model reads it, so it must be an id of the model's.
        sequence_ids: [B] integers that key the noise. Default: the row numbers. Give running numbers if a
            rollout has several batches.
        positions: [B] integers: the position that keys the noise of each row's first token; later tokens
            count on from it. Default: the number of tokens in the prompt. With it, a prompt that was cut
            continues with the noise of the whole prompt. The model's own positions always count from the
            prompt's first token.
        return_kept: also return the ids that the filters left at each token. Every step then waits for the
            device. Without a filter these are all V ids of each token.
        screen: True computes the logits in 8 bits, and exactly those that decide which token is drawn, from
            fp32 products of a fused model's head (docs/screen.md). The tokens are those of exact logits; with
            top_p alone, up to those that `screen_counts` counts as open. CPUs with AVX-512 VNNI only.
        check: check the logits after every step, so that a step whose logits are not finite raises at once.
            Default: every 8th step.
        progress: show a progress bar of the steps.
        cuda_graph: False runs every step eagerly on a GPU. A model that transformers does not declare fit
            for one graph, or whose RoPE depends on the length, runs eagerly anyway, and so does one that
            cannot be captured, which a warning names once.
        compile: run the model through torch.compile in the steps after the prefill, so that a step launches
            fewer kernels. The first rollout compiles, and the first of another shape once more for all
            shapes: seconds to a minute each. Later rollouts of the model find both. The logits differ from
            eager ones by rounding. On a CPU it needs a C++ compiler.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range; a prompt is empty or not padded
            on the left; the rollout needs more positions than the model has, or crosses the length at which
            LongRoPE or dynamic RoPE changes its frequencies; a screen where there are no 8-bit products, or
            for a model that is not fused or has an adapter on lm_head; or (UnsupportedModelError) the model
            has no static cache of keys and values.
        FloatingPointError: a row that is not finished has NaN, +inf or no finite allowed logit. The message
            names the first such step and its rows. It is raised at the next check.
    """
    checks.flags(
        return_kept=return_kept, check=check, progress=progress, cuda_graph=cuda_graph, compile=compile
    )
    base = servable_model(model)
    head = screened_head(base, screen)
    eos: list[Any] = [] if eos_id is None else [eos_id]
    if isinstance(eos_id, Collection) and not isinstance(eos_id, str):
        eos = list(eos_id)
    check_prompts(base, input_ids, attention_mask, max_new_tokens, {"eos_id": eos, "pad_id": [pad_id]})
    check_bits(input_ids, seen=seen, allowed=allowed)
    options: dict[str, Any] = {
        "seed": seed,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
    }
    options |= {"sequence_ids": sequence_ids, "repetition_penalty": repetition_penalty}
    # Logits of one id: wrong options raise here, before the model runs.
    one_id = input_ids.new_zeros(len(input_ids), 1, dtype=torch.float32)
    sample(one_id, positions=positions, finished=finished, check=True, **options)
    if positions is not None and int(positions.max()) >= 2**32 - max_new_tokens:
        raise ValueError(
            f"positions: got {positions.tolist()[:8]}, expected numbers below 2^32 - max_new_tokens"
        )
    rows = {"seen": seen, "finished": finished, "positions": positions}

    bar = tqdm(total=max_new_tokens, unit="step", disable=not progress)
    with probing(model), torch.cuda.device_of(input_ids), bar:
        options |= {"allowed": allowed}
        state = Decoding(
            model,
            base,
            input_ids=input_ids,
            attention_mask=attention_mask.long(),
            max_new_tokens=max_new_tokens,
            eos=eos,
            options=options | {"pad_id": pad_id},
            head=head,
            return_kept=return_kept,
            compile_step=compile,
            **rows,
        )
        state.collect_kept()
        capture = cuda_graph and can_capture(base, state.logs)
        steps = run_steps(state.step, capture=capture, name=type(base).__name__)
        poll = 1 if check else POLL
        for done in range(1, max_new_tokens):
            if done % poll == 0:
                bar.update(poll)
                if state.all_ended():
                    break
            next(steps)
            state.collect_kept()
        state.all_ended()  # raises for rows that failed since the last check
        bar.update(state.column.item() - bar.n)
    lengths = state.mask.sum(1)
    longest = int(lengths.max())
    tokens, mask, logs = (
        buffer[..., :longest].contiguous() for buffer in (state.tokens, state.mask, state.logs)
    )
    logp, log_kept, logp_raw, entropy = logs
    kept_ids = _by_token(state.kept_ids, longest) if return_kept else None
    return Rollout(tokens, mask, logp, log_kept, logp_raw, entropy, lengths, kept_ids)


def _by_token(steps: Sequence[KeptIds], R: int) -> KeptIds:
    """The kept ids of B rows at each of the first R steps, in CSR over the B R tokens row by row."""
    if R == 0:
        return KeptIds(steps[0].offsets[:1], steps[0].ids[:0])
    counts = torch.stack([step.offsets.diff() for step in steps[:R]], 1)
    sets = [step.ids.split(sizes) for step, sizes in zip(steps, counts.T.tolist(), strict=False)]
    ids = torch.cat([of_step[row] for row in range(len(counts)) for of_step in sets])
    return KeptIds(torch.nn.functional.pad(counts.flatten().cumsum(0), (1, 0)), ids)
