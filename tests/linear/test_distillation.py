"""Top-K distillation on the head: values and gradients of each divergence, tails of any mass, refusals."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign_kernels import linear_distillation_loss
from fastalign_kernels.linear.outcomes import DIVERGENCES
from fastalign_kernels.linear.reference import linear_distillation_loss_ref
from tests.linear.inputs import grads_of, make, op_arguments

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SEVERAL_CHUNKS = 0.01  # MiB: 10 tokens of fp64 logits at V = 123
OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum", "softcap": 5.0},
    "none": {"reduction": "none", "temperature": 0.6},
    "all": {"softcap": 5.0, "logit_scale": 0.7, "temperature": 1.4, "num_items": 3.0},
    "negative scale": {"logit_scale": -0.3},
    "zero scale": {"logit_scale": 0.0},
}


def student_and_teacher(device: str, dtype: torch.dtype = torch.float64, K: int = 5, **sizes: Any) -> list:
    """hidden, weight, teacher_ids, teacher_logp, bias. Some tokens are ignored, some have padding."""
    hidden, weight, ids, bias = make(device, dtype, **sizes)
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(len(hidden), len(weight), generator=generator, dtype=torch.float64)
    teacher = torch.topk(logits.log_softmax(-1), K)
    teacher_ids = teacher.indices.to(device).masked_fill((ids == -100)[:, None], -100)
    if K > 2:
        teacher_ids[1, 0], teacher_ids[2, 1] = -100, -100
    precise = dtype if dtype == torch.float64 else torch.float32
    return [hidden, weight, teacher_ids, teacher.values.to(device, precise), bias]


def value_and_grads(loss, given: list, **options: Any) -> list[Tensor]:
    """The loss and the gradients of hidden, weight and bias, for an upstream gradient that is not 1."""
    hidden, weight, *_, bias = given
    value = loss(*given, **options)
    upstream = torch.linspace(-1, 2, max(1, value.numel()), dtype=value.dtype, device=value.device)
    return [value.detach(), *grads_of(value, (hidden, weight, bias), upstream.view(value.shape))]


def plain(given: list, divergence: str) -> Tensor:
    """The formula with the tail as 1 - sum, for one token."""
    hidden, weight, ids, logp, bias = given
    p = F.linear(hidden, weight, bias).softmax(-1).gather(-1, ids)
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, logp.exp()))
    m = (p + q) / 2
    kl = {
        "forward_kl": lambda: (q * (q / p).log()).sum(-1),
        "reverse_kl": lambda: (p * (p / q).log()).sum(-1),
        "jsd": lambda: ((q * (q / m).log()).sum(-1) + (p * (p / m).log()).sum(-1)) / 2,
    }
    return kl[divergence]()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_plain_formula(device, divergence):
    given = student_and_teacher(device, K=2, scale=0.1)
    kept = [0, 1, 2, 20, 30]  # not ignored
    given[0], given[2], given[3] = (x.detach()[kept] for x in (given[0], given[2], given[3]))
    given[0].requires_grad_()
    found = value_and_grads(linear_distillation_loss, given, divergence=divergence, reduction="none")
    expected = value_and_grads(lambda *x: plain(list(x), divergence), given)
    for ours, truth in zip(found, expected):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("K", [1, 5, 123])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_reference(device, divergence, options, K):
    given = student_and_teacher(device, K=K)
    options = OPTIONS[options] | {"divergence": divergence}
    found = value_and_grads(linear_distillation_loss, given, workspace_mib=SEVERAL_CHUNKS, **options)
    for ours, truth in zip(found, value_and_grads(linear_distillation_loss_ref, given, **options)):
        torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("scale", [0.02, 3.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_worse_than_eager(no_worse_than_eager, device, divergence, dtype, scale):
    results = []
    for f, widen in (
        (linear_distillation_loss, False),
        (linear_distillation_loss_ref, False),
        (linear_distillation_loss_ref, True),
    ):
        draws = []
        for seed in range(4):
            given = student_and_teacher(device, dtype, K=7, N=60, H=33, V=129, scale=scale, seed=seed)
            if widen:
                given = [x.detach().double() if x.is_floating_point() else x for x in given]
                for i in (0, 1, 4):
                    given[i].requires_grad_()
            chunked = {"workspace_mib": 0.02} if f is linear_distillation_loss else {}
            draws.append(value_and_grads(f, given, divergence=divergence, reduction="none", **chunked))
        results.append([torch.stack(tensors) for tensors in zip(*draws)])
    for name, found, same_dtype, truth in zip(("loss", "d hidden", "d weight", "d bias"), *results):
        no_worse_than_eager(found, same_dtype, truth, name)


@pytest.mark.parametrize("options", ["none", "all"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(divergence, options):
    hidden, weight, ids, logp, bias = student_and_teacher("cpu", K=3, N=6, H=4, V=11)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_distillation_loss(
            h, w, ids, logp, b, divergence=divergence, **OPTIONS[options]
        ),
        (hidden, weight, bias),
    )


def logits_as_bias(logits: Tensor) -> list[Tensor]:
    """hidden, weight and bias of one token with these logits."""
    V = logits.numel()
    return [torch.ones(1, 1).to(logits.dtype), torch.zeros(V, 1).to(logits.dtype), logits.requires_grad_()]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("gap", [5.0, 30.0, 80.0])
def test_a_tiny_tail_of_the_student_keeps_its_digits(divergence, gap):
    """1 - p would be 0 in fp32 from a gap of 17 on, its logarithm -inf and the gradient NaN."""
    z = torch.cat([torch.tensor([0.0, 1.0]), torch.linspace(-gap - 1, -gap, 50)])
    teacher = torch.tensor([[0, 1]]), torch.tensor([[0.3, 0.5]]).log()
    results = []
    for dtype in (torch.float32, torch.float64):
        hidden, weight, bias = logits_as_bias(z.to(dtype))
        loss = linear_distillation_loss(hidden, weight, *teacher, bias, divergence=divergence)
        results.append([loss.detach().double(), grads_of(loss, [bias])[0].double()])
    for found, truth in zip(*results):
        torch.testing.assert_close(found, truth, rtol=5e-6, atol=1e-12)
    if divergence == "forward_kl":  # d/dz sums to p - q over the tail
        p = z.detach().double().softmax(0)[2:].sum().item()
        assert results[0][1][2:].sum().item() == pytest.approx(p - 0.2, rel=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_tiny_tail_of_the_teacher_keeps_its_digits(divergence):
    """log1mexp in fp64: 1 - sum in fp32 would be off by its rounding, 6e-8."""
    tail = 1e-9
    logp = torch.tensor([[1 - tail]], dtype=torch.float64).log()
    hidden, weight, bias = logits_as_bias(torch.tensor([0.0, -3.0, -4.0], dtype=torch.float64))
    p = bias.detach().softmax(0)[0].item()
    loss = linear_distillation_loss(
        hidden, weight, torch.tensor([[0]]), logp, bias, divergence=divergence
    ).item()
    masses = [(p, 1 - tail), (1 - p, tail)]
    m = [(a + b) / 2 for a, b in masses]
    expected = {
        "forward_kl": sum(q * math.log(q / p) for p, q in masses),
        "reverse_kl": sum(p * math.log(p / q) for p, q in masses),
        "jsd": sum((p * math.log(p / c) + q * math.log(q / c)) / 2 for (p, q), c in zip(masses, m)),
    }
    assert loss == pytest.approx(expected[divergence], rel=1e-7)


@pytest.mark.parametrize("mass", [1.0, 1.0 + 3e-7, 1.02])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_teacher_without_a_tail(divergence, mass):
    """Also if its masses sum to more than 1, by rounding: the loss is that of the masses over their sum."""
    q = torch.tensor([[0.6, 0.4]], dtype=torch.float64)
    hidden, weight, bias = logits_as_bias(torch.tensor([0.0, 0.5, -3.0, -4.0]))
    ids = torch.tensor([[0, 1]])
    loss = linear_distillation_loss(
        hidden, weight, ids, (q * mass).log().float(), bias, divergence=divergence
    )
    (gradient,) = grads_of(loss, [bias])
    z = bias.detach().double().requires_grad_()
    p = z.softmax(0)
    tail = 2**-23 if divergence == "reverse_kl" else 1e-300
    p, q = torch.stack([p[0], p[1], p[2:].sum()]), F.pad(q[0], (0, 1), value=tail)
    m = (p + q) / 2
    kl = {
        "forward_kl": lambda: (q[:2] * (q[:2] / p[:2]).log()).sum(),
        "reverse_kl": lambda: (p * (p / q).log()).sum(),
        "jsd": lambda: ((q * (q / m).log()).sum() + (p * (p / m).log()).sum()) / 2,
    }
    truth = kl[divergence]()
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    torch.testing.assert_close(gradient.double(), *torch.autograd.grad(truth, z), rtol=1e-5, atol=2e-7)


def test_equal_distributions_have_no_divergence_and_no_gradient():
    hidden, weight, _, bias = make("cpu", torch.float32)
    teacher = torch.topk(F.linear(hidden, weight, bias).log_softmax(-1), 6)
    for divergence in DIVERGENCES:
        loss = linear_distillation_loss(
            hidden, weight, teacher.indices, teacher.values, bias, divergence=divergence
        )
        assert abs(loss.item()) < 1e-6
        assert grads_of(loss, [hidden])[0].abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_hostile_inputs(device, divergence, dtype):
    """Logits of 1e4, ids without mass in the vocabulary, NaN in ignored tokens, strides, int32, fp32 master
    weights."""
    hidden, weight, ids, logp, bias = (x.detach() for x in student_and_teacher(device, dtype))
    weight, bias = weight.float(), bias.float()
    ignored = (ids == -100).all(-1)
    hidden[0] *= 3000
    hidden[ignored], logp[ignored] = math.nan, math.nan
    bias[ids[5, 1]] = -math.inf  # of mass 0 for the student
    logp[5, 1] = -math.inf if divergence == "reverse_kl" else logp[5, 1]
    hidden = hidden.t().contiguous().t()
    given = [hidden, weight, ids.int(), logp, bias]
    options = {"divergence": divergence, "reduction": "none"}
    found, expected = [], []
    for loss, results in ((linear_distillation_loss, found), (linear_distillation_loss_ref, expected)):
        h, w = (x.double() if loss is linear_distillation_loss_ref else x for x in (hidden, weight))
        h = torch.where(ignored[:, None], 0.0, h) if loss is linear_distillation_loss_ref else h
        given[0], given[1] = h.requires_grad_(), w.requires_grad_()
        losses = loss(*given, **options)
        results.append(losses)
        finite = losses.isfinite()
        results += torch.autograd.grad(losses[finite].sum(), (h, w))
    assert torch.equal(found[0].isfinite(), expected[0].isfinite())
    assert (found[0][ignored] == 0).all() and (found[1][ignored] == 0).all()
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    for ours, truth in zip(found, expected):
        assert not ours.isnan().any()
        torch.testing.assert_close(ours.double(), truth, **close)


def test_nothing_to_average_and_no_token():
    hidden, weight, ids, logp, bias = student_and_teacher("cpu")
    ignored = torch.full_like(ids, -100)
    for args in ((hidden, weight, ignored, logp), (hidden[:0], weight, ids[:0], logp[:0])):
        assert linear_distillation_loss(*args).isnan()
        assert linear_distillation_loss(*args, reduction="sum") == 0
        assert linear_distillation_loss(*args, num_items=3.0) == 0
        for reduction in ("mean", "sum"):
            (gradient,) = grads_of(linear_distillation_loss(*args, reduction=reduction), [weight])
            assert (gradient == 0).all()
    given = (hidden.view(1, 37, 19), weight, ids[None], logp[None], bias)
    assert linear_distillation_loss(*given, reduction="none").shape == (1, 37)


def test_token_weights_get_a_gradient_and_a_second_backward_works():
    hidden, weight, ids, logp, bias = student_and_teacher("cpu")
    token_weights = torch.rand(37, dtype=torch.float64, requires_grad=True)
    losses = [
        loss(hidden, weight, ids, logp, bias, token_weights=token_weights, num_items=3.0)
        for loss in (linear_distillation_loss, linear_distillation_loss_ref)
    ]
    trained = (hidden, weight, token_weights)
    expected = torch.autograd.grad(losses[1], trained)
    for _ in range(2):
        for found, truth in zip(torch.autograd.grad(losses[0], trained, retain_graph=True), expected):
            torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-12)


def test_a_frozen_head_and_a_frozen_student():
    hidden, weight, ids, logp, bias = student_and_teacher("cpu")
    loss = linear_distillation_loss(hidden, weight, ids, logp, bias)
    (expected,) = grads_of(loss, [hidden])
    frozen = linear_distillation_loss(hidden, weight.detach(), ids, logp, bias.detach())
    torch.testing.assert_close(grads_of(frozen, [hidden])[0], expected)
    without = linear_distillation_loss(*(x.detach() for x in (hidden, weight, ids, logp, bias)))
    assert not without.requires_grad and torch.equal(without, loss)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_and_the_ops_check(reduction):
    given = student_and_teacher("cpu", K=3, N=6, H=4, V=11)
    options = {"reduction": reduction, "softcap": 5.0, "divergence": "jsd"}
    step = torch.compile(
        lambda *x: linear_distillation_loss(*x, **options), fullgraph=True, backend="aot_eager"
    )
    expected = value_and_grads(linear_distillation_loss, given, **options)
    for found, eager in zip(value_and_grads(step, given), expected):
        torch.testing.assert_close(found, eager)
    hidden, weight, ids, logp, bias = given
    first = ids.amax(-1)
    head, teacher = (hidden, weight, first, bias), (ids.clamp(min=-1), logp)
    if reduction == "none":
        torch.library.opcheck(
            torch.ops.fastalign.head_divergences.default, op_arguments(head, *teacher, "jsd")
        )
    else:
        scale = torch.rand(6, dtype=torch.float64)
        torch.library.opcheck(
            torch.ops.fastalign.head_distillation.default, op_arguments(head, *teacher, scale, "jsd")
        )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"divergence": "kl"}, "divergence: got 'kl', expected one of forward_kl, reverse_kl, jsd"),
        ({"tail_eps": 1e-3}, "tail_eps: got 0.001, expected None"),
        ({"teacher_ids": torch.zeros(37, dtype=torch.long)}, r"teacher_ids: got shape \[37\]"),
        ({"teacher_ids": torch.zeros(36, 5).long()}, r"teacher_ids: got shape \[36, 5\]"),
        ({"teacher_ids": torch.zeros(37, 0).long()}, "teacher_ids: got 0 ids a token, expected 1 to 123"),
        ({"teacher_ids": torch.zeros(37, 124).long()}, "teacher_ids: got 124 ids a token"),
        ({"teacher_ids": torch.full((37, 5), 123)}, r"teacher_ids: got 123 at \[0, 0\]"),
        (
            {"teacher_ids": torch.tensor([3, 4, -100, 5, 4]).expand(37, 5)},
            r"teacher_ids: got id 4 twice at \[0\]",
        ),
        ({"teacher_ids": torch.zeros(37, 5)}, "teacher_ids: got torch.float32"),
        ({"teacher_logp": torch.zeros(37, 4)}, r"teacher_logp: got shape \[37, 4\]"),
        ({"teacher_logp": torch.zeros(37, 5)}, r"teacher_logp: got a mass of 5 at \[0\], expected at most 1"),
        ({"token_weights": torch.ones(36)}, "token_weights: got shape"),
    ],
)
def test_refusals_name_the_argument(change, said):
    names = ("hidden", "weight", "teacher_ids", "teacher_logp", "bias")
    given = dict(zip(names, student_and_teacher("cpu")))
    given["teacher_ids"] = torch.arange(5).expand(37, 5)
    with pytest.raises(ValueError, match=said):
        linear_distillation_loss(**{**given, **change})
