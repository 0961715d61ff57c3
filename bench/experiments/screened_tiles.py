"""A GPU's screen on SmolLM2's head, emulated on a CPU: `python -m bench.experiments.screened_tiles`.

linear/gpu/screen.py keeps whole tiles of columns for a part of the tokens. This computes its codes and its
tiles in PyTorch, for bf16 factors, and compares log-probabilities and entropy with exact logits: the table of
docs/screen.md. It takes a minute on two cores, and no GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign_kernels.gemm_int8 import code_rows_ref, rotated_coding
from fastalign_kernels.linear.gpu.screen import UNKEPT_PART, UNTAILED_EPS
from fastalign_kernels.linear.gpu.screen_codes import LARGEST_BLOCK
from fastalign_kernels.linear.gpu.tail_tiles import PART, TILE
from fastalign_kernels.linear.screen_weight import longest_directions

from ..core.operation import Shape
from ..core.smollm2 import head_inputs

SHAPE = Shape(2048, 576, 49152)
ROWS = 256  # tokens whose logits are computed at once
# (threshold, tokens of a part)
SETTINGS = (
    *((eps, UNKEPT_PART) for eps in (UNTAILED_EPS, 2.0**-12, 2.0**-14)),
    *((eps, PART) for eps in (2.0**-12, 2.0**-14)),
)


class Logits(NamedTuple):
    exact: Tensor  # [N, V]
    screened: Tensor  # [N, V], of 8 bits


def logits_of(hidden: Tensor, weight: Tensor) -> Logits:
    """Exact logits, and those of the codes that a GPU makes."""
    coding = rotated_coding(weight.shape[1])
    coding = coding._replace(block=min(coding.block, LARGEST_BLOCK))
    coding = coding._replace(basis=longest_directions(weight, coding))
    right = code_rows_ref(weight, coding, left=False)
    codes = right.codes.float()
    parts = []
    for x in hidden.split(ROWS):
        left = code_rows_ref(x, coding, left=True)
        products = left.codes.float() @ codes.t()  # exact: below 2^24
        parts.append(products * right.scales * left.scales[:, None] + left.low @ right.low.t())
    return Logits(hidden @ weight.t(), torch.cat(parts))


def kept_columns(screened: Tensor, ids: Tensor, eps: float, part: int) -> Tensor:
    """The columns [parts, V] of the tiles that each part keeps."""
    probabilities = (screened - screened.logsumexp(1, keepdim=True)).exp_()
    of_parts = []
    for p, targets in zip(probabilities.split(part), ids.split(part)):
        keep = p.amax(0) > eps
        keep[targets] = True
        keep[p.argmax(1)] = True
        of_parts.append(keep)
    keeps = torch.stack(of_parts)
    bits = (keeps.long() << torch.arange(len(keeps))[:, None]).sum(0)
    rank = bits
    for shift in (1, 2, 4, 8):  # as rank_kernel: where the bits stand in a Gray code
        rank = rank ^ (rank >> shift)
    order = torch.sort(rank, descending=True, stable=True).indices
    found = torch.zeros_like(keeps)
    for tile in order.split(TILE):
        found[:, tile] = keeps[:, tile].any(1, keepdim=True)
    return found


class Errors(NamedTuple):
    kept: float  # share of the columns in kept tiles
    logp: float  # nats, root mean square
    largest: float  # nats
    entropy: float  # nats, root mean square


def errors(logits: Logits, ids: Tensor, eps: float, part: int) -> Errors:
    """The errors of log-probabilities and entropies whose kept columns are exact."""
    kept = kept_columns(logits.screened, ids, eps, part)

    def entropies(z: Tensor) -> tuple[Tensor, Tensor]:
        lse = z.double().logsumexp(1)
        logp = z.double() - lse[:, None]
        return lse, -(logp.exp() * logp).sum(1)

    off_lse, off_entropy = [], []
    for keep, exact, screened in zip(kept, logits.exact.split(part), logits.screened.split(part)):
        lse, entropy = entropies(torch.where(keep, exact, screened))
        true_lse, true_entropy = entropies(exact)
        off_lse.append(lse - true_lse)  # a target's logit is exact, so its logp is off by this
        off_entropy.append(entropy - true_entropy)
    lse, entropy = torch.cat(off_lse), torch.cat(off_entropy)
    return Errors(
        float(kept.double().mean()),
        float(lse.square().mean().sqrt()),
        float(lse.abs().max()),
        float(entropy.square().mean().sqrt()),
    )


def lines(hidden: Tensor, weight: Tensor, ids: Tensor) -> Iterator[str]:
    """The table as Markdown."""
    names = ("threshold", "tokens of a part", "columns in kept tiles", "logp, nats rms", "largest")
    yield f"| {' | '.join(names)} | entropy, rms |"
    yield "|" + " --- |" * (len(names) + 1)
    logits = logits_of(hidden.bfloat16().float(), weight.bfloat16().float())
    for eps, part in SETTINGS:
        kept, logp, largest, entropy = errors(logits, ids, eps, part)
        cells = (f"2^{math.log2(eps):.0f}", f"{part:,}", f"{kept:.3f}")
        yield f"| {' | '.join(cells)} | {logp:.1e} | {largest:.1e} | {entropy:.1e} |"


if __name__ == "__main__":
    inputs = head_inputs(SHAPE, torch.float32, "cpu")
    print(*lines(inputs["hidden"], inputs["weight"], inputs["ids"]), sep="\n")
