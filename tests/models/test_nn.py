"""The modules are the functions with their options in the constructor."""

import inspect

import pytest
import torch

from fastalign import (
    cpo_loss,
    cross_entropy,
    linear_cross_entropy,
    linear_distillation_loss,
    linear_dpo_loss,
    linear_kto_loss,
    linear_ppo_loss,
    orpo_loss,
    simpo_loss,
)
from fastalign.nn import (
    CrossEntropyLoss,
    LinearCPOLoss,
    LinearCrossEntropyLoss,
    LinearDistillationLoss,
    LinearDPOLoss,
    LinearGRPOLoss,
    LinearKTOLoss,
    LinearORPOLoss,
    LinearPPOLoss,
    LinearSimPOLoss,
)

HEAD = {"softcap": 5.0, "logit_scale": 0.5, "workspace_mib": 1.0}
COMMON = {"ignore_index": 3, "label_smoothing": 0.1, "z_loss": 1e-3, "temperature": 0.8, "reduction": "sum"}


def test_linear_cross_entropy_loss():
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((6, 4), (9, 4), (9,))
    )
    targets, weights = torch.tensor([0, 3, 8, 1, 3, 5]), torch.rand(6)
    module = LinearCrossEntropyLoss(**COMMON, **HEAD)
    found = module(hidden, weight, targets, bias, token_weights=weights)
    assert torch.equal(
        found, linear_cross_entropy(hidden, weight, targets, bias, token_weights=weights, **COMMON, **HEAD)
    )
    found.backward()
    assert weight.grad.abs().sum() > 0
    assert not list(module.parameters()) and "label_smoothing=0.1" in repr(module)
    mean = LinearCrossEntropyLoss()(hidden, weight, targets, num_items=4)
    assert torch.equal(mean, linear_cross_entropy(hidden, weight, targets, num_items=4))


def test_cross_entropy_loss():
    logits, targets = torch.randn(2, 3, 9, requires_grad=True), torch.tensor([[0, 3, 8], [1, 3, 5]])
    options = {**COMMON, "softcap": 5.0, "inplace_backward": True}
    assert torch.equal(
        CrossEntropyLoss(**options)(logits, targets), cross_entropy(logits, targets, **options)
    )
    assert torch.equal(
        CrossEntropyLoss()(logits, targets, num_items=4), cross_entropy(logits, targets, num_items=4)
    )
    assert "inplace_backward=True" in repr(CrossEntropyLoss(**options))


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_linear_distillation_loss(divergence):
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 4), (9, 4), (9,))
    )
    teacher = torch.randn(2, 3, 9, dtype=torch.float64).log_softmax(-1).topk(4)
    options = {"divergence": divergence, "reduction": "sum", "temperature": 0.8, **HEAD}
    given = (hidden, weight, teacher.indices, teacher.values, bias)
    module, weights = LinearDistillationLoss(**options), torch.rand(2, 3)
    found = module(*given, token_weights=weights)
    assert torch.equal(found, linear_distillation_loss(*given, token_weights=weights, **options))
    found.backward()
    assert weight.grad.abs().sum() > 0
    assert not list(module.parameters()) and f"divergence={divergence!r}" in repr(module)
    mean = LinearDistillationLoss()(*given[:4], num_items=4)
    assert torch.equal(mean, linear_distillation_loss(*given[:4], num_items=4))


def test_linear_preference_losses():
    hidden, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((4, 5, 6), (9, 6), (9,)))
    ids, reference, desirable, kl = (
        torch.randint(9, (4, 5)),
        torch.randn(4),
        torch.tensor([True, False, False, True]),
        torch.tensor(0.1),
    )
    head = {"ignore_index": 3, "temperature": 0.8, "beta": 0.5, **HEAD}
    pairs = {**head, "loss_type": "robust", "label_smoothing": 0.1}
    found = LinearDPOLoss(**pairs)(hidden, weight, ids, bias, reference_logps=reference)
    assert all(
        map(
            torch.equal, found, linear_dpo_loss(hidden, weight, ids, bias, reference_logps=reference, **pairs)
        )
    )
    found.loss.backward()
    assert weight.grad.abs().sum() > 0
    unpaired = {**head, "desirable_weight": 1.2, "undesirable_weight": 0.4}
    packed = {
        "hidden": hidden.flatten(0, 1),
        "ids": ids.flatten(),
        "cu_seqlens": torch.arange(0, 21, 5),
        "bias": bias,
    }
    given = {
        "desirable": desirable,
        "kl": kl,
        "reference_hidden": torch.randn(20, 6),
        "reference_weight": weight.detach(),
    }
    found = LinearKTOLoss(**unpaired)(weight=weight, **packed, **given)
    assert all(map(torch.equal, found, linear_kto_loss(weight=weight, **packed, **given, **unpaired)))
    assert "loss_type='robust'" in repr(LinearDPOLoss(**pairs)) and "undesirable_weight=0.4" in repr(
        LinearKTOLoss(**unpaired)
    )


def test_linear_ppo_loss():
    hidden, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((2, 5, 6), (9, 6), (9,)))
    ids, (old_logp, advantages, reference) = torch.randint(9, (2, 5)), torch.randn(3, 2, 5)
    given = (hidden, weight, ids, old_logp, advantages, torch.rand(2, 5) > 0.3, bias)
    options = {
        "clip": 0.1,
        "clip_high": 0.3,
        "dual_clip": 3.0,
        "entropy_coefficient": 0.1,
        "kl_coefficient": 0.2,
        "kl_estimator": "k2",
    }
    options |= {"aggregation": "sequence_mean", "temperature": 0.8, **HEAD}
    module, tensors = LinearPPOLoss(**options), {"reference_logp": reference, "normalizer": 7}
    found = module(*given, **tensors)
    assert all(map(torch.equal, found, linear_ppo_loss(*given, **options, **tensors)))
    found.loss.backward()
    assert weight.grad.abs().sum() > 0 and "kl_estimator='k2'" in repr(module)


