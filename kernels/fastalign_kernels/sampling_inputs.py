"""The arguments of `sample`: their checks, and how the native op takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks

MAX_VOCAB = 2**20
LOGITS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class SampleInputs(NamedTuple):
    """What the native op and its reference take."""

    logits: Tensor  # [B, V] with unit stride over V
    seed: int
    table: Tensor | None  # [5, B] fp64: the next five numbers of each row, in place of them
    temperature: float
    top_k: float
    top_p: float
    min_p: float
    repetition_penalty: float
    sequence_ids: Tensor | None  # [B] int64
    positions: Tensor | None  # [B] int64
    seen: Tensor | None  # [B, ceil(V / 32)] int32
    allowed: Tensor | None  # [B, ceil(V / 32)] int32
    finished: Tensor | None  # [B] bool
    pad_id: int


class _Option(NamedTuple):
    """A number that may differ from row to row: 0 or in [least, most]."""

    expected: str
    least: float = checks.SMALLEST
    most: float = checks.LARGEST
    zero: bool = True


OPTIONS = {
    "temperature": _Option("numbers >= 0"),
    "top_k": _Option("whole numbers >= 0 (0: no limit)"),
    "top_p": _Option("numbers in [0, 1]", most=1),
    "min_p": _Option("numbers in [0, 1]", most=1),
    "repetition_penalty": _Option("numbers > 0", zero=False),
}


def sample_inputs(
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
    check: bool = False,
) -> SampleInputs:
    """The checked arguments of `sample`, as the native op takes them. Raises as `sample`."""
    _check_logits(logits)
    seed = checks.whole("seed", seed, 0, expected="a whole number in [0, 2^63)")
    look = checks.readable(logits, check)
    numbers = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    scalars: dict[str, Any] = dict.fromkeys(numbers, 0.0)
    per_row = False
    for name, value in numbers.items():
        if isinstance(value, Tensor):
            _check_rows(name, value, logits, look)
            per_row = True
        else:
            scalars[name] = _scalar(name, value)
    tensors = {
        "sequence_ids": sequence_ids,
        "positions": positions,
        "seen": seen,
        "allowed": allowed,
        "finished": finished,
    }
    given: dict[str, Any] = _checked_tensors(tensors, logits, look)
    pad_id = -1 if pad_id is None else checks.whole("pad_id", pad_id, -1, expected="an id (or -1)")
    table = torch.stack([row_values(value, logits) for value in numbers.values()]) if per_row else None
    return SampleInputs(
        # contiguous() leaves an empty tensor's strides as they are
        logits.detach()
        if logits.stride(-1) == 1
        else logits.detach().clone(memory_format=torch.contiguous_format),
        seed=seed,
        table=table,
        **scalars,
        **given,
        pad_id=pad_id,
    )


def _check_logits(logits: Tensor) -> torch.Size:
    checks.logits(logits)
    if logits.dim() != 2 or not 1 <= logits.shape[1] <= MAX_VOCAB:
        raise ValueError(f"logits: got shape {list(logits.shape)}, expected [B, V] with V in 1 to 2^20")
    checks.dtype("logits", logits, LOGITS)
    checks.supported_device("logits", logits)
    return logits.shape


def _scalar(name: str, value: float) -> float:
    option = OPTIONS[name]
    if name == "top_k":
        return float(checks.whole(name, value, 0, expected=option.expected))  # type: ignore[arg-type]
    return checks.number(name, value, 0 if option.zero else option.least, option.most, option.expected)


def _check_rows(name: str, value: Tensor, logits: Tensor, look: bool) -> None:
    """An option of each row; `look`: its values too."""
    option = OPTIONS[name]
    checks.shape(name, value, (logits.shape[0],), "[B]")
    checks.device(name, value, "logits", logits)
    checks.dtype(name, value, checks.INTEGERS if name == "top_k" else checks.FLOATS)
    if look and value.numel():
        wide = value.double()  # fp16 holds neither bound
        allowed = (wide >= option.least) & (wide <= option.most)
        if not bool((allowed | (wide == 0) if option.zero else allowed).all()):
            raise ValueError(f"{name}: got {value.tolist()[:8]}, expected {option.expected}")


def _checked_tensors(
    tensors: Mapping[str, Tensor | None], logits: Tensor, look: bool
) -> dict[str, Tensor | None]:
    """The tensors of rows, by name, as SampleInputs has them; `look`: check the values of positions too."""
    B, V = logits.shape
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        checks.tensor(name, tensor)
        if name in ("seen", "allowed"):
            checks.shape(name, tensor, (B, -(-V // 32)), "[B, ceil(V / 32)]")
            checks.dtype(name, tensor, (torch.int32,))
        else:
            checks.shape(name, tensor, (B,), "[B]")
            checks.dtype(name, tensor, (torch.bool,) if name == "finished" else checks.INTEGERS)
        checks.device(name, tensor, "logits", logits)
        if name == "positions" and look and B and bool(((tensor < 0) | (tensor.long() >= 2**32)).any()):
            raise ValueError(f"positions: got {tensor.tolist()[:8]}, expected whole numbers in [0, 2^32)")
    ids = ("sequence_ids", "positions")
    return {
        name: tensor if tensor is None else (tensor.long() if name in ids else tensor).contiguous()
        for name, tensor in tensors.items()
    }


def row_values(value: float | Tensor, logits: Tensor) -> Tensor:
    """A number or [B] as fp64 [B]."""
    if isinstance(value, Tensor):
        return value.detach().double()
    return torch.full(logits.shape[:1], float(value), dtype=torch.float64, device=logits.device)
