"""Every argument of every public function and module is checked: walks over their signatures, so that a new
one without a check fails."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import fastalign.nn
from tests.kernels.public_calls import FUNCTIONS, REPORTS, call_of, tensors_of

MODULES: dict[str, Callable[..., Any]] = {
    name: kind
    for name, kind in vars(fastalign.nn).items()
    if inspect.isclass(kind) and issubclass(kind, nn.Module) and not name.startswith("_")
}
NOT_FP32 = (math.nan, math.inf, -math.inf, 1e-40, -1e-40, 1e39)
NO_ARGUMENT: tuple[Any, ...] = ([1.0], (1.0,), {}, numpy.ones(3), object())
# Bad values of each kind of argument; a kind among alternatives, as in "float | None", takes away what
# another one allows.
BAD: dict[str, tuple[Any, ...]] = {
    "float": (*NOT_FP32, True, "1", None, torch.ones(()), *NO_ARGUMENT),
    "int": (*NOT_FP32, 1.5, True, "1", None, torch.ones(()), *NO_ARGUMENT),
    "bool": (1, 0.0, "yes", None, torch.ones(()), *NO_ARGUMENT),
    "str": (1, True, "no such name", None, torch.ones(()), *NO_ARGUMENT),
    "Tensor": (1, 1.0, True, "1", None, *NO_ARGUMENT),
    "tuple[Tensor, Tensor]": (1, 1.0, True, "1", None, torch.ones(()), *NO_ARGUMENT),
    "LowRank": (1, 1.0, True, "1", torch.ones(()), *NO_ARGUMENT),
    "torch.dtype": (torch.int32, "float32", 1, None, *NO_ARGUMENT),
    "torch.device": ("nowhere", "mps", 1.5, *NO_ARGUMENT),
    "torch.distributed.ProcessGroup": (1, "world", torch.ones(()), *NO_ARGUMENT),
}
NEGATIVE = {  # options that may be below 0; all other numbers may not
    *(
        (name, option)
        for name in (*FUNCTIONS, *MODULES)
        for option in ("logit_scale", "ignore_index", "entropy_coefficient")
    ),
    *((name, "kl_coefficient") for name in (*FUNCTIONS, *MODULES)),
    ("simpo_loss", "gamma"),
    ("LinearSimPOLoss", "gamma"),
    ("sample", "pad_id"),
}


def bad_values(owner: str, parameter: inspect.Parameter) -> list[Any]:
    kinds = str(parameter.annotation).split(" | ")
    if kinds == ["torch.device", "str"]:
        kinds = ["torch.device"]
    values = [value for value in BAD[kinds[0]] if not (value is None and "None" in kinds)]
    if "Tensor" in kinds[1:]:
        values = [value for value in values if not isinstance(value, Tensor)]
    if kinds[0] in ("float", "int") and (owner, parameter.name) not in NEGATIVE:
        values.append(-1.0 if kinds[0] == "float" else -1)
    return values


def faults(owner: str, call: Callable[..., Any], given: dict[str, Any]) -> list[str]:
    """What a call with one bad argument does other than raise a ValueError that begins with the argument's
    name."""
    found = []
    for name, parameter in inspect.signature(call).parameters.items():
        for value in bad_values(owner, parameter):
            shown = f"{name}={value!r}"
            try:
                call(**{**given, name: value})
            except ValueError as error:
                if not str(error).startswith(f"{name}:"):
                    found.append(f"{shown}: ValueError: {error}")
            except Exception as error:
                found.append(f"{shown}: {type(error).__name__}: {error}")
            else:
                found.append(f"{shown}: accepted")
    return found


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_bad_argument_is_named(name):
    FUNCTIONS[name](**call_of(name))
    assert not faults(name, FUNCTIONS[name], call_of(name))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_sparse_tensor_is_refused(name):
    given = call_of(name)
    for argument, value in given.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim():
            with pytest.raises(ValueError, match=f"^{argument}: got .*layout torch.sparse_coo"):
                FUNCTIONS[name](**{**given, argument: value.to_sparse()})


@pytest.mark.parametrize("name", MODULES)
def test_a_module_names_a_bad_option_when_it_is_made(name):
    MODULES[name]()
    assert not faults(name, MODULES[name], {})


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy", "linear_cross_entropy_stats"])
def test_a_divisor_in_a_tensor_is_above_zero(name, value):
    with pytest.raises(ValueError, match=f"num_items: got {value}, expected a number above 0"):
        FUNCTIONS[name](**{**call_of(name), "num_items": torch.tensor(value)})


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
@pytest.mark.parametrize("name", ["ppo_loss", "value_loss", "linear_ppo_loss"])
def test_a_normalizer_in_a_tensor_is_a_number(name, value):
    with pytest.raises(ValueError, match=f"normalizer: got {value}, expected a number above 0"):
        FUNCTIONS[name](**{**call_of(name), "normalizer": torch.tensor(value)})


def test_a_divisor_is_one_number():
    with pytest.raises(
        ValueError,
        match=r"num_items: got a tensor of shape \[2\], expected a number above 0 or a scalar tensor",
    ):
        FUNCTIONS["cross_entropy"](**{**call_of("cross_entropy"), "num_items": torch.ones(2)})


@pytest.mark.parametrize(
    "name", ["cross_entropy", "linear_cross_entropy", "token_logprobs", "linear_dpo_loss"]
)
def test_int32_ids_beside_an_ignore_index_that_int32_does_not_hold(name):
    """A comparison in int32 takes 2^32 + 5 for 5."""
    given = call_of(name)
    ids = "targets" if "targets" in given else "ids"
    found, expected = (
        FUNCTIONS[name](**{**given, ids: given[ids].to(dtype), "ignore_index": 2**32 + 5})
        for dtype in (torch.int32, torch.int64)
    )
    assert all(map(torch.equal, tensors_of(found), tensors_of(expected)))


def test_numpy_numbers_are_numbers():
    found = FUNCTIONS["cross_entropy"](
        **call_of("cross_entropy"), temperature=numpy.float32(0.5), ignore_index=numpy.int64(3)
    )
    assert torch.equal(
        found, FUNCTIONS["cross_entropy"](**call_of("cross_entropy"), temperature=0.5, ignore_index=3)
    )


# Layouts: the same values in other strides.


def alternate(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1).flatten(-2)[..., ::2] if x.dim() else x


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() else x


def odd_strides_of_size_one(stride: int) -> Callable[[Tensor], Tensor]:
    def layout(x: Tensor) -> Tensor:
        return x.as_strided(
            x.shape, [stride if size < 2 else given for size, given in zip(x.shape, x.stride())]
        )

    return layout


LAYOUTS = {
    "alternate": alternate,
    "transposed": transposed,
    "stride_0": odd_strides_of_size_one(0),
    "stride_7": odd_strides_of_size_one(7),
}
SIZES = {
    "many": {},
    "one": {"rows": 2, "length": 1, "hidden_size": 1, "vocab_size": 1},
    "one_row": {"rows": 1, "length": 3, "hidden_size": 1, "vocab_size": 7},
    "none": {"rows": 0},
    "no_length": {"rows": 2, "length": 0},
}
WITHOUT_TENSORS = {"plan_head"}


def run(
    name: str, given: dict[str, Any], layout: Callable[[Tensor], Tensor] | None
) -> tuple[list[Any], list[Any]]:
    """Results of a call, and the gradients of its floating-point arguments."""
    leaves = {
        key: x.clone().requires_grad_(x.is_floating_point())
        for key, x in given.items()
        if isinstance(x, Tensor)
    }
    laid = {key: x if layout is None else layout(x) for key, x in leaves.items()}
    fields = tensors_of(FUNCTIONS[name](**{**given, **laid}))
    differentiable = [x for x in fields if isinstance(x, Tensor) and x.requires_grad]
    if not differentiable:
        return fields, []
    total = torch.stack([x.nan_to_num().sum() for x in differentiable]).sum()
    return fields, list(
        torch.autograd.grad(total, [x for x in leaves.values() if x.requires_grad], allow_unused=True)
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in WITHOUT_TENSORS])
def test_strides_change_nothing(name, size):
    given = call_of(name, **SIZES[size])
    try:
        expected = run(name, given, None)
    except ValueError:
        assert name in REPORTS and size in ("none", "no_length")  # nothing to measure
        return
    for layout in LAYOUTS.values():
        torch.testing.assert_close(run(name, given, layout), expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in WITHOUT_TENSORS])
def test_an_expanded_argument_is_as_its_copy(name):
    """Each tensor argument in turn, one row of it expanded to all."""
    given = call_of(name)
    for key, x in given.items():
        if isinstance(x, Tensor) and x.dim() and key != "cu_seqlens":
            expanded = (x[:1, :1] if x.dim() > 1 else x[:1]).expand(x.shape)
            found, expected = (
                run(name, {**given, key: value}, None) for value in (expanded, expanded.contiguous())
            )
            torch.testing.assert_close(
                found,
                expected,
                rtol=1e-5,
                atol=1e-6,
                equal_nan=True,
                msg=f"{key}: expanded is not as its copy",
            )


# Tensors without values.


def described(fields: list[Any]) -> list[Any]:
    return [(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x for x in fields]


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in WITHOUT_TENSORS | REPORTS])
def test_meta_and_fake_tensors_give_shapes_and_dtypes(name):
    given = call_of(name)
    expected = described(tensors_of(FUNCTIONS[name](**given)))
    meta = {key: x.to("meta") if isinstance(x, Tensor) else x for key, x in given.items()}
    assert described(tensors_of(FUNCTIONS[name](**meta))) == expected
    with FakeTensorMode() as mode:
        fake = {key: mode.from_tensor(x) if isinstance(x, Tensor) else x for key, x in given.items()}
        assert described(tensors_of(FUNCTIONS[name](**fake))) == expected


@pytest.mark.parametrize("name", sorted(REPORTS & FUNCTIONS.keys()))
def test_a_report_refuses_meta_tensors(name):
    meta = {key: x.to("meta") if isinstance(x, Tensor) else x for key, x in call_of(name).items()}
    with pytest.raises(
        ValueError, match="hidden: got a tensor without values, on meta, expected one with values"
    ):
        FUNCTIONS[name](**meta)
