"""PPO through the head: equals plain PyTorch with full logits, and `linear_token_stats` with `ppo_loss`,
whatever the workspace."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign_kernels import linear_token_stats, ppo_loss
from fastalign_kernels.linear import chunks
from fastalign_kernels.linear.ppo import linear_ppo_loss
from fastalign_kernels.linear.reference import linear_token_stats_ref
from fastalign_kernels.policy.arguments import AGGREGATIONS, policy_options
from fastalign_kernels.policy.ops import KL_ESTIMATORS
from fastalign_kernels.policy.reference import ppo_loss_ref
from tests.linear.inputs import op_arguments

pytestmark = pytest.mark.usefixtures("poisoned_memory")

V, H, B, T = 257, 16, 4, 9
TIGHT = V * 8 * 4 / 2**20  # MiB: 4 tokens of fp64 logits at a time
HEAD: dict[str, Any] = {"softcap": 8.0, "temperature": 1.3, "logit_scale": 0.9}
LOSS: dict[str, Any] = {"entropy_coefficient": 0.2, "kl_coefficient": 0.3, "clip_high": 0.4, "dual_clip": 1.3}


def inputs(dtype: torch.dtype = torch.float64, device: str = "cpu") -> dict[str, Any]:
    """Ragged rows, one of them without tokens; outside of the mask NaN, infinity and ids that no vocabulary
    has."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((B, T, H), (V, H), (V,))
    )
    ids = torch.randint(V, (B, T), generator=generator)
    mask = torch.rand(B, T, generator=generator) > 0.3
    mask[1], mask[2] = False, True
    logp = linear_token_stats_ref(hidden.double(), weight.double(), ids, bias.double(), **HEAD).logp
    noise = 0.4 * torch.randn(3, B, T, generator=generator)
    given = {
        "old_logp": (logp + noise[0]).float(),
        "advantages": 2 * noise[1],
        "reference_logp": (logp + noise[2]).float(),
    }
    for tensor in (hidden, ids, *given.values()):
        tensor[~mask] = -7777 if tensor is ids else torch.nan
    trained = {"hidden": hidden, "weight": weight, "bias": bias}
    both = {name: x.to(device) for name, x in (trained | given | {"ids": ids, "mask": mask}).items()}
    for name in trained:
        both[name].requires_grad_()
    return both


def plain(
    given: dict[str, Any],
    head: dict[str, Any],
    loss: dict[str, Any],
    stats: Any = linear_token_stats_ref,
    ppo: Any = ppo_loss_ref,
) -> Any:
    """The composition of the two, from hidden states in which nothing is NaN."""
    inside = given["mask"]
    ids = torch.where(inside, given["ids"], -100)
    hidden = torch.where(inside[..., None], given["hidden"], 0)
    found = stats(hidden, given["weight"], ids, given["bias"], **head)
    fixed = (given["old_logp"], given["advantages"], inside)
    return ppo(found.logp, *fixed, entropy=found.entropy, reference_logp=given["reference_logp"], **loss)


def gradients(loss: Tensor, given: dict[str, Any], upstream: float = 1.0) -> dict[str, Tensor]:
    names = [
        name for name in ("hidden", "weight", "bias") if given[name] is not None and given[name].requires_grad
    ]
    return dict(
        zip(names, torch.autograd.grad(upstream * loss, [given[name] for name in names], retain_graph=True))
    )


