"""The tail-compensated backward pass: exact where it must be, and elsewhere the rank-1 approximation that its
formula says."""

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
    plan_head,
    ppo_loss,
    tail_report,
)
from fastalign_kernels.linear import tail_columns as tail
from fastalign_kernels.linear.cross_entropy_stats import linear_cross_entropy_stats
from fastalign_kernels.softmax.columns import column_grad
from tests.linear.tail_inputs import EPS, LEAVES, H, N, V, gradients, make

MIB = 2**20


def tail_ref(
    given: dict[str, Tensor], dz: Tensor, eps: float, tokens: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias by the formula of linear/tail_columns.py, without softcap.

    `dz` has the exact dlogits [N, V]; a block has `tokens` tokens.
    """
    hidden, weight, bias, ids = (given[name].detach() for name in ("hidden", "weight", "bias", "ids"))
    P = ((hidden @ weight.t() + bias) / temperature).softmax(-1)
    approximate = dz.clone()
    for index in (ids >= 0).nonzero()[:, 0].split(tokens):
        kept = P[index].amax(0) > eps
        kept[ids[index]] = True
        if kept.sum() > tail.DENSE * V:
            continue
        q = P[index][:, ~kept].sum(0)
        r = dz[index][:, ~kept].sum(1)
        block = dz[index].clone()
        block[:, ~kept] = torch.outer(r, q / q.sum())
        approximate[index] = block
    return approximate @ weight, approximate.t() @ hidden, approximate.sum(0)


def dlogits(given: dict[str, Tensor], loss: Callable[[Tensor], Tensor], temperature: float = 1.0) -> Tensor:
    """d loss / d logits [N, V] by autograd; `loss` takes log-probabilities [N, V]."""
    logits = (given["hidden"] @ given["weight"].t() + given["bias"]).detach().requires_grad_()
    return torch.autograd.grad(loss((logits / temperature).log_softmax(-1)), logits)[0]


def at_ids(logp: Tensor, ids: Tensor) -> Tensor:
    return torch.where(ids >= 0, logp.gather(-1, ids.clamp(min=0)[:, None])[:, 0], 0)


def assert_formula(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for name, ours, truth in zip(LEAVES, found, expected, strict=True):
        assert torch.allclose(ours, truth, rtol=1e-9, atol=1e-12), (
            f"{name}: off by {(ours - truth).abs().max():.3g}"
        )


@pytest.mark.parametrize("workspace", [None, 12 * V * 8 * 1.5 / MIB], ids=["one chunk", "several"])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"z_loss": 0.01}, {"temperature": 1.3}], ids=str
)
def test_cross_entropy_follows_the_formula(options: dict[str, Any], workspace: float | None) -> None:
    given = make()
    smoothing, z_loss, temperature = (
        options.get(k, d) for k, d in (("label_smoothing", 0.0), ("z_loss", 0.0), ("temperature", 1.0))
    )
    kept = given["ids"] >= 0

    def loss(logits_logp: Tensor) -> Tensor:
        token = -(1 - smoothing) * at_ids(logits_logp, given["ids"]) - smoothing * logits_logp.mean(-1)
        return token[kept].mean()

    dz = dlogits(given, loss, temperature)
    if z_loss:
        logits = (given["hidden"] @ given["weight"].t() + given["bias"]).detach().requires_grad_()
        dz = dz + torch.autograd.grad(z_loss * (logits.logsumexp(-1)[kept] ** 2).mean(), logits)[0]
    # With smoothing, the uniform part is exact everywhere, so only the rest of dz is approximated.
    uniform = -smoothing / V / int(kept.sum()) / temperature * kept[:, None].double()
    tokens = plan_head(
        int(kept.sum()), H, V, dtype=torch.float64, tail_eps=EPS, workspace_mib=workspace
    ).chunk
    expected = tail_ref(given, dz - uniform, EPS, tokens, temperature)
    x, w = given["hidden"].detach(), given["weight"].detach()
    exact = (uniform.expand(N, V) @ w, uniform.expand(N, V).t() @ x, uniform.expand(N, V).sum(0))
    stats = linear_cross_entropy_stats(
        given["hidden"],
        given["weight"],
        given["ids"],
        given["bias"],
        tail_eps=EPS,
        workspace_mib=workspace,
        **options,
    )
    assert_formula(gradients(stats.loss, given), tuple(a + b for a, b in zip(expected, exact)))
    plain = linear_cross_entropy_stats(
        given["hidden"], given["weight"], given["ids"], given["bias"], **options
    )
    for name, ours, theirs in zip(stats._fields, stats, plain):
        torch.testing.assert_close(ours, theirs, msg=f"{name} must not depend on the tail")


@pytest.mark.parametrize("workspace", [None, 12 * V * 8 * 1.5 / MIB], ids=["kept", "some recomputed"])
def test_any_upstream_gradient_follows_the_formula(workspace: float | None) -> None:
    given = make()
    kept = given["ids"] >= 0
    g = torch.randn(3, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss(logp: Tensor) -> Tensor:
        entropy = -(logp.exp() * logp).sum(-1)
        return (g[0] * at_ids(logp, given["ids"]) + torch.where(kept, g[1] * entropy, 0)).sum()

    tokens = plan_head(
        int(kept.sum()), H, V, dtype=torch.float64, tail_eps=EPS, workspace_mib=workspace
    ).chunk
    expected = tail_ref(given, dlogits(given, loss), EPS, tokens)
    options: Any = {"tail_eps": EPS, "workspace_mib": workspace}
    stats = linear_token_stats(given["hidden"], given["weight"], given["ids"], given["bias"], **options)
    assert stats.entropy is not None
    total = (g[0] * stats.logp + g[1] * stats.entropy).sum()
    first = torch.autograd.grad(total, [given[name] for name in LEAVES], retain_graph=True)
    assert_formula(first, expected)
    assert_formula(gradients(2 * total, given), tuple(2 * x for x in expected))  # a second backward pass


def test_a_frozen_head_follows_the_formula() -> None:
    given = make()
    g = torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    frozen = given | {name: given[name].detach() for name in ("weight", "bias")}
    tokens = plan_head(39, H, V, dtype=torch.float64, weight_grad=False, tail_eps=EPS).chunk
    dz = dlogits(given, lambda logp: (g * at_ids(logp, given["ids"])).sum())
    logp = linear_logprobs(frozen["hidden"], frozen["weight"], frozen["ids"], frozen["bias"], tail_eps=EPS)
    (found,) = gradients((g * logp).sum(), frozen, ("hidden",))
    torch.testing.assert_close(found, tail_ref(given, dz, EPS, tokens)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
def test_sequence_losses_equal_their_tokens_losses(loss: str, dtype: torch.dtype, bound: float) -> None:
    """One op that keeps between its two passes, against log-probabilities that keep between forward and
    backward."""
    given = make(dtype)
    ends = torch.tensor([0, 9, 20, 33, N])
    reference = torch.randn(4, dtype=dtype, generator=torch.Generator().manual_seed(2))
    desirable, kl = torch.tensor([True, False, True, False]), torch.tensor(0.3, dtype=dtype)
    options: Any = {"reference_logps": reference, "cu_seqlens": ends, "tail_eps": EPS}
    tensors = (given["hidden"], given["weight"], given["ids"])
    if loss == "dpo":
        ours: Any = linear_dpo_loss(*tensors, given["bias"], **options)
    else:
        ours = linear_kto_loss(*tensors, desirable, kl, given["bias"], **options)
    logp = linear_logprobs(*tensors, given["bias"], tail_eps=EPS)
    logps = torch.stack([part.sum() for part in logp.tensor_split(ends[1:-1])])
    if loss == "dpo":
        margin = (logps - reference)[:2] - (logps - reference)[2:]
        theirs = -torch.nn.functional.logsigmoid(0.1 * margin).mean()
    else:
        above = 0.1 * (logps - reference - kl)
        theirs = (1 - torch.sigmoid(torch.where(desirable, above, -above))).mean()
    torch.testing.assert_close(ours.loss, theirs)
    for a, b in zip(gradients(ours.loss, given), gradients(theirs, given)):
        assert (a - b).abs().max() <= bound * b.abs().max()


def test_ppo_equals_its_tokens_loss() -> None:
    """The gradient in forward, entropy included, against statistics that keep between forward and
    backward."""
    given = make()
    generator = torch.Generator().manual_seed(3)
    old_logp, advantages = (
        -3 * torch.rand(N, generator=generator).double(),
        torch.randn(N, generator=generator).double(),
    )
    mask = given["ids"] >= 0
    options: Any = {"entropy_coefficient": 0.1, "clip": 0.4}
    tensors = (given["hidden"], given["weight"], given["ids"])
    ours = linear_ppo_loss(*tensors, old_logp, advantages, mask, given["bias"], tail_eps=EPS, **options)
    stats = linear_token_stats(*tensors, given["bias"], tail_eps=EPS)
    theirs = ppo_loss(stats.logp, old_logp, advantages, mask, entropy=stats.entropy, **options)
    torch.testing.assert_close(ours.loss, theirs.loss)
    for a, b in zip(gradients(ours.loss, given), gradients(theirs.loss, given)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_error_of_low_precision_is_no_larger_than_the_exact_ways(
    dtype: torch.dtype, no_worse_than_eager: Any
) -> None:
    """Against the tail of the fp64 copy of the same inputs: eps so low that nothing near it is kept by one
    dtype and not by the other."""
    given = make(dtype)
    wide = {
        name: x.detach().double().requires_grad_() if x.is_floating_point() else x
        for name, x in given.items()
    }
    found = gradients(
        linear_cross_entropy(given["hidden"], given["weight"], given["ids"], given["bias"], tail_eps=1e-30),
        given,
    )
    exact = gradients(
        linear_cross_entropy(given["hidden"], given["weight"], given["ids"], given["bias"]), given
    )
    truth = gradients(linear_cross_entropy(wide["hidden"], wide["weight"], wide["ids"], wide["bias"]), wide)
    for name, ours, theirs, true in zip(LEAVES, found, exact, truth):
        no_worse_than_eager(ours, theirs, true, name)


def test_softcap_keeps_row_and_column_sums() -> None:
    """With X = 1 and W = 1 in every entry, dX and dW are row and column sums of dlogits: what the tail must
    not change."""
    given = make(peak=3.0)
    options: Any = {"softcap": 6.0, "temperature": 0.5}
    bias = (
        (given["hidden"] @ given["weight"].t())[0].detach().requires_grad_()
    )  # logits that differ by column only
    ones = {
        "hidden": torch.ones(N, 1, dtype=torch.float64),
        "weight": torch.zeros(V, 1, dtype=torch.float64),
        "bias": bias,
    }
    leaves = {name: x.detach().requires_grad_() for name, x in ones.items()}
    losses = [
        linear_cross_entropy(
            leaves["hidden"], leaves["weight"], given["ids"], leaves["bias"], tail_eps=e, **options
        )
        for e in (None, EPS)
    ]
    exact, found = (gradients(loss, leaves) for loss in losses)
    # All rows have one softmax here, so the dropped part is a rank-1 matrix and nothing is approximated.
    for a, b in zip(found, exact):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_rows_of_the_weight_that_never_appear_get_gradient() -> None:
    given = make(peak=3.0)
    _, d_weight, _ = gradients(
        linear_cross_entropy(given["hidden"], given["weight"], given["ids"], given["bias"], tail_eps=0.05),
        given,
    )
    assert (d_weight.abs().sum(1) > 0).all()


def test_flat_softmax_runs_dense_and_exact() -> None:
    given = make(peak=0.0)
    args = (given["hidden"], given["weight"], given["ids"], given["bias"])
    for a, b in zip(
        gradients(linear_cross_entropy(*args, tail_eps=2**-14), given),
        gradients(linear_cross_entropy(*args), given),
    ):
        assert torch.equal(a, b)
    for a, b in zip(
        gradients(linear_logprobs(*args, tail_eps=2**-14).sum(), given),
        gradients(linear_logprobs(*args).sum(), given),
    ):
        assert torch.equal(a, b)


def test_kept_columns_alone_enter_the_backward_gemms(monkeypatch: pytest.MonkeyPatch) -> None:
    given = make(peak=3.0)
    widths: list[int] = []

    def counted(logits: Tensor, columns: Tensor, *rest: Any, **options: Any) -> Tensor:
        widths.append(columns.numel())
        return column_grad(logits, columns, *rest, **options)

    from fastalign_kernels.linear import accumulate as module

    monkeypatch.setattr(module, "column_grad", counted)
    monkeypatch.setattr(tail, "TOKENS", {"cpu": 10})
    linear_cross_entropy(given["hidden"], given["weight"], given["ids"], given["bias"], tail_eps=EPS)
    assert len(widths) == 4 and max(widths) < V / 2


def test_the_report_measures_what_the_formula_says() -> None:
    given = make(peak=3.0)
    args = (given["hidden"], given["weight"], given["ids"], given["bias"])
    kept_share()
    report = tail_report(*args, tail_eps=EPS)
    assert kept_share() is None  # the report's own columns are not counted
    exact, found = (gradients(linear_cross_entropy(*args, tail_eps=e), given) for e in (None, EPS))
    for a, e, error in zip(found, exact, (report.hidden_error, report.weight_error)):
        assert error == pytest.approx(float((a - e).norm() / e.norm()), rel=1e-6) and 0 < error < 0.05
    kept = given["ids"] >= 0
    P = (given["hidden"] @ given["weight"].t() + given["bias"]).softmax(-1)[kept].detach()
    columns = P.amax(0) > EPS
    columns[given["ids"][kept]] = True
    assert report.kept_share == pytest.approx(float(columns.double().mean()))
    assert report.dropped_mass == pytest.approx(float(P[:, ~columns].sum(1).mean()))
    few = tail_report(*args, tail_eps=EPS, sample=5)
    assert few.kept_share < report.kept_share  # of five tokens
    with pytest.raises(ValueError, match="targets: got none that is not ignored"):
        tail_report(given["hidden"], given["weight"], torch.full((N,), -100), tail_eps=EPS)


def test_kept_share_counts_what_ran_since_it_was_asked() -> None:
    given = make(peak=0.0)
    args = (given["hidden"], given["weight"], given["ids"])
    kept_share()
    linear_cross_entropy(*args, tail_eps=2**-14)
    assert kept_share() == 1  # flat: dense
    linear_cross_entropy(*args)
    assert kept_share() is None


def test_everything_ignored() -> None:
    given = make()
    ids = torch.full((N,), -100)
    args = (given["hidden"], given["weight"], ids, given["bias"])
    for loss in (
        linear_cross_entropy(*args, tail_eps=EPS, reduction="sum"),
        linear_logprobs(*args, tail_eps=EPS).sum(),
    ):
        assert all((g == 0).all() for g in gradients(loss, given))