REFERENCE_FREE = {
    LinearORPOLoss: (orpo_loss, {"beta": 0.3, "alpha": 0.5}, True),
    LinearSimPOLoss: (simpo_loss, {"beta": 1.5, "gamma": 0.7, "alpha": 0.2, "label_smoothing": 0.1}, True),
    LinearCPOLoss: (cpo_loss, {"beta": 0.3, "alpha": 0.5, "label_smoothing": 0.1}, False),
}


@pytest.mark.parametrize("module", REFERENCE_FREE)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_losses_of_pairs_without_a_reference(module, reduction):
    """The function on the sums of the head's log-probabilities, padded and packed, with every gradient."""
    function, options, takes_lengths = REFERENCE_FREE[module]
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 5, 6), (9, 6), (9,))
    )
    ids = torch.randint(9, (4, 5))
    ids[:, 0], ids[1, 3:] = 3, 3
    options = {**options, "reduction": reduction}
    loss = module(**options, ignore_index=3, temperature=0.8, **HEAD)
    logits = 5.0 * torch.tanh((hidden @ weight.T + bias) * 0.5 / 5.0) / 0.8
    logp = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0] * (ids != 3)
    lengths = dict(zip(("chosen_lengths", "rejected_lengths"), (ids != 3).sum(1).chunk(2)))
    expected = function(*logp.sum(1).chunk(2), **(lengths if takes_lengths else {}), **options)
    packed = hidden.flatten(0, 1), weight, ids.flatten(), bias
    for found in (
        loss(hidden, weight, ids, bias),
        loss(*packed, cu_seqlens=torch.arange(0, 21, 5)),
    ):
        torch.testing.assert_close(tuple(found[:3]), tuple(expected))
        torch.testing.assert_close(torch.cat(found[3:]), logp.sum(1).detach())
        gradients = (
            torch.autograd.grad(x.loss.sum(), (hidden, weight, bias), retain_graph=True)
            for x in (found, expected)
        )
        torch.testing.assert_close(*gradients)
    assert f"beta={options['beta']}" in repr(loss) and not list(loss.parameters())


@pytest.mark.parametrize(
    "module, options, message",
    [
        (LinearORPOLoss, {"beta": 0.0}, "beta: got 0.0, expected a number above 0"),
        (LinearSimPOLoss, {"label_smoothing": 0.5}, "label_smoothing: got 0.5"),
        (LinearCPOLoss, {"alpha": -1.0}, "alpha: got -1.0, expected a number >= 0"),
        (LinearCPOLoss, {"reduction": "max"}, "reduction: got 'max'"),
        (LinearORPOLoss, {"temperature": 0.0}, "temperature: got 0.0"),
        (LinearGRPOLoss, {"aggregation": "mean"}, "aggregation: got 'mean'"),
        (LinearDistillationLoss, {"divergence": "kl"}, "divergence: got 'kl'"),
        (LinearDistillationLoss, {"reduction": "max"}, "reduction: got 'max'"),
        (LinearDistillationLoss, {"tail_eps": 0.01}, "tail_eps: got 0.01, expected None"),
        (LinearDistillationLoss, {"screen": True}, "screen: got True, expected None"),
        (LinearDPOLoss, {"screen": "int8"}, "screen: got 'int8', expected True or None"),
    ],
    ids=str,
)
def test_a_bad_option_fails_in_the_constructor(module, options, message):
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_linear_grpo_loss_is_ppo_by_sequences():
    hidden, weight = (torch.randn(*shape, requires_grad=True) for shape in ((2, 5, 6), (9, 6)))
    given = (
        hidden,
        weight,
        torch.randint(9, (2, 5)),
        torch.randn(2, 5) - 2,
        torch.randn(2),
        torch.ones(2, 5),
    )
    found = LinearGRPOLoss(clip_high=0.28)(*given)
    assert all(
        map(torch.equal, found[:2], linear_ppo_loss(*given, clip_high=0.28, aggregation="sequence_mean")[:2])
    )
    assert inspect.signature(LinearGRPOLoss).parameters["aggregation"].default == "sequence_mean"
    assert LinearGRPOLoss(aggregation="token_mean").options["aggregation"] == "token_mean"


def test_options_are_attributes_as_of_torchs_losses():
    logits, targets = torch.randn(3, 9), torch.tensor([0, 3, 8])
    module = CrossEntropyLoss(label_smoothing=0.1).eval()
    module.reduction = "none"
    assert torch.equal(
        module(logits, targets), cross_entropy(logits, targets, label_smoothing=0.1, reduction="none")
    )
    assert (module.reduction, module.label_smoothing, module.training) == ("none", 0.1, False)
    with pytest.raises(ValueError, match="reduction: got 'avg'"):
        module.reduction = "avg"
    assert module.reduction == "none"
    pairs = LinearSimPOLoss()
    pairs.beta, pairs.temperature = 0.5, 2.0
    given = (torch.randn(2, 3, 4), torch.randn(9, 4), torch.randint(9, (2, 3)))
    assert torch.equal(pairs(*given).loss, LinearSimPOLoss(beta=0.5, temperature=2.0)(*given).loss)
