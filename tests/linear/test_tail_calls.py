"""Calls with tail_eps: compiled, by each implementation, refused, with any logit_scale."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign_kernels import (
    kept_share,
    linear_cross_entropy,
    linear_dpo_loss,
    linear_kto_loss,
    linear_logprobs,
    linear_ppo_loss,
    linear_token_stats,
    native,
    tail_report,
)
from fastalign_kernels.linear.options import HeadOptions
from fastalign_kernels.softmax import rows
from tests.linear.inputs import op_arguments
from tests.linear.tail_inputs import EPS, N, gradients, make


@pytest.mark.parametrize(
    "function",
    [linear_cross_entropy, lambda *a, **k: linear_token_stats(*a, **k).logp.sum()],
    ids=["loss", "stats"],
)
def test_compile(function: Callable[..., Tensor]) -> None:
    given = make(torch.float32)
    args = (given["hidden"], given["weight"], given["ids"], given["bias"])
    compiled = torch.compile(lambda *a: function(*a, tail_eps=EPS), fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled(*args), given), gradients(function(*args, tail_eps=EPS), given)):
        torch.testing.assert_close(a, b)


def test_opcheck() -> None:
    given = make(torch.float32)
    ids = given["ids"].clamp(min=-1)
    options, tensors = HeadOptions(tail_eps=EPS), (given["hidden"], given["weight"], ids, given["bias"])
    head = op_arguments(tensors, options=options)
    # Beyond what was kept the saved tensors hold whatever memory held, so that two runs differ there;
    # test_compile covers the rest.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    ops = torch.ops.fastalign
    torch.library.opcheck(ops.head_stats_saving.default, head, test_utils=checks)
    stats, saved = ops.head_stats_saving(*head)
    saved = [x.detach() for x in saved]
    detached = [x.detach() for x in tensors]
    rest = (torch.randn_like(stats), stats.detach(), saved)
    torch.library.opcheck(ops.head_stats_grad.default, op_arguments(detached, *rest, options=options))


def test_triton_and_the_reference_run_the_whole_loop(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton kernels, in the interpreter where there is no GPU, and what serves without a native
    library."""
    rows_triton = pytest.importorskip(
        "fastalign_kernels.softmax.rows_triton", reason="triton is not installed", exc_type=ImportError
    )
    from fastalign_kernels.softmax import columns, columns_triton

    given = make(torch.float32)
    args = [given[name].detach().to(device) for name in ("hidden", "weight", "ids", "bias")]
    leaves = [x.requires_grad_() for x in args if x.is_floating_point()]
    expected = gradients(
        linear_cross_entropy(given["hidden"], given["weight"], given["ids"], given["bias"], tail_eps=EPS),
        given,
    )
    pairs: list[tuple[Any, Any]] = [(rows_triton, columns_triton)] + (
        [] if torch.cuda.is_available() else [(rows.KERNELS.reference, columns.KERNELS.reference)]
    )
    for row_kernels, column_kernels in pairs:
        monkeypatch.setattr(rows.KERNELS, "select", lambda logits, kernels=row_kernels: kernels)
        monkeypatch.setattr(columns.KERNELS, "select", lambda logits, kernels=column_kernels: kernels)
        for a, b in zip(torch.autograd.grad(linear_cross_entropy(*args, tail_eps=EPS), leaves), expected):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("eps", [0.0, 1.0, -1e-4, float("nan")])
def test_refused(eps: float) -> None:
    given = make()
    with pytest.raises(ValueError, match="tail_eps: .* a probability in"):
        linear_cross_entropy(given["hidden"], given["weight"], given["ids"], tail_eps=eps)


def test_smoothing_under_a_softcap_is_refused() -> None:
    given = make()
    with pytest.raises(
        ValueError, match="tail_eps: got 0.001 with label_smoothing and softcap, expected None"
    ):
        linear_cross_entropy(
            given["hidden"], given["weight"], given["ids"], tail_eps=1e-3, label_smoothing=0.1, softcap=5.0
        )


