"""`linear_token_outputs` against full logits in fp64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign_kernels.linear.token_outputs import TokenOutputs, linear_token_outputs

all_outputs: Callable[..., TokenOutputs] = partial(
    linear_token_outputs, entropy=True, log_sum_sq_probs=True, mean_logit=True, top1=True
)
N, H, V = 9, 8, 31
IGNORED = torch.tensor([0, 5])


def head(
    dtype: torch.dtype = torch.float32, bias: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    torch.manual_seed(0)
    hidden = torch.randn(N, H, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, H, dtype=dtype, requires_grad=True)
    ids = torch.randint(V, (N,)).index_fill(0, IGNORED, -100)
    return hidden, weight, ids, torch.randn(V, dtype=dtype) if bias else None


def in_fp64(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> TokenOutputs:
    z = hidden.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    z = z * logit_scale
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    logp, ignored = z.log_softmax(-1), ids < 0
    chosen = ids.clamp(min=0)[:, None]
    rows = (
        logp.gather(-1, chosen)[:, 0],
        -(logp.exp() * logp).sum(-1),
        (2 * logp).logsumexp(-1),
        z.mean(-1),
        z.argmax(-1) == chosen[:, 0],
    )
    return TokenOutputs(*(row.masked_fill(ignored, 0) for row in rows))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"softcap": 1.5},
    {"logit_scale": 0.3, "softcap": 2.0, "temperature": 1.3},
]


@pytest.mark.parametrize(("options", "bias"), list(itertools.product(OPTIONS, (False, True))))
def test_all_outputs_equal_full_logits(options: dict[str, Any], bias: bool) -> None:
    arguments = head(bias=bias)
    got, expected = all_outputs(*arguments, **options), in_fp64(*arguments, **options)
    for name, value, truth in zip(TokenOutputs._fields, got, expected, strict=True):
        assert value is not None and truth is not None
        assert torch.allclose(value.double(), truth.double(), rtol=2e-6, atol=2e-6), name
        assert not value[IGNORED].any(), name


@pytest.mark.parametrize("name", TokenOutputs._fields[1:])
def test_an_output_alone_is_the_same_and_the_rest_is_none(name: str) -> None:
    asked: dict[str, Any] = {name: True}
    arguments = head()
    alone, together = (
        linear_token_outputs(*arguments, **asked),
        all_outputs(*arguments),
    )
    for field, value, other in zip(TokenOutputs._fields, alone, together, strict=True):
        if field in ("logp", name):
            assert value is not None and other is not None
            assert torch.allclose(value.float(), other.float(), rtol=1e-6, atol=1e-6)
        else:
            assert value is None


def test_gradients_of_logp_and_entropy_equal_full_logits_and_the_rest_has_none() -> None:
    arguments = head(torch.float64)
    got, expected = all_outputs(*arguments), in_fp64(*arguments)
    upstream = torch.randn(2, N, dtype=torch.float64)
    assert got.entropy is not None and got.logp.requires_grad and got.entropy.requires_grad
    losses = [torch.stack(outputs[:2]).mul(upstream).sum() for outputs in (got, expected)]  # type: ignore[arg-type]
    grads = [torch.autograd.grad(loss, arguments[:2]) for loss in losses]
    for value, truth in zip(*grads, strict=True):
        torch.testing.assert_close(value, truth)
    assert not any(output is not None and output.requires_grad for output in got[2:])


def test_no_tokens_give_empty_outputs_that_stay_connected() -> None:
    hidden, weight, ids, _ = head()
    got = all_outputs(hidden[:0], weight, ids[:0])
    assert all(output is not None and output.shape == (0,) for output in got)
    got.logp.sum().backward()
    assert weight.grad is not None and not weight.grad.any()


def test_an_output_flag_that_is_no_bool_is_refused() -> None:
    with pytest.raises(ValueError, match="^entropy: "):
        linear_token_outputs(*head(), entropy="yes")  # type: ignore[arg-type]
