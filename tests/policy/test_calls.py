"""Calls of the policy losses: threads, strides, gradients, compilation, refusals."""

from __future__ import annotations

import pytest
import torch

from fastalign_kernels import native
from fastalign_kernels.policy import ops as policy
from fastalign_kernels.policy.arguments import policy_options
from fastalign_kernels.policy.losses import ppo_loss, value_loss
from fastalign_kernels.policy.weights import Weighting
from tests import marks
from tests.policy.tokens import FULL, NAN, gradients, tokens, values

pytestmark = marks.KERNELS


def test_any_number_of_threads_gives_the_same_bits():
    if native.missing:
        pytest.skip(native.missing)
    given, value_inputs = tokens(torch.float32, (64, 1024)), values(torch.float32, (64, 1024))
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            out, value = ppo_loss(**given, **FULL), value_loss(**value_inputs)
        finally:
            torch.set_num_threads(1)
        results.append([*out, *gradients(out.loss, given), *value])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_strides_dtypes_and_masks_of_integers(device):
    given = tokens(torch.float32, device=device)
    expected = ppo_loss(**given, **FULL)
    strided = {
        name: torch.stack([x.detach(), x.detach()], -1)[..., 0].requires_grad_(x.requires_grad)
        for name, x in given.items()
    }
    assert not strided["logp"].is_contiguous() and not strided["mask"].is_contiguous()
    found = ppo_loss(**strided, **FULL)
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, gradients(found.loss, strided), gradients(expected.loss, given)))
    per_sequence = given | {"advantages": torch.randn(5, 1, device=device).expand(5, 23)}
    assert ppo_loss(**per_sequence).loss.isfinite()
    for kind in (torch.int64, torch.int32, torch.uint8):
        assert all(
            map(torch.equal, ppo_loss(**given | {"mask": given["mask"].to(kind) * 3}, **FULL), expected)
        )
    mixed = given | {"old_logp": given["old_logp"].double(), "advantages": given["advantages"].bfloat16()}
    out = ppo_loss(**mixed, **FULL)
    assert all(x.dtype == torch.float64 for x in out) and all(
        g.dtype == torch.float32 for g in gradients(out.loss, mixed)
    )


def test_only_logp_and_entropy_get_a_gradient(device):
    given = tokens(device=device)
    for name in ("old_logp", "advantages", "reference_logp"):
        given[name].requires_grad_()
    normalizer = torch.tensor(3.0, device=device, requires_grad=True)
    ppo_loss(**given, **FULL, normalizer=normalizer).loss.backward()
    assert [name for name, x in given.items() if x.grad is not None] == [
        "logp",
        "entropy",
    ] and normalizer.grad is None
    value_inputs = values(device=device)
    for name in ("values", "old_values", "returns"):
        value_inputs[name].requires_grad_()
    value_loss(**value_inputs).loss.backward()
    assert [name for name, x in value_inputs.items() if x.grad is not None] == ["values"]
    with torch.no_grad():
        assert not ppo_loss(**given).loss.requires_grad
    fixed = {name: x.detach() if name in ("logp", "entropy") else x for name, x in given.items()}
    assert not ppo_loss(**fixed).loss.requires_grad, "what is never given a gradient is no part of the graph"


