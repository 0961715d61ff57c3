"""Rows of several sequences for a causal LM, and the check that such sequences do not see each other.

Letters: B batch rows, T time, S sequences.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..probe import probing
from ..rope import check_lengths, rope_switch
from .tokens import IGNORE_INDEX, Tokenized

FLASH = "flash_attention_2"
ATTENTION = ("sdpa", "eager", FLASH)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices into `lengths` (in tokens), each of at most `capacity` tokens: best-fit decreasing.

    Each index is in exactly one bin. The result depends on the arguments only. Uses at most 11/9 of the
    fewest possible bins, plus a constant (Johnson et al., SIAM J. Comput. 3(4), 1974), in O(n log n) steps
    and short memmoves. Raises ValueError for a length outside [1, capacity].
    """
    for index, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(f"lengths: got {length} at index {index}, expected 1 to capacity={capacity}")
    bins: list[list[int]] = []
    room: list[int] = []  # the distinct amounts left over in bins, ascending
    bins_with: dict[int, list[int]] = defaultdict(list)
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect_left(room, lengths[index])
        if place < len(room):
            left = room[place]
            chosen = bins_with[left].pop()
            if not bins_with[left]:
                del room[place]
        else:
            left, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(index)
        left -= lengths[index]
        if not bins_with[left]:
            insort(room, left)
        bins_with[left].append(chosen)
    return bins


def collate(
    examples: Sequence[Sequence[Tokenized]],
    *,
    pad_id: int,
    length: int | None = None,
    attention: str = "sdpa",
) -> dict[str, Any]:
    """Arguments of a transformers causal LM for B rows of sequences that must not see each other.

    input_ids, position_ids, labels: int64 [B, T]. T is `length`, or else the longest row. Positions restart
    at each sequence. Labels are -100 at tokens that are not trained, at each sequence's first token and at
    padding, which is on the right.

    Pass `use_cache=False` and no attention_mask: transformers then masks by the restarts, sliding windows
    included. With a cache, which is its default in training too, sequences would see each other.

    Flash attention masks by lengths, which transformers reads from a single row only. So for
    flash_attention_2 all sequences lie in one row, [1, total] or [1, B·length], with cu_seq_lens_q and
    cu_seq_lens_k (int32 [S+1]) and max_length_q and max_length_k (ints, so that no layer waits for the
    device).

    Raises ValueError for no rows, an empty row, a row longer than `length`, and an unknown `attention`.
    """
    if attention not in ATTENTION:
        raise ValueError(f"attention: got {attention!r}, expected one of {', '.join(ATTENTION)}")
    widths = [sum(len(sequence.input_ids) for sequence in row) for row in examples]
    if not widths or min(widths) == 0:
        raise ValueError(f"examples: got rows of {widths} tokens, expected rows of at least one token")
    if length is not None and max(widths) > length:
        raise ValueError(
            f"length: got {length}, expected at least the {max(widths)} tokens of the longest row"
        )
    rows, width = examples, length or max(widths)
    if attention == FLASH:
        rows = [[sequence for row in examples for sequence in row]]
        width = length * len(widths) if length else sum(widths)

    # If padding continues the count, a row stays one sequence and sdpa needs no mask. Otherwise each
    # padding token is at position 0, as a sequence of its own: a continued count could exceed a learned
    # position table.
    continues_count = length is None and all(len(row) == 1 for row in rows)
    input_ids, position_ids, labels = [], [], []
    for row in rows:
        ids = [token for sequence in row for token in sequence.input_ids]
        positions = [position for sequence in row for position in range(len(sequence.input_ids))]
        trained = [train for sequence in row for train in sequence.trained]
        targets = [
            token if train and position else IGNORE_INDEX
            for token, position, train in zip(ids, positions, trained, strict=True)
        ]
        padding = width - len(ids)
        input_ids.append(ids + [pad_id] * padding)
        position_ids.append(positions + (list(range(len(ids), width)) if continues_count else [0] * padding))
        labels.append(targets + [IGNORE_INDEX] * padding)
    lists = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
    batch: dict[str, Any] = {name: torch.tensor(values) for name, values in lists.items()}
    if attention == FLASH:
        lengths = [len(sequence.input_ids) for sequence in rows[0]]
        lengths += [width - sum(lengths)] if width > sum(lengths) else []
        ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        batch |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        batch |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    return batch


def check_packing(
    model: PreTrainedModel, *, attention: str = "sdpa", lengths: Iterable[int] | None = None
) -> None:
    """Raise ValueError if a packed sequence has other outputs than the same sequence alone.

    Outputs are logits, or a backbone's hidden states.

    This is the only place where recurrent layers that carry their state across sequences, and models that
    ignore position_ids, are found. It takes two forward passes of at most 12 tokens in evaluation mode.
    Call it under training's autocast.

    `lengths`: the tokens of the sequences to pack. A model with LongRoPE or dynamic RoPE needs them,
    because the longest sequence of a row decides the frequencies of all.
    """
    if lengths is None and (switch := rope_switch(model.config)):
        raise ValueError(
            f"lengths: got None, expected those of the sequences to pack, because {type(model).__name__} "
            f"changes at {switch}"
        )
    check_lengths(model.config, lengths or (), remedy="turn packing off")
    vocab = model.config.get_text_config().vocab_size
    both = [Tokenized([(7 * i + first) % vocab for i in range(6)], [True] * 6) for first in (1, 4)]
    packed, alone = (
        outputs_of(model, collate([row], pad_id=0, attention=attention))[-6:] for row in (both, both[1:])
    )
    if difference := beyond_rounding(packed, alone):
        raise ValueError(
            f"packing: got {type(model).__name__} with {attention} attention, whose logits of a packed "
            f"sequence are {difference}, expected a model that packing does not change: turn packing off"
        )


def outputs_of(model: PreTrainedModel, arguments: Mapping[str, Any]) -> torch.Tensor:
    """The logits, or a backbone's hidden states, of all [B·T] tokens, in evaluation mode without gradient."""
    inputs = {
        name: value.to(model.device) if torch.is_tensor(value) else value
        for name, value in arguments.items()
        if name != "labels"
    }
    with probing(model):
        output = model(**inputs, use_cache=False)
    found: torch.Tensor = output.logits if "logits" in output else output.last_hidden_state
    return found.flatten(0, 1)


def beyond_rounding(packed: torch.Tensor, alone: torch.Tensor) -> str | None:
    """How far outputs of packed sequences differ from those of the same alone; None if rounding explains it.

    Allowed is √ε of the coarsest dtype involved, relative to the largest output.
    """
    device = alone.device.type
    dtypes = [alone.dtype, torch.float32]  # many a norm and softmax is in fp32 in a model in fp64 too
    dtypes += [torch.get_autocast_dtype(device)] if torch.is_autocast_enabled(device) else []
    difference = (packed - alone).abs().max().item()
    allowed = max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5 * alone.abs().max().item()
    return (
        None
        if difference <= allowed
        else f"{difference:.2g} off those of the same alone ({allowed:.2g} allowed)"
    )