def assert_same(found: Any, expected: Any, given: dict[str, Any], tolerance: float) -> None:
    for name, ours, theirs in zip(expected._fields, found, expected):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=tolerance, atol=tolerance, msg=name)
        assert ours.requires_grad == (name == "loss")
    found_grads, expected_grads = gradients(found.loss, given), gradients(expected.loss, given)
    for name in expected_grads:
        torch.testing.assert_close(found_grads[name], expected_grads[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("workspace", [TIGHT, None])
def test_equals_plain_pytorch(workspace: float | None, aggregation: str, estimator: str, device: str) -> None:
    given = inputs(device=device)
    for normalizer in (None, 5.0):
        loss = {**LOSS, "aggregation": aggregation, "kl_estimator": estimator, "normalizer": normalizer}
        found = linear_ppo_loss(**given, **HEAD, **loss, workspace_mib=workspace)
        expected = plain({**given, "old_logp": given["old_logp"].double()}, HEAD, loss)
        assert_same(found, expected, given, 1e-10)
        assert not gradients(found.loss, given)["hidden"][~given["mask"]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_the_head_and_the_loss_to_rounding(dtype: torch.dtype, device: str) -> None:
    given = inputs(dtype, device)
    for loss in (
        LOSS,
        {"clip": None, "aggregation": "sequence_mean"},
        {"clip": 0.1, "aggregation": "sum", "normalizer": 7},
    ):
        found = linear_ppo_loss(**given, **loss)
        expected = plain(given, {}, loss, linear_token_stats, ppo_loss)
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 4e-3}[dtype]
        assert_same(found, expected, given, tolerance)


def test_low_precision_is_no_worse_than_eager(no_worse_than_eager, device: str) -> None:
    given = inputs(torch.bfloat16, device)
    wide = {
        name: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for name, x in given.items()
    }
    truth, eager, found = plain(wide, {}, LOSS), plain(given, {}, LOSS), linear_ppo_loss(**given, **LOSS)
    expected, theirs, found_grads = (
        gradients(truth.loss, wide),
        gradients(eager.loss, given),
        gradients(found.loss, given),
    )
    for name, true in expected.items():
        no_worse_than_eager(found_grads[name], theirs[name], true, name)


def test_packed_equals_padded(device: str) -> None:
    given = inputs(device=device)
    mask = given["mask"]
    ends = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    packed = {name: x if name in ("weight", "bias") else x.detach()[mask] for name, x in given.items()}
    packed["hidden"].requires_grad_()
    for aggregation in AGGREGATIONS:
        padded = linear_ppo_loss(**given, **LOSS, aggregation=aggregation)
        found = linear_ppo_loss(**packed, **LOSS, aggregation=aggregation, cu_seqlens=ends)
        torch.testing.assert_close(tuple(found), tuple(padded), rtol=1e-12, atol=1e-12)
        found_grads, expected = gradients(found.loss, packed), gradients(padded.loss, given)
        torch.testing.assert_close(found_grads["hidden"], expected["hidden"][mask], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found_grads["weight"], expected["weight"], rtol=1e-10, atol=1e-12)


def test_gemms_and_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of each GEMM for logits: those of the mask, once, whatever is trained; fp16 twice."""
    seen: list[int] = []
    mm = chunks.mm

    def counted(a: Tensor, b: Tensor, out: Tensor) -> None:
        if out.shape[-1] == V:
            seen.append(a.shape[0])
        mm(a, b, out)

    monkeypatch.setattr(chunks, "mm", counted)
    for dtype, times in ((torch.float64, 1), (torch.float32, 1), (torch.float16, 2)):
        given = inputs(dtype)
        for trained in (("hidden", "weight", "bias"), ("hidden",)):
            for name in ("hidden", "weight", "bias"):
                given[name].requires_grad_(name in trained)
            seen.clear()
            linear_ppo_loss(**given, **LOSS, workspace_mib=TIGHT).loss.backward()
            assert sum(seen) == times * given["mask"].sum() and max(seen) <= (
                8 if times == 2 or dtype == torch.float32 else 4
            )
        with torch.no_grad():
            seen.clear()
            assert not linear_ppo_loss(**given, **LOSS).loss.requires_grad
            assert seen == [given["mask"].sum()]


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_one_trained_tensor(trained: str, device: str) -> None:
    given = inputs(device=device)
    for name in ("hidden", "weight", "bias"):
        given[name].requires_grad_(name == trained)
    found, expected = (
        linear_ppo_loss(**given, **LOSS),
        plain({**given, "old_logp": given["old_logp"].double()}, {}, LOSS),
    )
    torch.testing.assert_close(
        gradients(found.loss, given)[trained],
        gradients(expected.loss, given)[trained],
        rtol=1e-10,
        atol=1e-12,
    )


def test_the_first_minibatch(device: str) -> None:
    """Old log-probabilities of the same head: ratio 1, nothing clipped, approximate KL 0, loss minus the mean
    advantage."""
    given = inputs(torch.float32, device)
    marked = torch.where(given["mask"], given["ids"], -100)
    with torch.no_grad():
        given["old_logp"] = linear_token_stats(given["hidden"], given["weight"], marked, given["bias"]).logp
    out = linear_ppo_loss(**given)
    assert out.clip_fraction == 0 and abs(out.mean_ratio - 1) < 1e-6 and out.approx_kl < 1e-10
    torch.testing.assert_close(out.loss, -given["advantages"][given["mask"]].mean())


def test_upstream_scale_a_second_backward_and_micro_batches(device: str) -> None:
    given = inputs(device=device)
    found = linear_ppo_loss(**given, **LOSS)
    once, thrice = gradients(found.loss, given), gradients(found.loss, given, -3.0)
    for name in once:
        torch.testing.assert_close(thrice[name], -3 * once[name], rtol=1e-12, atol=1e-15)
    rows = [
        {name: x if name in ("weight", "bias") else x[part] for name, x in given.items()}
        for part in (slice(0, 2), slice(2, 4))
    ]
    split = torch.stack(
        [linear_ppo_loss(**part, **LOSS, normalizer=given["mask"].sum()).loss for part in rows]
    ).sum()
    torch.testing.assert_close(split, found.loss, rtol=1e-12, atol=1e-12)
    for name, gradient in gradients(split, given).items():
        torch.testing.assert_close(gradient, once[name], rtol=1e-10, atol=1e-12)


def test_the_loss_does_not_depend_on_the_workspace(device: str) -> None:
    given = inputs(torch.float32, device)
    results = [
        linear_ppo_loss(**given, **LOSS, workspace_mib=mib)
        for mib in (V * 4 * 5 / 2**20, V * 4 * 12 / 2**20, 4.0)
    ]
    for other in results[1:]:
        torch.testing.assert_close(tuple(other), tuple(results[0]), rtol=1e-6, atol=1e-7)


def test_an_empty_mask_costs_and_changes_nothing(device: str) -> None:
    given = inputs(torch.float32, device)
    given["mask"] = torch.zeros_like(given["mask"])
    for aggregation in AGGREGATIONS:
        out = linear_ppo_loss(**given, **LOSS, aggregation=aggregation)
        assert all(x == 0 for x in out)
        assert all(not gradient.any() for gradient in gradients(out.loss, given).values())


def test_opcheck() -> None:
    given = inputs(torch.float32)
    ids = torch.where(given["mask"], given["ids"], -1).flatten()
    flat = [given[name].nan_to_num().flatten() for name in ("old_logp", "advantages", "reference_logp")]
    hidden = given["hidden"].detach().nan_to_num().view(-1, H).requires_grad_()
    head = (hidden, given["weight"], ids, given["bias"])
    options = list(policy_options(0.2, None, None, 0.1, 0.3, "k3"))
    for scale in (torch.tensor([0.1]), torch.rand(len(ids), generator=torch.Generator().manual_seed(0))):
        arguments = op_arguments(head, *flat[:2], scale, flat[2], options)
        torch.library.opcheck(torch.ops.fastalign.head_policy.default, arguments)
    step = torch.compile(
        lambda **tensors: linear_ppo_loss(**tensors, **LOSS, aggregation="sequence_mean"),
        fullgraph=True,
        backend="aot_eager",
    )
    eager, ours = linear_ppo_loss(**given, **LOSS, aggregation="sequence_mean"), step(**given)
    torch.testing.assert_close(tuple(ours), tuple(eager))
    for name, gradient in gradients(ours.loss, given).items():
        torch.testing.assert_close(gradient, gradients(eager.loss, given)[name])


@pytest.mark.parametrize(
    "change, said",
    [
        ({"old_logp": torch.zeros(T)}, r"old_logp: got shape \[9\], expected the shape of ids = \[4, 9\]"),
        ({"advantages": torch.zeros(1, T)}, r"advantages: got shape \[1, 9\]"),
        ({"mask": torch.full((B, T), 0.5)}, "mask: got 0.5, expected 0 or 1"),
        ({"ids": torch.full((B, T), V)}, rf"ids: got {V} at .*"),
        ({"ids": torch.full((B, T), -1)}, r"ids: got -1 at"),
        ({"ids": torch.full((B, T), -100), "ignore_index": -1}, r"ids: got -100 at"),
        (
            {"reference_logp": None, "kl_coefficient": 0.1},
            "reference_logp: got None with kl_coefficient=0.1",
        ),
        ({"clip": -1.0}, "clip: got -1.0"),
        ({"weight": torch.zeros(V, H + 1)}, "hidden: got shape"),
        ({"temperature": 0.0}, "temperature: got 0.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_by_name(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        linear_ppo_loss(**inputs(torch.float32) | change)


def test_packed_sequence_means_need_their_ends() -> None:
    given = inputs(torch.float32)
    flat = {name: x if name in ("weight", "bias") else x.flatten(0, 1) for name, x in given.items()}
    with pytest.raises(ValueError, match="aggregation: got 'sequence_mean'"):
        linear_ppo_loss(**flat, aggregation="sequence_mean")