@pytest.mark.skipif(bool(native.missing), reason="threads are the native library's")
def test_threads_change_no_bit() -> None:
    given = make(torch.float32)
    args = (given["hidden"], given["weight"], given["ids"], given["bias"])
    one = gradients(linear_cross_entropy(*args, tail_eps=EPS), given)
    again = gradients(linear_cross_entropy(*args, tail_eps=EPS), given)
    assert all(torch.equal(a, b) for a, b in zip(one, again))


def head_losses(given: dict[str, Tensor], logit_scale: float) -> dict[str, Tensor]:
    """A loss of each head function with a tail."""
    head: dict[str, Any] = {"bias": given["bias"], "logit_scale": logit_scale, "tail_eps": 2**-6}
    hidden, weight, ids = given["hidden"], given["weight"], given["ids"]
    fixed = torch.linspace(-1, 1, N, dtype=hidden.dtype)
    mask, rows_of = ids >= 0, torch.tensor([0, 20, N])
    packed: dict[str, Any] = {
        "cu_seqlens": rows_of,
        "reference_logps": torch.tensor([-9.0, -8.0], dtype=hidden.dtype),
    }
    stats = linear_token_stats(hidden, weight, ids, **head)
    assert stats.entropy is not None
    return {
        "linear_cross_entropy": linear_cross_entropy(
            hidden, weight, ids, **head, z_loss=0.01, label_smoothing=0.1
        ),
        "linear_logprobs": (fixed * linear_logprobs(hidden, weight, ids, **head)).sum(),
        "linear_token_stats": (fixed * (stats.entropy + stats.lse)).sum(),
        "linear_ppo_loss": linear_ppo_loss(
            hidden, weight, ids, fixed - 1, fixed, mask, **head, entropy_coefficient=0.1
        ).loss,
        "linear_dpo_loss": linear_dpo_loss(hidden, weight, ids, **head, **packed).loss,
        "linear_kto_loss": linear_kto_loss(
            hidden, weight, ids, torch.tensor([True, False]), fixed[-1], **head, **packed
        ).loss,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_negative_logit_scale(dtype):
    """The same logits from -hidden, -bias and -logit_scale: d_weight was up to 2.6e33 where 0.77 is right."""
    given = make(dtype)
    kept_share()
    negative = given | {name: (-given[name].detach()).requires_grad_() for name in ("hidden", "bias")}
    for loss, same in zip(head_losses(given, 0.9).values(), head_losses(negative, -0.9).values()):
        torch.testing.assert_close(loss, same)
        d_hidden, d_weight, d_bias = gradients(loss, given)
        assert d_weight.abs().max() < 50
        for grad, expected in zip(gradients(same, negative), (-d_hidden, d_weight, -d_bias)):
            torch.testing.assert_close(grad, expected)
    share = kept_share()
    assert share is not None and share < 0.6  # columns were dropped


def test_logit_scale_of_zero():
    """All logits are 0, whatever the weights, so every gradient is."""
    given = make()
    for name, loss in head_losses(given, 0.0).items():
        for grad in gradients(loss, given):
            assert torch.equal(grad, torch.zeros_like(grad)), name


def test_report_with_other_logit_scales():
    given = make()
    hidden, weight, ids = (given[name].detach() for name in ("hidden", "weight", "ids"))
    report = tail_report(hidden, weight, ids, tail_eps=2**-6, logit_scale=0.9)
    assert 0 < report.dropped_mass < 1 and report.weight_error < 0.1
    for found, expected in zip(tail_report(-hidden, weight, ids, tail_eps=2**-6, logit_scale=-0.9), report):
        assert found == pytest.approx(expected)
    with pytest.raises(ValueError, match="logit_scale: got 0, expected another number"):
        tail_report(hidden, weight, ids, tail_eps=2**-6, logit_scale=0.0)
    alone = tail_report(
        hidden, weight[:1], torch.zeros_like(ids), tail_eps=2**-6
    )  # of one column: all gradients are 0
    assert (alone.hidden_error, alone.weight_error) == (0, 0)
