"""Argument checks shared by the public functions and modules: ValueError with what was got and what is
expected.

Numbers must be finite in fp32, in which most kernels compute: of size 0, or within fp32's normal numbers
(1.2e-38 to 3.4e38). A temperature of 1e-40 would be 0 there.
"""

from __future__ import annotations

import os
import sys
from numbers import Integral, Real

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from .torch_func import reject_derivatives, unwrapped

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)
SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
# Real: NumPy's numbers. The common types come first, because they are quick to check.
_NUMBERS = (float, int, torch.SymFloat, torch.SymInt, Real)
_WHOLE = (int, torch.SymInt)
_PLAIN = (Tensor, torch.nn.Parameter)


# Kinds of values.


def shown(value: object) -> str:
    """A value in an error message: short, and a collection by its type alone."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if value is None or isinstance(value, (str, torch.dtype, *_NUMBERS)):
        return repr(value)
    return shown_type(value)


def shown_type(value: object) -> str:
    """A value's type in an error message."""
    name = type(value).__qualname__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def tensor(name: str, value: object) -> None:
    """Refuse what is not a `plain` tensor."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: got {shown(value)}, expected a torch.Tensor")
    plain(name, value)


def shardable(**given: object) -> None:
    """Refuse arguments that are neither `plain` tensors nor DTensors."""
    for name, value in given.items():
        if not (isinstance(value, Tensor) and is_dtensor(value)):
            tensor(name, value)


def plain(name: str, value: Tensor) -> None:
    """Refuse a tensor whose values are elsewhere: a DTensor, or a nested, masked or quantised tensor."""
    kind = type(value)
    if kind in _PLAIN and not value.is_nested:
        return
    if is_dtensor(value):
        raise ValueError(f"{name}: got a DTensor, expected a plain tensor on each rank")
    dispatches = kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ and not _stands_for_plain(value)
    if value.is_nested or dispatches:
        got = "a nested tensor" if value.is_nested else shown_type(value)
        raise ValueError(
            f"{name}: got {got}, expected a plain tensor: dequantise a quantised one, pad a nested one"
        )


def _stands_for_plain(value: Tensor) -> bool:
    """Whether a tensor is a compiler's, or the result of a collective, which is awaited where it is read."""
    collectives = sys.modules.get("torch.distributed._functional_collectives")
    awaited = getattr(collectives, "AsyncCollectiveTensor", FakeTensor)
    return isinstance(value, (FakeTensor, FunctionalTensor, awaited))


def is_dtensor(x: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which a rank has a part."""
    if type(x) in _PLAIN or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # here, because importing it takes a second

    return isinstance(x, DTensor)


def logits(value: object) -> None:
    """Refuse logits that are no tensor of the whole vocabulary."""
    if isinstance(value, Tensor) and is_dtensor(value):
        raise ValueError(
            "logits: got a DTensor, expected a plain tensor of the whole vocabulary on each rank: "
            "logits.full_tensor(), or a head function with a sharded weight"
        )
    tensor("logits", value)


def tensors(**given: object) -> None:
    """Refuse arguments that are no tensors."""
    for name, value in given.items():
        tensor(name, value)


def optional_tensors(**given: object) -> None:
    """Refuse arguments that are neither tensors nor None."""
    for name, value in given.items():
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(f"{name}: got {shown(value)}, expected a torch.Tensor or None")


def flags(**given: object) -> None:
    """Refuse arguments that are neither True nor False."""
    for name, value in given.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}: got {shown(value)}, expected True or False")


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(allowed)}")


def process_group(value: object) -> None:
    """Refuse what is neither a process group nor None."""
    if value is not None and not isinstance(value, torch.distributed.ProcessGroup):
        raise ValueError(f"group: got {shown(value)}, expected a torch.distributed.ProcessGroup or None")


# Numbers. Each returns the number as a float.


def number(
    name: str, value: float, low: float = -LARGEST, high: float = LARGEST, expected: str = "a finite number"
) -> float:
    """The number as a float, if it is in [low, high] and fp32 holds it: 0 or a normal number of fp32."""
    if (
        type(value) is float
        and low <= value <= high
        and (value >= SMALLEST or value == 0 or value <= -SMALLEST)
    ):
        return value  # what nearly every call brings, in half the time
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise ValueError(f"{name}: got {shown(value)}, expected {expected}")
    if not low <= value <= high or -SMALLEST < value < 0 or 0 < value < SMALLEST:
        limits = (
            f", in size 0 or {SMALLEST:.2g} to {LARGEST:.2g} (fp32)"
            if 0 < abs(value) < SMALLEST or abs(value) > LARGEST
            else ""
        )
        raise ValueError(f"{name}: got {value!r}, expected {expected}{limits}")
    return float(value)


def above_zero(name: str, value: float) -> float:
    return number(name, value, SMALLEST, expected="a number above 0")


def at_least_zero(name: str, value: float) -> float:
    return number(name, value, 0, expected="a number >= 0")


def unit_interval(name: str, value: float) -> float:
    return number(name, value, 0, 1, "a number in [0, 1]")


def logits_dtype(value: object) -> torch.dtype | None:
    """The checked `logits_dtype` of a head: torch.bfloat16, or None for fp32."""
    if value is None or value is torch.float32:
        return None
    if value is not torch.bfloat16:
        raise ValueError(f"logits_dtype: got {shown(value)}, expected None, torch.float32 or torch.bfloat16")
    return torch.bfloat16


def screen(value: object, logits_dtype: torch.dtype | None) -> bool:
    """The checked `screen` of a head: True, or None or False for exact logits."""
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"screen: got {shown(value)}, expected True or None")
    if value and logits_dtype not in (None, torch.float32):
        raise ValueError(
            f"screen: got True with logits_dtype {logits_dtype}, expected None: its logits are fp32"
        )
    return bool(value)


def tail_eps(value: float) -> float:
    return number(
        "tail_eps", value, SMALLEST, 1 - 2**-24, "a probability in (0, 1), or None for the exact gradient"
    )


def whole(
    name: str, value: int, low: int = -(2**63), high: int = 2**63 - 1, expected: str = "a whole number"
) -> int:
    """The number, if it is whole and in [low, high]; a float is refused, even 1.0."""
    if isinstance(value, bool) or not isinstance(value, (*_WHOLE, Integral)) or not low <= value <= high:
        raise ValueError(f"{name}: got {shown(value)}, expected {expected}")
    return value if isinstance(value, _WHOLE) else int(value)


def divisor(name: str, value: float | Tensor | None, like_name: str, like: Tensor) -> None:
    """Refuse a divisor that is neither a number above 0, a tensor of one, nor None."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name}: got {shown(value)}, expected a number above 0 or a scalar tensor")
        dtype(name, value, (*FLOATS, *INTEGERS))
        if value.dim() or value.device.type != "cpu":  # torch takes a CPU scalar beside CUDA tensors
            device(name, value, like_name, like)
        divisor_value(name, value, low=SMALLEST)
    elif value is not None:
        above_zero(name, value)


