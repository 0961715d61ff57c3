"""A prompt that two sequences share is computed once: where it lies in a row, and who sees it.

A family of sequences lies in a row as its shared tokens followed, branch by branch, by the rest of each
sequence. A branch sees the shared tokens and itself, at the positions that it would have alone. So
log-probabilities and gradients are those of separate sequences. Branches begin with the prompt's last
token, because its hidden state predicts a completion's first token.

This needs full causal attention that takes a mask [T, T]; `explain_unshared` finds out whether a model has
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

# Names in configs for the reach of an attention, in tokens. `layer_types` says whether a layer has it.
_WINDOWS = (
    "sliding_window",
    "window_size",
    "attention_window_size",
    "attention_chunk_size",
    "local_attention",
)
_FULL, _SLIDING = "full_attention", "sliding_attention"


class Family(NamedTuple):
    """Sequences that lie in a row as one piece. A family of one shares nothing."""

    members: tuple[int, ...]
    shared: int
    """Tokens that all of them begin with, which are computed once."""
    length: int
    """Tokens of the whole piece."""


class Layout(NamedTuple):
    """Rows of segments.

    A segment is a shared prefix, a branch, a whole sequence, or the padding at a row's end (which may be
    empty).
    """

    rows: list[list[Tokenized]]
    """The segments without the padding, for `fastalign.data.collate`."""
    starts: Tensor
    """int64 [segments + 1]: where each segment begins among the [B·T] tokens, and the end."""
    places: Tensor
    """int64 [S]: the last segment of each sequence."""
    prefixes: Tensor
    """int64 [segments]: the segment that comes before each in its sequence, or itself."""
    skipped: Tensor
    """int64 [segments]: the tokens of the sequence before each segment."""


def find_families(sequences: Sequence[Tokenized], prompts: Sequence[int], *, pad_id: int) -> list[Family]:
    """Group the sequences that have the same number in `prompts` [S] and share a token.

    Any other sequence is a family of one.

    The shared prefix ends before the token that predicts the first trained one, and before the last token
    that is not padding, where a classifier reads its score. So whatever is read of a sequence lies in its
    branch.
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
    """Rows as long as the longest family, with further families if they fit."""
    lengths = [family.length for family in families]
    return [[families[number] for number in row] for row in pack(lengths, max(lengths))]


def count_operations(rows: Sequence[Sequence[Family]], *, hidden_size: int) -> float:
    """Cost of rows in a Transformer layer, in units of 4 H: 24 H² flops per token and 4 H per pair of tokens.

    Rows of one sequence each need no mask and half of the pairs. Measured on two AMD cores, DPO steps of a
    Llama with H 256 and 4 layers are 1.6 times as fast with a shared prompt of 384 tokens and completions
    of 64, and 1.2 times with 128 and 128. They would be 1.07 times slower with 64 and 256, and 1.15 times
    with 16 and 256, which this count avoids.
    """
    width = max(sum(family.length for family in row) for row in rows)
    masked = any(len(row) > 1 or row[0].shared for row in rows)
    return len(rows) * width * (6 * hidden_size + width * (1.0 if masked else 0.5))


def lay_out(sequences: Sequence[Tokenized], rows: Sequence[Sequence[Family]]) -> Layout:
    """The place of each segment in rows of families, each row as long as the longest."""
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
    """A model's arguments for packed sequences, with the mask if prompts are shared.

    The mask is built here, on the tokens' device, as transformers builds one for packed rows. So a batch
    that waits is small.
    """
    arguments = dict(packed["arguments"])
    if "prefixes" in packed:
        shape = arguments["input_ids"].shape
        arguments["attention_mask"] = _mask(
            packed["starts"], packed["prefixes"], shape, additive=packed["additive"]
        )
    return arguments


def _mask(starts: Tensor, prefixes: Tensor, shape: torch.Size, *, additive: bool) -> Tensor:
    """[B, 1, T, T]: a token sees earlier tokens of its own segment and of the segment before it.

    bool, or fp32 to add to scores.
    """
    numbers = torch.arange(len(prefixes), device=starts.device)
    segment = numbers.repeat_interleave(starts.diff(), output_size=shape.numel()).view(shape)
    visible = (segment[:, :, None] == segment[:, None, :]) | (
        prefixes[segment][:, :, None] == segment[:, None, :]
    )
    mask = visible.tril_()[:, None]
    if not additive:
        return mask
    # fp32 fits any scores: they are added in the wider of the two types, and softmax runs in fp32 at least.
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, torch.finfo(torch.float32).min)


def explain_unshared(
    model: PreTrainedModel, packer: Callable[..., Mapping[str, Any]], *, attention: str, longest: int
) -> str | None:
    """Why sequences of up to `longest` tokens cannot share a prompt in this backbone; None if they can.

    The config is trusted about layers and windows. Then two sequences of `longest` tokens (at least eight),
    packed by `packer` with a shared prompt and without, must give the same hidden states up to rounding, as
    in `check_packing`. They are as long as in training, so that position tables and windows measured along
    the row show. Runs in evaluation mode. Call it without autocast, whose rounding could hide a difference.
    """
    if attention == FLASH:
        return f"{attention} takes no mask"
    name, config = type(model).__name__, model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or (_FULL, _SLIDING))
    if unknown := sorted(kinds - {_FULL, _SLIDING}):
        return f"{name} has layers of the kind {', '.join(unknown)}"
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
        # Models raise errors of their own for a mask [T, T]
        except (
            AttributeError,
            IndexError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            return f"{name} does not take a mask: {error}"
        branches.append(torch.cat([outputs[end - rest - 1 : end] for end in ends.tolist()]))
    difference = beyond_rounding(branches[1], branches[0])
    return difference and f"the hidden states of {name} would be {difference}"
