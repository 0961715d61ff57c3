"""Rollout sampling: one read of the logits gives the token and every log-probability that reinforcement
learning asks of it.

For a row x [V], in the order of transformers' warpers and in nats:

    z = x; seen tokens are divided by the repetition penalty if x > 0, multiplied by it if x < 0
    z = -inf where a token is not allowed
    p = softmax(z / temperature)
    top_k keeps z >= the k-th largest z
    top_p then keeps z if the p above z is less than top_p of what top_k kept
    min_p then keeps p >= min_p max p
    (all three are thresholds on the value, so ties are kept together)
    token ~ p over the kept, log_kept = log(sum of p over the kept), logp = log p[token] - log_kept,
    logp_raw = log softmax(x)[token], entropy = -sum softmax(x) log softmax(x)

The draw is a race of exponentials on two levels: chunks of 256 ids race with their kept mass, then the
winner's ids with theirs: argmin E / mass with E ~ Exp(1) is a draw in proportion to mass. E = -log(1 - u),
u from the 64 bits that Philox4x32-10 makes of (seed, sequence id, position, id or chunk), exact to 2^-64 near
0, where tail tokens win. So a token depends on its row's logits, sequence and position: not on the batch, the
slot, the threads or the machine.

csrc/sampling is the native implementation, on a CPU and on CUDA bit for bit the same; `sample_ref` below
is its specification in fp64, and serves where the native library is missing and for fp64 logits. Bytes: B V e
for the logits (and V/8 a row and bit mask).
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from . import checks, native
from .autograd import with_signature
from .dispatch import Kernels
from .namespace import NAMESPACE
from .sampling_inputs import OPTIONS, SampleInputs, row_values, sample_inputs
from .sampling_kept import KeptIds, KeptRows, penalised
from .sampling_noise import exponential
from .softmax.rows import accumulator_dtype

CHUNK = 256  # ids of a chunk; part of the specification, as csrc/sampling/arithmetic.h has it


class Sample(NamedTuple):
    """The drawn tokens and the log-probabilities of the draw.

    token: [B] int64. logp, log_kept, logp_raw, entropy: [B] in nats. kept: [B] int64, the number of ids that
    the filters left. valid: [B] bool. kept_ids: those ids, with return_kept=True.

    A row is not valid if its logits have NaN or +inf, before or after the penalty, or if no allowed logit is
    finite. Its token is pad_id or -1, kept is 0, and the rest is NaN. A finished row has token pad_id or -1,
    zeros elsewhere, and is valid.
    """

    token: Tensor
    logp: Tensor
    log_kept: Tensor
    logp_raw: Tensor
    entropy: Tensor
    kept: Tensor
    valid: Tensor
    kept_ids: KeptIds | None = None


def sample(
    logits: Tensor,
    *,
    seed: int,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    sequence_ids: Tensor | None = None,
    positions: Tensor | None = None,
    repetition_penalty: float | Tensor = 1.0,
    seen: Tensor | None = None,
    allowed: Tensor | None = None,
    finished: Tensor | None = None,
    pad_id: int | None = None,
    return_kept: bool = False,
    check: bool = False,
) -> Sample:
    """Draws a token from each row of logits, by the formulas at the top of this file.

    Args:
        logits: [B, V], fp32, bf16 or fp16 (also fp64 on a CPU). Unit stride over V, any stride over B. V is
            at most 2^20.
        seed: 0 to 2^63 - 1. The same seed, sequence id, position and logits draw the same token.
        temperature: a number or [B]. 0 takes the largest logit (the lowest id among equal ones), with logp 0.
        top_k, top_p, min_p: numbers or [B]. 0, 1 and 0 filter nothing.
        sequence_ids, positions: [B] integers that key the noise. By default the row's number and 0. Positions
            are in [0, 2^32).
        repetition_penalty: a number or [B], for the ids that `seen` marks.
        seen, allowed: int32 bit masks [B, ceil(V / 32)]. Id v is bit v % 32 of word v // 32.
        finished: [B] bool. Finished rows are not read, and their token is pad_id.
        pad_id: the token of finished and of invalid rows. None: -1.
        return_kept: also return the ids that the filters left. Waits for the device.
        check: raise for rows that are not valid, and on CUDA check the values of tensor options. Both wait
            for the device.

    Returns:
        Sample. token is int64, log-probabilities are fp32 (fp64 for fp64 logits). No gradient.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range. With check, also rows that are
            not valid, by number.
    """
    checks.flags(check=check, return_kept=return_kept)
    inputs = sample_inputs(
        logits,
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        sequence_ids=sequence_ids,
        positions=positions,
        repetition_penalty=repetition_penalty,
        seen=seen,
        allowed=allowed,
        finished=finished,
        pad_id=pad_id,
        check=check,
    )
    token, logs, kept, valid = KERNELS.select(logits).sample(*inputs)
    logp, log_kept, logp_raw, entropy = logs.unbind()
    if check and not bool(valid.all()):
        rows = (~valid).nonzero()[:, 0].tolist()
        raise ValueError(
            f"logits: got NaN, +inf or no finite allowed logit in {len(rows)} rows, {rows[:8]} first, "
            "expected finite logits"
        )
    drawn = Sample(token, logp, log_kept, logp_raw, entropy, kept, valid)
    if not return_kept:
        return drawn
    rows = kept_rows(drawn, logits, repetition_penalty=repetition_penalty, seen=seen, allowed=allowed)
    return drawn._replace(kept_ids=rows.ids())


def kept_rows(
    drawn: Sample,
    logits: Tensor,
    *,
    repetition_penalty: float | Tensor,
    seen: Tensor | None,
    allowed: Tensor | None,
) -> KeptRows:
    """What determines the kept ids of a draw; the arguments are those of its `sample`."""
    penalty = row_values(repetition_penalty, logits)[:, None]
    z = penalised(logits.detach().to(drawn.logp.dtype), penalty, seen, allowed)
    return KeptRows(z, drawn.kept, drawn.token)


def _reference(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`sample_ref` under the schema of the native op: token [B], logs [4, B], kept [B], valid [B]."""
    given = SampleInputs(*arguments)._asdict()
    table = given.pop("table")
    if table is not None:
        given.update(zip(OPTIONS, table))
    found = sample_ref(**given)
    return found.token, torch.stack(found[1:5]), found.kept, found.valid


