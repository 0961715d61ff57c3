"""LoRA on the head: every loss and mode equals the head with W + s B A, which is never formed."""

import functools

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastalign import nn
from fastalign_kernels import (
    LowRank,
    linear_cross_entropy,
    linear_dpo_loss,
    linear_logprobs,
    linear_token_stats,
    native,
    plan_head,
)
from fastalign_kernels.linear.head_ops import OpCall
from fastalign_kernels.linear.inputs import head_inputs
from fastalign_kernels.linear.options import HeadOptions
from fastalign_kernels.linear.reference import (
    linear_cross_entropy_ref,
    linear_distillation_loss_ref,
    linear_kept_stats_ref,
    linear_token_stats_ref,
)
from fastalign_kernels.linear.token_outputs import linear_token_outputs
from fastalign_kernels.linear.token_tiles import TOKEN_TILES
from tests.linear.lora_inputs import LOSSES, NO_TAIL, SCALE, Given, H, R, T, V, ids, make

SEVERAL_CHUNKS = 6 * V * 8 / 2**20  # MiB: 6 tokens of fp64
HEAD = {"softcap": 9.0, "logit_scale": 0.8, "temperature": 1.3}
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def run(loss, given: Given, upstream=None, **head):
    """The loss's value and its gradients of what is trained, with the adapter inside of the head."""
    out = loss(given.hidden, given.weight, given.bias, lora=(given.A, given.B, SCALE), **head)
    return out, torch.autograd.grad(out, [t for t in given if t.requires_grad], upstream)


def run_merged(loss, given: Given, upstream=None, **head):
    out = loss(given.hidden, given.merged(), given.bias, **head)
    return out, torch.autograd.grad(out, [t for t in given if t.requires_grad], upstream)


def assert_equal(found, expected, rtol=1e-11):
    (value, grads), (true_value, true_grads) = found, expected
    torch.testing.assert_close(value, true_value, rtol=rtol, atol=1e-12)
    for grad, true_grad in zip(grads, true_grads, strict=True):
        torch.testing.assert_close(grad, true_grad, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("workspace_mib", [None, SEVERAL_CHUNKS], ids=["one chunk", "several chunks"])
@pytest.mark.parametrize("r", [1, 8, 64])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_equals_that_of_the_merged_weight(name, r, workspace_mib, frozen):
    given, loss = make(r, frozen=frozen), LOSSES[name]
    shape = loss(given.hidden.detach(), given.weight.detach(), None).shape
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    options = {**HEAD, "workspace_mib": workspace_mib}
    assert_equal(run(loss, given, upstream, **options), run_merged(loss, given, upstream, **options))


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in NO_TAIL])
def test_the_tail_of_every_loss_equals_that_of_the_merged_weight(name):
    """The same columns are kept, and the rest has the same rank-1 matrix, in dU and dB too."""
    given, loss = make(3), LOSSES[name]
    head = {"tail_eps": 0.2, "temperature": 0.3}
    upstream = torch.ones_like(loss(given.hidden.detach(), given.weight.detach(), None))
    found, exact = run(loss, given, upstream, **head), run(loss, given, upstream, temperature=0.3)
    assert_equal(found, run_merged(loss, given, upstream, **head), rtol=1e-9)
    assert any(not torch.allclose(a, b, rtol=1e-6) for a, b in zip(found[1], exact[1])), (
        "no column was left out"
    )