def divisor_value(name: str, value: Tensor, *, low: float) -> None:
    """Refuse a number in a tensor that is not finite or below `low`, if it is `readable`.

    Under vmap the numbers of all slices are checked.
    """
    if readable(value):
        for number in unwrapped(value).reshape(-1).tolist():
            if not low <= number <= LARGEST:
                raise ValueError(f"{name}: got {number}, expected a number above 0")


# Tensors.


def shape(name: str, tensor: Tensor, expected: tuple[int, ...], letters: str) -> None:
    """Refuse a tensor of another shape than expected; `letters` names its dimensions, as "[V, H]"."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, expected {letters} = {list(expected)}")


def dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Refuse a tensor that has another dtype, or is not `plain` and dense."""
    plain(name, tensor)
    if tensor.dtype not in allowed:
        raise ValueError(f"{name}: got {tensor.dtype}, expected {' or '.join(str(d) for d in allowed)}")
    if tensor.layout is not torch.strided:
        raise ValueError(
            f"{name}: got a tensor of layout {tensor.layout}, expected a dense one: torch.strided"
        )
    reject_derivatives(name, tensor)


def supported_device(name: str, tensor: Tensor) -> None:
    if tensor.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{name}: got a tensor on {tensor.device}, expected one on the CPU or a CUDA device")


def allocated(**given: Tensor | None) -> None:
    """Refuse tensors without memory: FSDP frees a parameter's after its use, and torch still says [V, H]."""
    if torch.compiler.is_compiling():
        return
    for name, value in given.items():
        if type(value) not in _PLAIN or value is None or value.is_meta or not value.numel():
            continue
        if not unwrapped(value).untyped_storage().nbytes():
            raise ValueError(
                f"{name}: got a tensor whose memory was freed, expected one with values: read a parameter "
                "under FSDP where it is gathered"
            )


def device(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{name}: got a tensor on {tensor.device}, expected {like.device}, where {like_name} is"
        )


def like(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...], like_name: str, like: Tensor) -> None:
    """Refuse a tensor of another dtype than the allowed ones, or of another shape or device than `like`."""
    if (
        tensor.dtype in allowed
        and tensor.shape == like.shape
        and tensor.device == like.device
        and tensor.layout is torch.strided
        and type(tensor) in _PLAIN
    ):
        reject_derivatives(name, tensor)
        return  # what nearly every call brings, in half the time
    dtype(name, tensor, allowed)
    shape(name, tensor, tuple(like.shape), f"the shape of {like_name}")
    device(name, tensor, like_name, like)


def everywhere() -> bool:
    """Whether FASTALIGN_CHECK=1 asks for the checks that wait for the device."""
    return os.environ.get("FASTALIGN_CHECK") == "1"


def readable(tensor: Tensor, check: bool = False) -> bool:
    """Whether the values of a tensor may be read.

    A meta or fake tensor has none, and neither has one under a compiler. On CUDA reading waits for the
    device, so it is done only with `check` or FASTALIGN_CHECK=1.
    """
    if torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor):
        return False
    return not tensor.is_cuda or check or everywhere()


def ids(name: str, values: Tensor, vocab_size: int, ignore_index: int, check: bool) -> None:
    """Refuse ids that are neither in [0, V) nor ignore_index, if they are `readable`."""
    if not readable(values, check):
        return
    values = unwrapped(values).long()  # an int32 tensor would meet an ignore_index of 2^32 + 5 as 5
    if not values.numel():
        return
    low, high = torch.where(values == ignore_index, 0, values).aminmax()  # half the passes of the tests below
    if low.item() >= 0 and high.item() < vocab_size:
        return
    bad = (values != ignore_index) & ((values < 0) | (values >= vocab_size))
    where = bad.nonzero()[0].tolist()
    got = f"{int(values[tuple(where)])} at {where} ({int(bad.sum())} such)"
    raise ValueError(f"{name}: got {got}, expected ids in [0, {vocab_size}) or ignore_index {ignore_index}")


def ignore_index(value: int | None) -> int:
    """The checked ignore_index; None is -100, as torch's linear_cross_entropy has it."""
    return -100 if value is None else whole("ignore_index", value)
