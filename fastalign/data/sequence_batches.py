"""S sequences in one forward pass, and what is read of each: its log-probability or its last token."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastalign_kernels import sum_by_sequence

from .packing import FLASH, collate
from .shared_prefix import Family, count_operations, fill_rows, find_families, lay_out, model_arguments
from .tokens import Tokenized, last_token


def last_tokens(packed: dict[str, Any], *, pad_id: int) -> Tensor:
    """The `ends` [S] of packed sequences: the last token of each other than `pad_id`.

    transformers' classifiers read their score there.
    """
    behind = [
        len(sequence.input_ids) - last_token(sequence, pad_id=pad_id) for sequence in packed["sequences"]
    ]
    return packed["starts"][packed["places"] + 1] - torch.tensor(behind, dtype=torch.int64)


Batch = dict[str, Any]


def pack_sequences(
    sequences: Sequence[Tokenized],
    prompts: Sequence[int] | None = None,
    *,
    pad_id: int,
    attention: str = "sdpa",
    packing: bool = True,
    hidden_size: int | None = None,
) -> Batch:
    """S sequences for one forward pass, and where each of them lies in it.

    `arguments` are `collate`'s, for a model. Rows are as long as the longest sequence and hold further ones
    if they fit; without `packing` there is one sequence per row, and flash attention's single row holds
    all. `starts` and `places` are int64. The tokens' values [B, T], flattened, belong to segments that
    begin at `starts` [segments + 1]. The sequences are the segments `places` [S]; the remaining segments
    are padding. `lengths`: int64 [S], scored tokens. `sequences`: as given. No sequences become one row of
    a padding token.

    Sequences with the same number in `prompts` [S] begin alike. If `hidden_size` is given, that of a model
    that takes masks (`shared_prefix.explain_unshared`), their common prefix is computed once, provided that
    this takes fewer operations. It needs `packing` and excludes flash attention. Rows are then as long as
    the longest family of sequences. The prefix is a segment, the rest of each sequence is another, and
    `prefixes`, int64 [segments], is the segment before each, or itself. `shared_prefix.model_arguments`
    adds the mask to the arguments, as numbers if `additive`, for eager attention.
    """
    if not sequences:
        padding = pack_sequences([Tokenized([pad_id], [False])], pad_id=pad_id, attention=attention)
        return padding | {"places": padding["places"][:0], "lengths": padding["lengths"][:0], "sequences": ()}
    alone = [Family((number,), 0, len(sequence.input_ids)) for number, sequence in enumerate(sequences)]
    if attention == FLASH:
        rows = [alone]
    else:
        rows = fill_rows(alone) if packing else [[family] for family in alone]
    if hidden_size is not None and prompts is not None:
        shared = fill_rows(find_families(sequences, prompts, pad_id=pad_id))
        rows = min(rows, shared, key=partial(count_operations, hidden_size=hidden_size))
    layout = lay_out(sequences, rows)
    arguments = collate(layout.rows, pad_id=pad_id, attention=attention)
    batch: Batch = {
        "arguments": arguments,
        "starts": layout.starts,
        "places": layout.places,
        "lengths": torch.tensor([sum(sequence.trained) for sequence in sequences]),
        "sequences": tuple(sequences),
    }
    if layout.skipped.any():
        position_ids = arguments["position_ids"]
        position_ids += layout.skipped.repeat_interleave(layout.starts.diff()).view_as(position_ids)
        batch |= {"prefixes": layout.prefixes, "additive": attention == "eager"}
    return batch


def sequence_logps(model: nn.Module, packed: Batch) -> Tensor:
    """log P(completion | prompt) of each sequence, [S] in nats, by a fused causal LM.

    fp32, or fp64 for fp64.
    """
    output = model(**model_arguments(packed), token_stats=True, use_cache=False)
    return sum_by_sequence(output.logp.flatten(), packed["starts"])[packed["places"]]


def at_places(values: Tensor, at: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of this shape with values [N] at the places [N] of its flattened form, and 0 elsewhere."""
    return values.new_zeros(shape.numel()).index_copy_(0, at, values).view(shape)
