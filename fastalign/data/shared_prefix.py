"""The prompt that two sequences have in common, computed once: where it lies in a row, and who sees it.

A family lies in a row as its shared tokens and then, branch by branch, the rest of each sequence. A branch
sees the shared tokens and itself, at the positions that it has in a sequence of its own, so that
log-probabilities and gradients are those of separate sequences. The branches begin with the prompt's last
token: its hidden state predicts a completion's first one.

This takes full causal attention that is given a mask [T, T]; `explain_unshared` finds out whether a model has
it.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from os.path import commonprefix
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from .packing import FLASH, beyond_rounding, outputs_of, pack
from .tokens import Tokenized, last_token

# What configs call the reach of an attention, in tokens; `layer_types` says whether a layer has it.
_WINDOWS = (
    "sliding_window",
    "window_size",
    "attention_window_size",
    "attention_chunk_size",
    "local_attention",
)
_FULL, _SLIDING = "full_attention", "sliding_attention"


class Family(NamedTuple):
    """Sequences that lie in a row as one piece; one alone shares nothing."""

    members: tuple[int, ...]
    shared: int
    """Tokens that all of them begin with, and that are computed once."""
    length: int
    """Tokens of the whole."""


class Layout(NamedTuple):
    """Rows of segments: shared tokens, branches or whole sequences, and a row's padding at its end, which may
    be empty."""

    rows: list[list[Tokenized]]
    """The segments without the padding, for `fastalign.data.collate`."""
    starts: Tensor
    """int64 [segments + 1]: where each begins among the [B·T] tokens, and the end."""
    places: Tensor
    """int64 [S]: the segment that each sequence ends with."""
    prefixes: Tensor
    """int64 [segments]: the segment that holds what comes before each, or itself."""
    skipped: Tensor
    """int64 [segments]: the tokens of a sequence that come before each."""


def find_families(sequences: Sequence[Tokenized], prompts: Sequence[int], *, pad_id: int) -> list[Family]:
    """Sequences with the same number in `prompts` [S] are a family, where they share a token; any other is
    one of its own.

    Shared is what they begin with, short of the token before the first trained one, and of the last that is
    not padding, at which a classifier reads its score. So whatever is read of a sequence lies in a branch.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        groups[prompt].append(number)
    families = []
    for group in groups.values():
        shareable = [sequences[number].input_ids[: _read_from(sequences[number], pad_id)] for number in group]
        shared = len(commonprefix(shareable)) if len(group) > 1 else 0
        lengths = [len(sequences[number].input_ids) for number in group]
        if shared:
            families.append(Family(tuple(group), shared, sum(lengths) - shared * (len(group) - 1)))
        else:
            families += [Family((number,), 0, length) for number, length in zip(group, lengths, strict=True)]
    return families


def _read_from(sequence: Tokenized, pad_id: int) -> int:
    first = sequence.trained.index(True) if True in sequence.trained else len(sequence.trained)
    return max(0, min(first - 1, last_token(sequence, pad_id=pad_id)))


def fill_rows(families: Sequence[Family]) -> list[list[Family]]:
    """Rows as long as the longest family, with further ones where they fit."""
    lengths = [family.length for family in families]
    return [[families[number] for number in row] for row in pack(lengths, max(lengths))]


def count_operations(rows: Sequence[Sequence[Family]], *, hidden_size: int) -> float:
    """What rows cost in a Transformer layer, of 24 H² flops a token and 4 H for each pair of tokens, in units
    of 4 H.

    Half of the pairs where every row is one sequence, which needs no mask. Measured on two AMD cores, DPO
    steps of a Llama with H 256 and 4 layers are 1.6 times faster with a shared prompt of 384 tokens before
    completions of 64, and 1.2 times with 128 before 128; they would be 1.07 times slower with 64 before 256,
    and 1.15 times with 16 before 256, which this count avoids.
    """
    width = max(sum(family.length for family in row) for row in rows)
    masked = any(len(row) > 1 or row[0].shared for row in rows)
    return len(rows) * width * (6 * hidden_size + width * (1.0 if masked else 0.5))


