"""The ids that a rollout's filter kept at each token, in CSR: what `kept=` of the head functions takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..torch_func import unwrapped
from .inputs import HeadInputs
from .options import check_no_screen, check_no_tail


class KeptSets(NamedTuple):
    """The ids that are kept at each of N tokens; M of all tokens together."""

    offsets: Tensor  # [N + 1] int64: those of token n are ids[offsets[n] : offsets[n + 1]]
    ids: Tensor  # [M] int64

    def rows(self) -> Tensor:
        """The token of each kept id, [M] int64."""
        tokens = torch.arange(self.offsets.numel() - 1, device=self.offsets.device)
        return tokens.repeat_interleave(self.offsets.diff(), output_size=self.ids.numel())


def kept_sets(kept: object, inputs: HeadInputs) -> KeptSets:
    """Checked kept sets of a head call.

    Raises:
        ValueError: `kept` is no pair of tensors, or one of a wrong shape, dtype or device; where values are
            `readable`, offsets that are no CSR and ids outside [0, V); with check=True also a token whose id
            is not in its set, and an id that is twice in a set.
    """
    if not isinstance(kept, (tuple, list)) or len(kept) != 2 or not all(isinstance(x, Tensor) for x in kept):
        raise ValueError(f"kept: got {checks.shown(kept)}, expected a pair of tensors (offsets [N + 1], ids)")
    check_no_tail(inputs.options, "a call with kept sets")
    check_no_screen(inputs.options, "a call with kept sets")
    offsets, ids = kept
    N = inputs.ids.numel()
    for tensor in kept:
        checks.dtype("kept", tensor, checks.INTEGERS)
        checks.device("kept", tensor, "hidden", inputs.hidden)
    if tuple(offsets.shape) != (N + 1,) or ids.dim() != 1:
        raise ValueError(
            f"kept: got offsets {list(offsets.shape)} and ids {list(ids.shape)}, expected [{N + 1}] for "
            f"{N} tokens, and one dimension"
        )
    sets = KeptSets(offsets.long().contiguous(), ids.long().contiguous())
    if checks.readable(ids, inputs.options.check):
        _check_values(sets, inputs.vocab_size)
        if inputs.options.check or checks.everywhere():
            _check_sets(sets, unwrapped(inputs.ids), inputs.vocab_size)
    return sets


def _check_values(sets: KeptSets, vocab_size: int) -> None:
    """Refuse offsets that fall or do not go from 0 to M, and ids outside [0, V)."""
    offsets, ids = (unwrapped(x) for x in sets)
    M = ids.numel()
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != M or (offsets.diff() < 0).any():
        raise ValueError(
            f"kept: got offsets from {first} to {last}, expected a rise from 0 to {M}, the number of ids"
        )
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        place = int(outside.nonzero()[0])
        raise ValueError(f"kept: got id {int(ids[place])} at {place}, expected ids in [0, {vocab_size})")


def _check_sets(sets: KeptSets, targets: Tensor, vocab_size: int) -> None:
    """Refuse a set that lacks the target of a token that counts, and a set with an id twice."""
    sets = KeptSets(*(unwrapped(x) for x in sets))
    rows = sets.rows()
    found = torch.zeros_like(targets, dtype=torch.bool)
    found[rows[sets.ids == targets[rows]]] = True
    missing = (targets >= 0) & ~found
    if missing.any():
        token, number = int(missing.nonzero()[0]), int(missing.sum())
        raise ValueError(
            f"kept: got a set without id {int(targets[token])} at token {token} ({number} such), "
            "expected each token's id in its set"
        )
    ordered = (rows * vocab_size + sets.ids).sort().values
    twice = ordered[1:] == ordered[:-1]
    if twice.any():
        pair = int(ordered[1:][twice][0])
        raise ValueError(
            f"kept: got id {pair % vocab_size} twice at token {pair // vocab_size}, expected different ids"
        )