@pytest.mark.parametrize("native_gemm", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("r", [1, 8, 64])
def test_no_worse_than_eager(no_worse_than_eager, monkeypatch, r, dtype, native_gemm):
    """PEFT's F.linear(x, W) + s F.linear(F.linear(x, A), B) in the same dtype has at most half the error."""
    if native_gemm and not native.has_gemm():
        pytest.skip("csrc/gemm needs AVX-512")
    monkeypatch.setattr(native, "uses_gemm", lambda: native_gemm)
    kept = ids() >= 0

    def peft(hidden, weight, bias, A, B):
        logits = F.linear(hidden, weight, bias) + SCALE * F.linear(F.linear(hidden, A), B)
        return F.cross_entropy(logits, ids()[kept])

    def ours(hidden, weight, bias, A, B):
        return linear_cross_entropy(hidden, weight, ids()[kept], bias, lora=(A, B, SCALE))

    def results(function, of_dtype):
        given = [t.detach() for t in make(r, dtype)]
        given[0] = given[0][kept]
        given = [t.to(of_dtype).requires_grad_() for t in given]
        out = function(*given)
        return [out, *torch.autograd.grad(out, given)]

    names = ("loss", *(f"d {name}" for name in Given._fields))
    for name, *three in zip(names, results(ours, dtype), results(peft, dtype), results(peft, torch.float64)):
        no_worse_than_eager(*(t.detach() for t in three), f"{name}, r {r}, {dtype}")


@pytest.mark.parametrize("name", ["cross-entropy", "log-probabilities", "DPO", "kept sets"])
def test_fp32_adapters_beside_bf16_hidden_states_get_fp32_gradients(name):
    """Their gradient is that of fp32: rounding it to bf16 once would be off by 2^-9."""
    given = make(8, torch.bfloat16, frozen=True)
    A, B = (t.detach().float().requires_grad_() for t in (given.A, given.B))
    out = LOSSES[name](given.hidden, given.weight, given.bias, lora=LowRank(A, B, SCALE)).sum()
    dA, dB = torch.autograd.grad(out, (A, B))
    assert dA.dtype == dB.dtype == torch.float32
    wide = Given(*(t.detach().double() for t in given))._replace(
        A=A.detach().double().requires_grad_(), B=B.detach().double().requires_grad_()
    )
    expected = run(lambda *a, **k: LOSSES[name](*a, **k).sum(), wide)[1]
    for found, true in zip((dA, dB), expected):
        assert (found - true).norm() / true.norm() < 2e-3


def test_a_frozen_weight_gets_no_gradient_memory(monkeypatch):
    """dW has size 0 in the engine, and no tensor of [V, H] is allocated beside it."""
    given = make(2, frozen=True)
    seen: list[int] = []
    for owner, name in ((torch, "empty"), (torch, "zeros"), (torch, "zeros_like"), (torch, "empty_like")):
        allocate = getattr(owner, name)

        def recorded(*args, allocate=allocate, **kwargs):
            tensor = allocate(*args, **kwargs)
            seen.append(tensor.numel() if tensor.dim() == 2 and tensor.shape[0] == V else 0)
            return tensor

        monkeypatch.setattr(owner, name, recorded)
    options = HeadOptions(lora=LowRank(given.A, given.B, SCALE))
    inputs = head_inputs(given.hidden, given.weight, ids(), given.bias, options)
    needs, coefficients = inputs.needs_grad(), torch.ones(4, R * T, dtype=torch.float64)
    with torch.no_grad():
        stats, _ = TOKEN_TILES.statistics(inputs, needs)
        grads = TOKEN_TILES.gradients(inputs, stats, [], coefficients, needs)
    assert [g.numel() for g in grads] == [R * T * H, 0, 0, R * T * 2, V * 2]
    assert max(seen) <= V * 2


def test_the_references_take_the_adapter():
    given = make(3)
    lora = {"lora": (given.A, given.B, SCALE)}
    tokens, clean = ids(), given.hidden.detach().nan_to_num()
    merged = given.merged()
    pairs = [
        (
            linear_cross_entropy_ref(clean, given.weight, tokens, **lora),
            linear_cross_entropy_ref(clean, merged, tokens),
        ),
        (
            linear_token_stats_ref(clean, given.weight, tokens, **lora).lse,
            linear_token_stats_ref(clean, merged, tokens).lse,
        ),
    ]
    teacher = torch.randn(R, T, V, dtype=torch.float64).log_softmax(-1).topk(2)
    of_teacher = (teacher.indices, teacher.values)
    pairs.append(
        (
            linear_distillation_loss_ref(clean, given.weight, *of_teacher, **lora),
            linear_distillation_loss_ref(clean, merged, *of_teacher),
        )
    )
    kept = (torch.arange(0, 3 * R * T + 1, 3), torch.arange(3).repeat(R * T))
    pairs.append(
        (
            linear_kept_stats_ref(clean, given.weight, tokens, kept=kept, **lora)[1],
            linear_kept_stats_ref(clean, merged, tokens, kept=kept)[1],
        )
    )
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_all_outputs_of_tokens_have_the_adapter():
    given = make(3)
    asked = {"entropy": True, "log_sum_sq_probs": True, "mean_logit": True, "top1": True}
    found = linear_token_outputs(given.hidden, given.weight, ids(), lora=(given.A, given.B, SCALE), **asked)
    expected = linear_token_outputs(given.hidden, given.merged(), ids(), **asked)
    for ours, true in zip(found, expected):
        torch.testing.assert_close(ours, true, rtol=1e-11, atol=1e-12)


def test_gradcheck():
    given = make(2)
    hidden = given.hidden.detach()[ids() >= 0][:6].requires_grad_()
    tokens = ids()[ids() >= 0][:6]

    def loss(hidden, A, B):
        return linear_cross_entropy(hidden, given.weight.detach(), tokens, lora=(A, B, SCALE))

    def statistics(hidden, A, B):
        return linear_token_stats(hidden, given.weight.detach(), tokens, lora=(A, B, SCALE))[:3]

    for function in (loss, statistics):
        assert torch.autograd.gradcheck(function, (hidden, given.A, given.B))


@pytest.mark.parametrize("name", ["cross-entropy", "statistics", "DPO", "PPO", "distillation", "kept sets"])
def test_a_second_backward_checkpoint_and_no_grad(name):
    given, loss = make(3, frozen=True), LOSSES[name]
    out = loss(given.hidden, given.weight, given.bias, lora=(given.A, given.B, SCALE)).sum()
    trained = given.trained(frozen=True)
    first = torch.autograd.grad(out, trained, retain_graph=True)
    again = torch.autograd.grad(out, trained)

    def adapted(hidden, A, B):
        return loss(hidden, given.weight, given.bias, lora=(A, B, SCALE)).sum()

    recomputed = torch.autograd.grad(checkpoint(adapted, *trained, use_reentrant=False), trained)
    for a, b, c in zip(first, again, recomputed):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        torch.testing.assert_close(adapted(*trained), out.detach(), rtol=1e-13, atol=1e-13)


def test_autocast_leaves_the_adapter_in_fp32():
    given = make(4, torch.float32, frozen=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_cross_entropy(given.hidden, given.weight, ids(), lora=(given.A, given.B, SCALE))
    low = given.hidden.detach().bfloat16().requires_grad_()
    outside = linear_cross_entropy(low, given.weight, ids(), lora=(given.A, given.B, SCALE))
    assert torch.equal(out, outside)
    for found, true in zip(*(torch.autograd.grad(x, (given.A, given.B)) for x in (out, outside))):
        assert found.dtype == torch.float32 and torch.equal(found, true)


@functools.cache
def _all_in_one_graph():
    tokens = ids()

    def losses(hidden, weight, A, B):
        lora = (A, B, SCALE)
        pairs = linear_dpo_loss(hidden, weight, tokens, reference_logps=torch.zeros(R), lora=lora).loss
        return (
            linear_cross_entropy(hidden, weight, tokens, lora=lora)
            + linear_logprobs(hidden, weight, tokens, lora=lora).sum()
            + pairs
        )

    return losses, torch.compile(losses, fullgraph=True, backend="aot_eager")


def test_compiles_to_one_graph():
    given = make(4, torch.float32, frozen=True)
    arguments = (given.hidden, given.weight, given.A, given.B)
    eager, compiled = _all_in_one_graph()
    results = []
    for function in (eager, compiled):
        out = function(*arguments)
        results.append([out, *torch.autograd.grad(out, given.trained(frozen=True))])
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected)


def test_the_ops_check():
    given = make(2)
    tokens = ids().flatten()
    hidden = given.hidden.detach().nan_to_num()
    options = HeadOptions(lora=LowRank(given.A.detach(), given.B.detach(), SCALE))
    inputs = head_inputs(hidden, given.weight.detach(), ids(), None, options)
    inputs = inputs._replace(
        hidden=inputs.hidden.requires_grad_(),
        lora_hidden=inputs.lora_hidden.requires_grad_(),
        lora_weight=inputs.lora_weight.requires_grad_(),
    )
    scale = (tokens >= 0).double() / 3
    call = OpCall(inputs, inputs.needs_grad(), (scale, False, 0.1, 0.0)).arguments()
    torch.library.opcheck(torch.ops.fastalign.head_loss.default, call)
    call = OpCall(inputs, inputs.needs_grad(), ()).arguments()
    torch.library.opcheck(torch.ops.fastalign.head_stats.default, call)


def test_log_probabilities_of_an_adapter_without_gradients_are_frozen():
    given = make(4, frozen=True)
    lora = (given.A.detach(), given.B.detach(), SCALE)
    found = linear_logprobs(given.hidden, given.weight, ids(), lora=lora)
    expected = linear_logprobs(given.hidden, given.merged().detach(), ids())
    for a, b in zip(*(torch.autograd.grad(x.sum(), given.hidden) for x in (found, expected))):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


BAD = {
    "lora: got a tensor": lambda g: g.A,
    r"lora: got a tuple, expected \(A": lambda g: (g.A, g.B),
    "lora: got None, expected a torch.Tensor": lambda g: (None, g.B, 1.0),
    r"lora: got A \[3, 6\] and B \[37, 2\]": lambda g: (g.A, g.B[:, :2], 1.0),
    r"lora: got shape \[3, 5\], expected A \[r, H\] = \[3, 6\]": lambda g: (g.A[:, :5], g.B, 1.0),
    r"lora: got shape \[36, 3\], expected B \[V, r\] = \[37, 3\]": lambda g: (g.A, g.B[:36], 1.0),
    "lora: got torch.float64, expected torch.float32": lambda g: (g.A.double(), g.B.double(), 1.0),
    "lora: got torch.bfloat16, expected torch.float32": lambda g: (g.A, g.B.bfloat16(), 1.0),
    "lora: got nan, expected a finite number": lambda g: (g.A, g.B, float("nan")),
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_adapter_is_refused_by_name(message):
    given = make(3, torch.float32)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(given.hidden, given.weight, ids(), lora=BAD[message](given))


def test_the_plan_knows_the_rank():
    sizes = (8192, 4096, 151936)
    card = {"dtype": torch.bfloat16, "device": "cuda", "architecture": 90, "memory_mib": 141_000.0}
    base = plan_head(*sizes, weight_grad=False, **card)
    adapted = plan_head(*sizes, weight_grad=False, lora_rank=16, **card)
    assert (base.engine, adapted.engine) == ("epilogue", "kept_softmax")
    assert adapted.gemms == base.gemms == 2 and adapted.predicted_ms > base.predicted_ms
    # three GEMMs are what forming W + s B A takes: its dW has the size of the weight
    formed = plan_head(*sizes, **card)
    assert adapted.predicted_ms < formed.predicted_ms and adapted.held_bytes < formed.held_bytes
    logp = plan_head(*sizes, weight_grad=False, upstream="logp", lora_rank=16)
    assert (
        logp.way == "general" and plan_head(*sizes, weight_grad=False, upstream="logp").way == "frozen_head"
    )
    with pytest.raises(ValueError, match=r"lora_rank: got -1, expected a whole number >= 0"):
        plan_head(*sizes, lora_rank=-1)


MODULES = {
    "cross-entropy": (nn.LinearCrossEntropyLoss(), lambda: (ids(),), {}),
    "DPO": (nn.LinearDPOLoss(), lambda: (ids(),), {"reference_logps": torch.zeros(R)}),
    "ORPO": (nn.LinearORPOLoss(), lambda: (ids(),), {}),
    "KTO": (
        nn.LinearKTOLoss(),
        lambda: (ids(), torch.arange(R) > 1, torch.tensor(0.1)),
        {"reference_logps": torch.zeros(R)},
    ),
    "PPO": (nn.LinearPPOLoss(), lambda: (ids(), torch.zeros(R, T), torch.ones(R, T), ids() >= 0), {}),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_takes_the_adapter_with_its_call(name):
    module, tensors, options = MODULES[name]
    given = make(3)

    def loss(hidden, weight, bias, **lora):
        out = module(hidden, weight, *tensors(), bias=bias, **options, **lora)
        return out if isinstance(out, torch.Tensor) else out.loss

    assert_equal(run(loss, given), run_merged(loss, given))


def test_meta_tensors_give_shapes() -> None:
    hidden, weight, A, B = (
        torch.zeros(*shape, device="meta") for shape in ((6, 8), (32, 8), (2, 8), (32, 2))
    )
    found = linear_token_outputs(
        hidden, weight, torch.zeros(6, dtype=torch.int64, device="meta"), mean_logit=True, lora=(A, B, 0.5)
    )
    assert found.logp.shape == (6,) and found.mean_logit is not None and found.mean_logit.is_meta