def _fake_sample(logits: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B = logits.shape[0]
    return (
        logits.new_empty(B, dtype=torch.int64),
        logits.new_empty(4, B, dtype=accumulator_dtype(logits.dtype)),
        logits.new_empty(B, dtype=torch.int64),
        logits.new_empty(B, dtype=torch.bool),
    )


_sample_reference = torch.library.custom_op(
    f"{NAMESPACE}::sample_reference",
    with_signature(_reference, get_type_hints(SampleInputs), get_type_hints(_reference)["return"]),
    mutates_args=(),
)
_sample_reference.register_fake(_fake_sample)
KERNELS = Kernels(SimpleNamespace(sample=_sample_reference), native_fp64=False)
if not native.missing:
    torch.library.register_fake(f"{NAMESPACE}::sample", _fake_sample)


def sample_ref(
    logits: Tensor,
    *,
    seed: int,
    temperature: float | Tensor = 1.0,
    top_k: float | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    sequence_ids: Tensor | None = None,
    positions: Tensor | None = None,
    repetition_penalty: float | Tensor = 1.0,
    seen: Tensor | None = None,
    allowed: Tensor | None = None,
    finished: Tensor | None = None,
    pad_id: int | None = None,
) -> Sample:
    """The specification of `sample`, in fp64 by a sort: same arguments, same tokens (but where two ids tie to
    fp32 rounding)."""
    B, V = logits.shape
    device = logits.device

    def column(value: float | Tensor) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float64, device=device).expand(B)[:, None]

    T, k, p, least, penalty = map(column, (temperature, top_k, top_p, min_p, repetition_penalty))
    x = logits.to(accumulator_dtype(logits.dtype))
    z = penalised(x, penalty, seen, allowed)
    x, z = x.double(), z.double()
    row_max = z.amax(-1, keepdim=True)
    alive = torch.ones(B, dtype=torch.bool, device=device) if finished is None else ~finished
    # NaN compares false
    valid = (x < math.inf).all(-1) & (z < math.inf).all(-1) & (row_max[:, 0] > -math.inf)
    usable = (alive & valid)[:, None]
    x, z = torch.where(usable, x, 0.0), torch.where(usable, z, 0.0)
    row_max = z.amax(-1, keepdim=True)

    greedy = T == 0
    scaled = (z - row_max) / torch.where(greedy, 1.0, T)
    mass = scaled.exp()
    order = z.argsort(dim=-1, descending=True, stable=True)
    by_value = z.gather(-1, order)
    nothing = torch.full_like(row_max, -math.inf)
    cut_k = torch.where((k > 0) & (k < V), by_value.gather(-1, (k.clamp(1, V) - 1).long()), nothing)
    sorted_mass = torch.where(by_value >= cut_k, mass.gather(-1, order), 0.0)
    above = sorted_mass.cumsum(-1) - sorted_mass
    before_cut = (above < p * sorted_mass.sum(-1, keepdim=True)) & (by_value >= cut_k)
    within = before_cut.sum(-1, keepdim=True).clamp(min=1)
    cut_p = torch.where(p < 1, by_value.gather(-1, within - 1), nothing)
    keep = (z > -math.inf) & (z >= cut_k) & (z >= cut_p) & (scaled >= least.log())
    first = torch.zeros_like(keep).scatter_(-1, (z == row_max).int().argmax(-1, keepdim=True), True)
    keep = torch.where(greedy, first, keep)

    mass = torch.where(keep, mass, 0.0)
    sequence = torch.arange(B, device=device) if sequence_ids is None else sequence_ids.long()
    position = torch.zeros_like(sequence) if positions is None else positions.long()
    chunks = -(-V // CHUNK)
    padded = torch.nn.functional.pad(mass, (0, chunks * CHUNK - V)).view(B, chunks, CHUNK)
    tags = torch.arange(chunks, device=device) | 1 << 31
    chunk = (exponential(seed, sequence, position, tags.expand(B, -1)) / padded.sum(-1)).argmin(
        -1, keepdim=True
    )
    ids = chunk * CHUNK + torch.arange(CHUNK, device=device)
    chunk_mass = padded.gather(1, chunk[..., None].expand(-1, -1, CHUNK))[:, 0]
    token = chunk[:, 0] * CHUNK + (exponential(seed, sequence, position, ids) / chunk_mass).argmin(-1)
    token = torch.where(greedy[:, 0], first.int().argmax(-1), token)

    log_sum = scaled.logsumexp(-1)
    log_mass = mass.sum(-1).log()
    at_token = scaled.gather(-1, token[:, None])[:, 0]
    raw = x.log_softmax(-1)
    entropy = -(raw.exp() * raw.clamp(min=-1e30)).sum(-1)
    zero = torch.zeros_like(log_sum)
    logp, log_kept = (
        torch.where(greedy[:, 0], zero, value) for value in (at_token - log_mass, log_mass - log_sum)
    )
    poison = torch.where(valid, 0.0, math.nan)
    numbers = (logp, log_kept, raw.gather(-1, token[:, None])[:, 0], entropy)
    dtype = accumulator_dtype(logits.dtype)
    pad = -1 if pad_id is None else pad_id
    ok = usable[:, 0]
    logp, log_kept, logp_raw, entropy = (
        torch.where(alive, torch.where(ok, number, poison), zero).to(dtype) for number in numbers
    )
    token, kept = torch.where(ok, token, pad), torch.where(ok, keep.sum(-1), 0)
    return Sample(token, logp, log_kept, logp_raw, entropy, kept, valid | ~alive)