def lay_out(sequences: Sequence[Tokenized], rows: Sequence[Sequence[Family]]) -> Layout:
    """Where everything lies in rows of families, each as long as the longest."""
    width = max(sum(family.length for family in row) for row in rows)
    pieces: list[list[Tokenized]] = []
    segments: list[tuple[int, int, int]] = []  # length, prefix, skipped
    places = [0] * len(sequences)
    for row in rows:
        pieces.append([])
        for family in row:
            first, shared = len(segments), family.shared
            if shared:
                pieces[-1].append(
                    Tokenized(sequences[family.members[0]].input_ids[:shared], [False] * shared)
                )
                segments.append((shared, first, 0))
            for number in family.members:
                places[number] = len(segments)
                ids, trained = sequences[number]
                pieces[-1].append(Tokenized(ids[shared:], trained[shared:]))
                segments.append((len(ids) - shared, first, shared))
        segments.append((width - sum(family.length for family in row), len(segments), 0))
    lengths, prefixes, skipped = torch.tensor(segments).unbind(1)
    return Layout(pieces, F.pad(lengths.cumsum(0), (1, 0)), torch.tensor(places), prefixes, skipped)


def model_arguments(packed: Mapping[str, Any]) -> dict[str, Any]:
    """A model's arguments for what `fastalign.data.pack_sequences` packed, with the mask where prompts
    are shared.

    The mask is made here, on the tokens' device, as transformers makes one for packed rows: a batch that
    waits is small.
    """
    arguments = dict(packed["arguments"])
    if "prefixes" in packed:
        shape = arguments["input_ids"].shape
        arguments["attention_mask"] = _mask(
            packed["starts"], packed["prefixes"], shape, additive=packed["additive"]
        )
    return arguments


def _mask(starts: Tensor, prefixes: Tensor, shape: torch.Size, *, additive: bool) -> Tensor:
    """[B, 1, T, T]: a token sees those not behind it of its own segment and of the one before. bool, or fp32
    to add to scores."""
    numbers = torch.arange(len(prefixes), device=starts.device)
    own = numbers.repeat_interleave(starts.diff(), output_size=shape.numel()).view(shape)
    seen = (own[:, :, None] == own[:, None, :]) | (prefixes[own][:, :, None] == own[:, None, :])
    mask = seen.tril_()[:, None]
    if not additive:
        return mask
    # fp32 whatever the scores are: they are added up in the wider of the two, and softmax is taken in fp32 at
    # least.
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, torch.finfo(torch.float32).min)


def explain_unshared(
    model: PreTrainedModel, packer: Callable[..., Mapping[str, Any]], *, attention: str, longest: int
) -> str | None:
    """Why sequences of up to `longest` tokens must each have their own prompt in this backbone; None where
    two can share it.

    What the config says of layers and windows is believed. Then two sequences of `longest` tokens (eight at
    least), packed by `packer` with a shared prompt and without, must give the same hidden states up to
    rounding, as in `check_packing`: they are as long as in training, so that position tables and windows that
    are measured along the row show. Evaluation mode; call it without autocast, whose rounding could hide a
    difference.
    """
    if attention == FLASH:
        return f"{attention} takes no mask"
    name, config = type(model).__name__, model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or (_FULL, _SLIDING))
    if others := sorted(kinds - {_FULL, _SLIDING}):
        return f"{name} has layers of the kind {', '.join(others)}"
    windows = {field: getattr(config, field, None) for field in _WINDOWS if _SLIDING in kinds}
    for field, window in windows.items():
        # Some models measure it along the row, and a pair with a short prompt is up to twice as long as a
        # sequence.
        if isinstance(window, int) and window < 2 * longest:
            return f"{name} has a {field} of {window} tokens, and pairs have up to {2 * longest}"

    prompt, rest = range(5), max(longest, 8) - 5
    sequences = [
        Tokenized(
            [token % config.vocab_size for token in (*prompt, *range(5, 5 + step * rest, step))],
            [False] * 5 + [True] * rest,
        )
        for step in (3, 7)
    ]
    branches = []
    for hidden_size in (None, 2**40):  # so wide that nothing counts but the number of tokens
        packed = packer(sequences, [0, 0], hidden_size=hidden_size)
        ends = packed["starts"][packed["places"] + 1]
        try:
            outputs = outputs_of(model, model_arguments(packed))
        except (
            AttributeError,
            IndexError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:  # each model has its own for a mask [T, T]
            return f"{name} does not take a mask: {error}"
        branches.append(torch.cat([outputs[end - rest - 1 : end] for end in ends.tolist()]))
    difference = beyond_rounding(branches[1], branches[0])
    return difference and f"the hidden states of {name} would be {difference}"
