"""Derivatives beyond one backward pass: an error for each loss, or the right value."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastalign_kernels import (
    cpo_loss,
    cross_entropy,
    dpo_loss,
    gae,
    kto_kl,
    kto_loss,
    linear_cross_entropy,
    linear_distillation_loss,
    linear_dpo_loss,
    linear_kto_loss,
    linear_logprobs,
    linear_ppo_loss,
    linear_token_stats,
    masked_whiten,
    orpo_loss,
    ppo_loss,
    reward_loss,
    simpo_loss,
    sum_by_sequence,
    token_logprobs,
    token_stats,
    value_loss,
)
from fastalign_kernels.linear.reference import linear_cross_entropy_ref, linear_distillation_loss_ref
from fastalign_kernels.logits import cross_entropy_ref
from fastalign_kernels.policy.reference import ppo_loss_ref, value_loss_ref
from fastalign_kernels.preference.reference import dpo_loss_ref, kto_loss_ref, reward_loss_ref
from tests.kernels.small_inputs import DESIRABLE, LENGTHS

IDS = torch.tensor([0, 2, 1, 3])
ROWS = IDS.view(2, 2)
MASK = torch.ones(2, 2, dtype=torch.bool)
KL = torch.tensor(0.1, dtype=torch.float64)


def fixed(*shape: int) -> torch.Tensor:
    """Numbers of this shape, the same in each call, none of them 0."""
    return torch.linspace(-1.2, 0.9, int(torch.tensor(shape).prod()), dtype=torch.float64).sin().view(shape)


LOGITS, HIDDEN, WEIGHT, TOKENS, PAIRS = fixed(4, 5), fixed(4, 3), fixed(5, 3), fixed(2, 2), fixed(2)
TEACHER = fixed(4, 5).log_softmax(-1).topk(2)[::-1]
KEPT = torch.tensor([0, 2, 5, 6, 8]), torch.tensor([0, 4, 1, 2, 3, 1, 3, 0])
TRAINED = WEIGHT.clone().requires_grad_()
WITH_GRADIENT: dict = {  # a loss of one of its inputs, and that input
    "cross_entropy": (lambda x: cross_entropy(x, IDS), LOGITS),
    "cross_entropy inplace_backward": (lambda x: cross_entropy(x * 1, IDS, inplace_backward=True), LOGITS),
    "token_logprobs": (lambda x: token_logprobs(x, IDS).mean(), LOGITS),
    "token_stats": (lambda x: token_stats(x, IDS).lse.mean(), LOGITS),
    "linear_cross_entropy hidden": (lambda x: linear_cross_entropy(x, WEIGHT, IDS), HIDDEN),
    "linear_cross_entropy weight": (lambda x: linear_cross_entropy(HIDDEN, x, IDS), WEIGHT),
    "linear_cross_entropy bias": (lambda x: linear_cross_entropy(HIDDEN, WEIGHT, IDS, x), fixed(5)),
    "linear_cross_entropy none": (
        lambda x: linear_cross_entropy(x, WEIGHT, IDS, reduction="none").mean(),
        HIDDEN,
    ),
    "linear_cross_entropy tail": (lambda x: linear_cross_entropy(HIDDEN, x, IDS, tail_eps=0.1), WEIGHT),
    "linear_logprobs frozen": (lambda x: linear_logprobs(x, WEIGHT, IDS).mean(), HIDDEN),
    "linear_logprobs trained": (lambda x: linear_logprobs(HIDDEN, x, IDS).mean(), WEIGHT),
    "linear_logprobs kept": (lambda x: linear_logprobs(x, WEIGHT, IDS, kept=KEPT).mean(), HIDDEN),
    "linear_logprobs tail": (lambda x: linear_logprobs(HIDDEN, x, IDS, tail_eps=0.1).mean(), WEIGHT),
    "linear_distillation_loss": (lambda x: linear_distillation_loss(x, WEIGHT, *TEACHER), HIDDEN),
    "linear_distillation_loss none": (
        lambda x: linear_distillation_loss(HIDDEN, x, *TEACHER, reduction="none").mean(),
        WEIGHT,
    ),
    "linear_token_stats": (lambda x: linear_token_stats(x, WEIGHT, IDS).lse.mean(), HIDDEN),
    "linear_ppo_loss": (
        lambda x: linear_ppo_loss(x.view(2, 2, 3), WEIGHT, ROWS, TOKENS, TOKENS, MASK).loss,
        HIDDEN,
    ),
    "linear_dpo_loss": (
        lambda x: linear_dpo_loss(HIDDEN.view(2, 2, 3), x, ROWS, reference_logps=PAIRS).loss,
        WEIGHT,
    ),
    "linear_dpo_loss frozen": (
        lambda x: linear_dpo_loss(x.view(2, 2, 3), WEIGHT, ROWS, reference_logps=PAIRS).loss,
        HIDDEN,
    ),
    "linear_kto_loss": (
        lambda x: linear_kto_loss(HIDDEN.view(2, 2, 3), x, ROWS, DESIRABLE, KL, reference_logps=PAIRS).loss,
        WEIGHT,
    ),
    "ppo_loss": (lambda x: ppo_loss(x, TOKENS + 0.1, TOKENS, MASK).loss, TOKENS),
    "ppo_loss entropy": (
        lambda x: ppo_loss(TOKENS, TOKENS, TOKENS, MASK, entropy=x, entropy_coefficient=0.1).loss,
        TOKENS,
    ),
    "value_loss": (lambda x: value_loss(x, TOKENS, TOKENS + 0.1, MASK).loss, TOKENS),
    "dpo_loss": (lambda x: dpo_loss(x, PAIRS, PAIRS + 0.1, PAIRS).loss, PAIRS),
    "simpo_loss": (lambda x: simpo_loss(PAIRS, x, **LENGTHS).loss, PAIRS),
    "orpo_loss": (lambda x: orpo_loss(x, PAIRS - 2, **LENGTHS).loss, PAIRS - 2),
    "cpo_loss": (lambda x: cpo_loss(x, PAIRS).loss, PAIRS),
    "kto_loss": (lambda x: kto_loss(x, PAIRS + 0.1, DESIRABLE, KL).loss, PAIRS),
    "reward_loss": (lambda x: reward_loss(x, PAIRS - 0.1).loss, PAIRS),
}
WITHOUT_GRADIENT = {
    "gae": (lambda x: gae(x, TOKENS, MASK).advantages.sum(), TOKENS),
    "masked_whiten": (lambda x: masked_whiten(x, MASK).pow(3).sum(), TOKENS),
    "kto_kl": (lambda x: kto_kl(x, PAIRS - 2), PAIRS),
}
SUMS = {"sum_by_sequence": (lambda x: sum_by_sequence(x, torch.tensor([0, 1, 4])).square().sum(), fixed(4))}


def cases(*tables: dict) -> pytest.MarkDecorator:
    cases = {name: case for table in tables for name, case in table.items()}
    return pytest.mark.parametrize(("loss", "x"), cases.values(), ids=cases.keys())


@cases(WITH_GRADIENT)
@pytest.mark.parametrize("outer", [torch.square, lambda loss: loss], ids=["squared", "linear"])
def test_second_derivative_raises(loss, x, outer):
    """Also where it would be one term of a sum, and where the first derivative does not depend on what comes
    from upstream."""
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(outer(loss(x)), x, create_graph=True)
    plain = torch.autograd.grad(outer(loss(x)), x)[0]
    assert torch.equal(first, plain)  # the first derivative may be asked for with a graph
    with pytest.raises(RuntimeError, match="got a second derivative, expected first ones, because a kernel"):
        torch.autograd.grad(first.sum() + x.square().sum(), x)


def test_second_derivative_by_token_weights_raises():
    token_weights = torch.ones(4, dtype=torch.float64, requires_grad=True)
    loss = linear_cross_entropy(HIDDEN, TRAINED, IDS, token_weights=token_weights, reduction="sum")
    by_weights, by_head = torch.autograd.grad(loss, (token_weights, TRAINED), create_graph=True)
    for first, second in ((by_weights, TRAINED), (by_head, token_weights)):
        with pytest.raises(RuntimeError, match="linear_cross_entropy: got a second derivative"):
            torch.autograd.grad(first.sum(), second, retain_graph=True)


def test_second_derivative_of_squared_cross_entropy():
    """0.1447 came from autograd with the saved gradient taken for a constant; the specification has the right
    0.2678."""
    hidden, weight = (torch.tensor(values, dtype=torch.float64) for values in ([[1.0]], [[1.0], [0.0]]))
    target = torch.tensor([0])
    second = torch.func.hessian(lambda x: linear_cross_entropy_ref(x, weight, target) ** 2)(hidden)
    assert second.item() == pytest.approx(0.2678, abs=5e-5)
    hidden.requires_grad_()
    (first,) = torch.autograd.grad(
        linear_cross_entropy(hidden, weight, target) ** 2, hidden, create_graph=True
    )
    with pytest.raises(RuntimeError, match="linear_cross_entropy: got a second derivative"):
        torch.autograd.grad(first, hidden)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    loss = checkpoint(
        lambda h, w: linear_cross_entropy(h, w, IDS), hidden, weight, use_reentrant=use_reentrant
    )
    (3 * loss).backward()
    expected = torch.autograd.grad(3 * linear_cross_entropy_ref(hidden, weight, IDS), (hidden, weight))
    for found, truth in zip((hidden.grad, weight.grad), expected):
        torch.testing.assert_close(found, truth)


def test_second_derivative_raises_under_checkpoint():
    hidden = HIDDEN.clone().requires_grad_()
    loss = checkpoint(lambda h: linear_cross_entropy(h, TRAINED, IDS), hidden, use_reentrant=False)
    (first,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_entropy: got a second derivative"):
        torch.autograd.grad(first.sum(), hidden)


@cases(WITH_GRADIENT, SUMS)
@pytest.mark.parametrize("derivative", [torch.func.grad, torch.func.jacfwd, torch.func.hessian])
def test_torch_func_derivatives_raise(loss, x, derivative):
    with pytest.raises(
        NotImplementedError, match=r"\w+: got a tensor .*, expected a plain tensor: .* names end in _ref"
    ):
        derivative(loss)(x)


@cases(WITH_GRADIENT, WITHOUT_GRADIENT, SUMS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_raises(loss, x, requires_grad):
    """Tangents were dropped without a word, so that the derivative was 0."""
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(requires_grad), torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="forward-mode AD"):
            loss(dual)
    with pytest.raises(NotImplementedError, match="forward-mode AD"):
        torch.func.jvp(loss, (x,), (torch.ones_like(x),))


def test_captured_parameter_under_torch_func_grad_raises():
    """Of no tensor that is differentiated by, but torch cannot run an op with a backward pass there."""
    with pytest.raises(NotImplementedError, match=r"weight: got .* requires grad inside torch.func.grad"):
        torch.func.grad(lambda x: x.sum() + linear_cross_entropy(HIDDEN, TRAINED, IDS))(PAIRS)


def test_constants_under_torch_func_grad():
    """What has no gradient, as documented, may stand inside a function that is differentiated."""
    found = torch.func.grad(lambda x: (x * gae(x, TOKENS, MASK).advantages).sum())(TOKENS)
    torch.testing.assert_close(found, gae(TOKENS, TOKENS, MASK).advantages)


@pytest.mark.parametrize(
    "transform", [torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1]], ids=["grad", "jvp"]
)
def test_compiled_derivatives_raise(transform):
    torch._dynamo.reset()
    with pytest.raises(NotImplementedError, match="expected a plain tensor"):
        torch.compile(transform(WITH_GRADIENT["dpo_loss"][0]), backend="aot_eager")(PAIRS)


@pytest.mark.filterwarnings(
    "ignore:There is a performance drop"
)  # torch's, for ops that it calls once a slice
@cases(WITH_GRADIENT, WITHOUT_GRADIENT, SUMS)
def test_vmap(loss, x):
    slices = torch.stack([x, 0.5 * x, x - 0.1]).requires_grad_()
    found = torch.func.vmap(loss)(slices)
    expected = torch.stack([loss(each) for each in slices.unbind()])
    torch.testing.assert_close(found, expected)
    if expected.requires_grad:
        torch.testing.assert_close(
            torch.autograd.grad(found.sum(), slices), torch.autograd.grad(expected.sum(), slices)
        )


def test_vmap_over_ids_checks_them():
    """In all slices at once."""
    ids = torch.tensor([[0, 2, 1, 3], [4, 4, -100, 0]])
    found = torch.func.vmap(lambda x, y: cross_entropy(x, y))(torch.stack([LOGITS, -LOGITS]), ids)
    torch.testing.assert_close(
        found, torch.stack([F.cross_entropy(LOGITS, ids[0]), F.cross_entropy(-LOGITS, ids[1])])
    )
    with pytest.raises(ValueError, match=r"targets: got 5 at \[1, 2\]"):
        torch.func.vmap(lambda x, y: cross_entropy(x, y))(
            torch.stack([LOGITS, -LOGITS]), ids.where(ids >= 0, 5)
        )


@pytest.mark.parametrize(
    ("reference", "x"),
    [
        (lambda x: cross_entropy_ref(x, IDS), LOGITS),
        (lambda x: linear_cross_entropy_ref(x, WEIGHT, IDS), HIDDEN),
        (lambda x: linear_distillation_loss_ref(x, WEIGHT, *TEACHER, divergence="jsd"), HIDDEN),
        (lambda x: ppo_loss_ref(x, TOKENS + 0.1, TOKENS, MASK).loss, TOKENS),
        (lambda x: value_loss_ref(x, TOKENS, TOKENS + 0.1, MASK).loss, TOKENS),
        (lambda x: dpo_loss_ref(x, PAIRS, PAIRS + 0.1, PAIRS).loss, PAIRS),
        (lambda x: kto_loss_ref(x, PAIRS + 0.1, DESIRABLE, KL).loss, PAIRS),
        (lambda x: reward_loss_ref(x, PAIRS - 0.1).loss, PAIRS),
    ],
)
def test_specifications_have_what_the_errors_promise(reference, x):
    x = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(reference, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(reference, x)
    torch.testing.assert_close(
        torch.func.grad(reference)(x.detach()), torch.autograd.grad(reference(x), x)[0]
    )


class _Ops(TorchDispatchMode):
    """Names of the operations that torch sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_op_and_not_its_parts():
    """Selective checkpointing saves what an op returns, and must not save what happens inside."""
    with _Ops() as seen:
        loss = linear_cross_entropy(HIDDEN.clone().requires_grad_(), TRAINED, IDS)
    assert "fastalign.head_loss.default" in seen.names and not any("mm" in name for name in seen.names)
    assert torch.equal(loss, linear_cross_entropy(HIDDEN.clone().requires_grad_(), TRAINED, IDS))