def test_a_gradient_that_was_handed_over_is_the_callers(device):
    """An upstream gradient of 1 hands over what forward computed; what the caller makes of it reaches no
    second backward."""
    given = tokens(torch.float32, device=device)
    loss = ppo_loss(**given, **FULL).loss
    first = torch.autograd.grad(loss, (given["logp"], given["entropy"]), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.zero_()
    for factor in (1.0, -2.0):
        again = torch.autograd.grad(factor * loss, (given["logp"], given["entropy"]), retain_graph=True)
        torch.testing.assert_close(list(again), [factor * gradient for gradient in kept])


def test_a_metric_alone_has_no_gradient(device):
    given = tokens(device=device)
    out = ppo_loss(**given)
    torch.testing.assert_close(
        out.loss, ppo_loss(**{k: v for k, v in given.items() if k not in ("entropy", "reference_logp")}).loss
    )
    logp, entropy = torch.autograd.grad(out.loss, (given["logp"], given["entropy"]), allow_unused=True)
    assert logp.any() and (entropy is None or not entropy.any())


def test_kin_of_ppo_have_the_gradients_of_their_papers(device):
    """As docs/policy_losses.md makes them: Dr. GRPO, GSPO and CISPO, each against its own formula."""
    given = tokens(device=device)
    mask = given["mask"] | (torch.arange(23, device=device) < 2)
    logp, old, a = (
        torch.nan_to_num(given[name].detach(), 0.3, 0.3, 0.3) for name in ("logp", "old_logp", "advantages")
    )
    logp.requires_grad_()
    a, ratio = a[:, :1].expand_as(logp), (logp - old).exp()

    def same(loss, expected):
        torch.testing.assert_close(
            *(torch.autograd.grad(x, logp, retain_graph=True) for x in (loss, expected)),
            rtol=1e-12,
            atol=1e-12,
        )

    surrogate = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
    dr_grpo = ppo_loss(logp, old, a, mask, aggregation="sum", normalizer=logp.numel()).loss
    same(dr_grpo, -torch.where(mask, surrogate, 0).sum() / logp.numel())
    means = torch.where(mask, logp - old, 0).sum(1) / mask.sum(1)
    gspo = ppo_loss(means, torch.zeros_like(means), a[:, 0], mask.any(1), clip=3e-4, clip_high=4e-4).loss
    s = means.exp()
    same(gspo, -torch.minimum(s * a[:, 0], s.clamp(1 - 3e-4, 1 + 4e-4) * a[:, 0]).mean())
    held = ratio.clamp(max=1.28).detach()
    cispo = ppo_loss(logp, logp.detach(), a * held, mask, clip=None).loss
    same(cispo, -torch.where(mask, held * a * logp, 0).sum() / mask.sum())


def test_opcheck():
    given = {
        name: x.detach().reshape(-1).nan_to_num(0.0, 0.0, 0.0)
        for name, x in tokens(torch.float32).items()
        if name != "mask"
    }
    mask = tokens()["mask"].reshape(-1)
    logp, entropy = given["logp"].requires_grad_(), given["entropy"].requires_grad_()
    fixed = (given["old_logp"], given["advantages"], mask)
    options = list(policy_options(0.2, None, None, 0.1, 0.3, "k3"))
    # No random weights: opcheck's upstream gradient is the sign of the loss, and one of -1 would scale the
    # saved gradients where they lie, which opcheck takes for another result.
    weights = [
        (Weighting.GIVEN, torch.tensor([0.1])),
        (Weighting.GIVEN, torch.linspace(0.1, 1.0, len(mask))),
        (Weighting.TOKENS, None),
        (Weighting.DIVISOR, torch.tensor(7)),
    ]
    for kind, tensor in weights:
        numbers = [float(kind), 0.0]
        for of_entropy in (entropy, None):
            arguments = (logp, of_entropy, *fixed, tensor, given["reference_logp"], [*options, *numbers])
            torch.library.opcheck(policy.policy_op.op, arguments)
        torch.library.opcheck(policy.value_op.op, (logp, *fixed, tensor, [0.2, *numbers]))


def test_compiles_without_a_graph_break(device):
    given = tokens(torch.float32, device=device)

    def both(**given):
        found = (
            ppo_loss(**given, **FULL, aggregation="sequence_mean"),
            ppo_loss(**given, clip=None, dual_clip=3.0),
        )
        return *found, value_loss(
            given["logp"], given["old_logp"], given["advantages"], given["mask"], clip=None
        )

    expected, found = both(**given), torch.compile(both, fullgraph=True, backend="aot_eager")(**given)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(tuple(ours), tuple(theirs))
        trained = [given["logp"], given["entropy"]]
        torch.testing.assert_close(
            *(
                torch.autograd.grad(
                    x.loss, trained, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                for x in (ours, theirs)
            )
        )


ZEROS = torch.zeros(2, 3)


REFUSALS = [
    ({"logp": torch.zeros(2, 3, 1)}, r"logp: got shape \[2, 3, 1\], expected \[B, T\] or \[N\]"),
    ({"logp": torch.zeros(2, 3, dtype=torch.int64)}, r"logp: got torch.int64, expected torch.float32 or"),
    ({"old_logp": torch.zeros(3)}, r"old_logp: got shape \[3\], expected the shape of logp = \[2, 3\]"),
    ({"advantages": torch.zeros(1, 3)}, r"advantages: got shape \[1, 3\]"),
    (
        {"advantages": torch.zeros(2, 3, device="meta")},
        r"advantages: got a tensor on meta, expected cpu, where logp is",
    ),
    ({"mask": torch.full((2, 3), 0.5)}, "mask: got 0.5, expected 0 or 1 for each token"),
    ({"mask": torch.ones(2, dtype=torch.bool)}, r"mask: got shape \[2\]"),
    ({"entropy": torch.zeros(2)}, r"entropy: got shape \[2\]"),
    ({"reference_logp": torch.zeros(2)}, r"reference_logp: got shape \[2\]"),
    ({"entropy_coefficient": 0.1}, r"entropy: got None with entropy_coefficient=0.1"),
    ({"kl_coefficient": 0.1}, r"reference_logp: got None with kl_coefficient=0.1"),
    ({"clip": -0.1}, r"clip: got -0.1, expected None or a number >= 0"),
    ({"clip_high": NAN}, r"clip_high: got nan"),
    ({"dual_clip": 1.0}, r"dual_clip: got 1.0, expected None or a number above 1"),
    ({"kl_estimator": "k4"}, r"kl_estimator: got 'k4', expected one of k1, k2, k3"),
    ({"aggregation": "mean"}, r"aggregation: got 'mean', expected one of token_mean, sequence_mean, sum"),
    ({"normalizer": 0}, r"normalizer: got 0, expected a number above 0"),
    ({"normalizer": torch.ones(2)}, r"normalizer: got shape \[2\], expected a scalar = \[\]"),
    (
        {"cu_seqlens": torch.tensor([0, 6])},
        r"cu_seqlens: got shape \[2\] with a mask \[2, 3\], expected \[S \+ 1\] and \[N\]",
    ),
]


@pytest.mark.parametrize(
    "change, named", REFUSALS, ids=lambda value: " ".join(value) if isinstance(value, dict) else ""
)
def test_refusals_name_the_argument(change, named):
    given = {"logp": ZEROS, "old_logp": ZEROS, "advantages": ZEROS, "mask": ZEROS == 0}
    with pytest.raises(ValueError, match=named):
        ppo_loss(**given | change)


def test_further_refusals():
    flat = torch.zeros(6)
    with pytest.raises(
        ValueError, match=r"aggregation: got 'sequence_mean' with a mask \[6\] and without cu_seqlens"
    ):
        ppo_loss(flat, flat, flat, flat == 0, aggregation="sequence_mean")
    with pytest.raises(ValueError, match=r"cu_seqlens: got \[0, 5\]"):
        ppo_loss(flat, flat, flat, flat == 0, aggregation="sequence_mean", cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"clip: got 0, expected a number above 0"):
        value_loss(flat, flat, flat, flat == 0, clip=0)
    with pytest.raises(ValueError, match=r"returns: got shape \[1\], expected the shape of values = \[6\]"):
        value_loss(flat, flat, flat[:1], flat == 0)
