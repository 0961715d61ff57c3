"""logits_dtype=torch.bfloat16: every engine takes the statistics of logits that are rounded to bf16, as plain
PyTorch's are."""

import pytest
import torch
import torch.nn.functional as F

from fastalign_kernels import (
    linear_cross_entropy,
    linear_dpo_loss,
    linear_kto_loss,
    linear_logprobs,
    linear_ppo_loss,
    linear_token_stats,
    plan_head,
    sum_by_sequence,
    token_stats,
)
from fastalign_kernels.linear.gpu import plan as gpu_plan
from fastalign_kernels.linear.inputs import HeadInputs, NeedsGrad
from fastalign_kernels.linear.options import HeadOptions
from fastalign_kernels.linear.token_losses import TokenCrossEntropy
from fastalign_kernels.linear.token_tiles import TOKEN_TILES
from fastalign_kernels.policy.losses import ppo_loss
from fastalign_kernels.preference.losses import dpo_loss, kto_loss
from fastalign_kernels.softmax.rows import Stat, coefficients, row_grad_ref, row_stats_ref
from tests.linear.inputs import op_arguments

N, H, V = 13, 16, 300
MIB = 2**20
LOW = torch.bfloat16
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy's, in the interpreter
]


def make(device="cpu", n_tokens=N):
    """Small multiples of 1/8, whose products are exact in fp32: logits round to the same bf16 everywhere."""
    generator = torch.Generator().manual_seed(n_tokens)
    hidden, weight = (
        (torch.randint(-16, 17, (rows, H), generator=generator) / 8).to(LOW).to(device)
        for rows in (n_tokens, V)
    )
    ids = torch.randint(0, V, (n_tokens,), generator=generator).to(device)
    return hidden.requires_grad_(), weight.requires_grad_(), ids


def engines():
    rows_triton = pytest.importorskip(
        "fastalign_kernels.softmax.rows_triton", reason="triton is not installed", exc_type=ImportError
    )
    assert rows_triton
    from fastalign_kernels.linear.gpu.kept_softmax import KeptSoftmax
    from fastalign_kernels.linear.gpu.vocab_slices import VocabSlices

    return {
        "all kept": KeptSoftmax(1.0),
        "in blocks": KeptSoftmax(8 * 2 * V / MIB),
        "slices": VocabSlices(N * (2 * 112 + 2 * H) / MIB),
        "token tiles": TOKEN_TILES,
    }


@pytest.fixture
def tiny_tiles(monkeypatch):
    monkeypatch.setattr(gpu_plan, "TILES", (8, 4))
    monkeypatch.setattr(gpu_plan, "GRANULE", 4)


@pytest.mark.parametrize("name", ["all kept", "in blocks", "slices", "token tiles"])
@pytest.mark.parametrize("capped", [False, True])
def test_an_engine_computes_from_rounded_logits(device, tiny_tiles, name, capped):
    engine = engines()[name]
    hidden, weight, ids = (x.detach() for x in make(device))
    ids[[0, 5]] = -1
    options = HeadOptions(softcap=5.0 if capped else 0.0, logits_dtype=LOW, lean=not capped)
    inputs, needs = HeadInputs(hidden, weight, ids, None, options), NeedsGrad(hidden=True, weight=True)
    logits = F.linear(hidden, weight).double()[None]
    truth = row_stats_ref(logits, ids, None, options.transform)
    rows = [Stat.LOGP, Stat.LSE, *([Stat.ENTROPY] if capped else [])]

    def expected(of_tokens):
        grad = row_grad_ref(logits, ids, None, options.transform, truth, of_tokens.double())[0]
        return grad @ weight.double(), grad.t() @ hidden.double()

    def assert_close(found, right):
        for ours, true in zip(found, right):
            assert (ours.double() - true).norm() <= 1e-2 * true.norm()  # the interpreter truncates to bf16

    loss = TokenCrossEntropy(torch.linspace(-1, 2, N, device=device), 0.0, 0.01, V)
    table, grads = engine.statistics_and_gradients(inputs, loss, needs)
    torch.testing.assert_close(table[rows].double(), truth[rows], rtol=1e-5, atol=1e-5)
    assert_close(grads[:2], expected(loss(truth.float(), slice(None))))
    frozen = engine.statistics_and_gradients(inputs, loss, NeedsGrad(hidden=True))[1]
    assert_close(frozen[:1], expected(loss(truth.float(), slice(None)))[:1])
    upstream = torch.randn(len(Stat), N, generator=torch.Generator().manual_seed(1)).to(device)
    upstream[[Stat.MEAN_LOGP, *([] if capped else [Stat.ENTROPY])]] = 0
    table, saved = engine.statistics(inputs, needs)
    assert [x.shape for x in saved] == [x.shape for x in engine.empty_saved(inputs, needs)]
    assert all(x.dtype == LOW for x in saved[:1])
    given = coefficients(upstream, table, V)
    for kept in (saved, []):  # the second backward recomputes the logits
        assert_close(engine.gradients(inputs, table, kept, given, needs)[:2], expected(given))
    without = engine.statistics(inputs, NeedsGrad())[0]
    torch.testing.assert_close(without[rows].double(), truth[rows], rtol=1e-5, atol=1e-5)


ROWS = torch.tensor([0, 5, 9, 12, 16])
DESIRABLE = torch.tensor([True, False, True, False])


def ours(hidden, weight, ids):
    mixed = torch.linspace(-1, 1, len(ids), device=ids.device)
    rows = {"cu_seqlens": ROWS.to(ids.device), "reference_logps": torch.zeros(4, device=ids.device)}
    low = {"logits_dtype": LOW}
    stats = linear_token_stats(hidden, weight, ids, **low)
    mask = torch.ones_like(ids, dtype=torch.bool)
    kl = torch.tensor(0.1, device=ids.device)
    return {
        "cross-entropy": linear_cross_entropy(hidden, weight, ids, label_smoothing=0.1, **low),
        "tokens": (linear_cross_entropy(hidden, weight, ids, reduction="none", **low) * mixed).sum(),
        "logp": (linear_logprobs(hidden, weight, ids, **low) * mixed).sum(),
        "frozen": (linear_logprobs(hidden, weight.detach(), ids, **low) * mixed).sum(),
        "tail": (linear_logprobs(hidden, weight, ids, tail_eps=1e-7, **low) * mixed).sum(),
        "stats": (stats.entropy * mixed - stats.lse).sum(),
        "PPO": linear_ppo_loss(hidden, weight, ids, None, mixed, mask, **low).loss,
        "DPO": linear_dpo_loss(hidden, weight, ids, **rows, **low).loss,
        "KTO": linear_kto_loss(hidden, weight, ids, DESIRABLE.to(ids.device), kl, **rows, **low).loss,
    }


def theirs(hidden, weight, ids):
    """From plain PyTorch's logits in bf16."""
    mixed = torch.linspace(-1, 1, len(ids), device=ids.device)
    logits = F.linear(hidden, weight)
    stats = token_stats(logits, ids)
    sums = sum_by_sequence(stats.logp, ROWS.to(ids.device))
    zero, half = torch.zeros(4, device=ids.device), torch.zeros(2, device=ids.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    kl = torch.tensor(0.1, device=ids.device)
    logp = (stats.logp * mixed).sum()
    frozen = (token_stats(F.linear(hidden, weight.detach()), ids).logp * mixed).sum()
    return {
        "cross-entropy": F.cross_entropy(logits.float(), ids, label_smoothing=0.1),
        "tokens": -logp,
        "logp": logp,
        "frozen": frozen,
        "tail": logp,
        "stats": (stats.entropy * mixed - stats.lse).sum(),
        "PPO": ppo_loss(stats.logp, stats.logp.detach(), mixed, mask).loss,
        "DPO": dpo_loss(sums[:2], sums[2:], half, half).loss,
        "KTO": kto_loss(sums, zero, DESIRABLE.to(ids.device), kl).loss,
    }


def test_all_losses_agree_with_logits_that_pytorch_rounds(device):
    hidden, weight, ids = make(device, 16)
    found, expected = ours(hidden, weight, ids), theirs(hidden, weight, ids)
    for name, value in found.items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
        leaves = (hidden,) if name == "frozen" else (hidden, weight)
        for a, b in zip(
            *(torch.autograd.grad(x, leaves, retain_graph=True) for x in (value, expected[name]))
        ):
            assert (a.double() - b.double()).norm() <= 1e-2 * b.double().norm(), name
    fp32 = linear_logprobs(hidden, weight, ids)
    assert torch.equal(fp32, linear_logprobs(hidden, weight, ids, logits_dtype=torch.float32))
    assert not torch.equal(fp32, linear_logprobs(hidden, weight, ids, logits_dtype=LOW)), (
        "nothing was rounded"
    )


def test_compile_and_opcheck(device):
    hidden, weight, ids = make(device)

    def loss(hidden):
        return linear_cross_entropy(hidden, weight, ids, logits_dtype=LOW)

    expected, found = loss(hidden), torch.compile(loss, fullgraph=True)(hidden)
    torch.testing.assert_close(found, expected)
    grads = (torch.autograd.grad(x, (hidden, weight)) for x in (found, expected))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)
    numbers = HeadOptions(logits_dtype=LOW).numbers()
    assert HeadOptions.of(numbers) == HeadOptions(logits_dtype=LOW)
    arguments = op_arguments(
        (hidden, weight, ids, None),
        *(torch.rand(N, device=device), False, 0.0, 0.0),
        options=HeadOptions(logits_dtype=LOW),
        needs=NeedsGrad(hidden=True, weight=True),
    )
    torch.library.opcheck(torch.ops.fastalign.head_loss.default, arguments)


def test_refusals_name_the_argument():
    hidden, weight, ids = (x.detach() for x in make())
    for wrong in (torch.float16, torch.float64, "bf16", True):
        with pytest.raises(
            ValueError, match=r"logits_dtype: got .* expected None, torch.float32 or torch.bfloat16"
        ):
            linear_logprobs(hidden, weight, ids, logits_dtype=wrong)
    for dtype in (torch.float32, torch.float16, torch.float64):
        with pytest.raises(ValueError, match=f"logits_dtype: got torch.bfloat16 with {dtype} hidden states"):
            linear_logprobs(hidden.to(dtype), weight.to(dtype), ids, logits_dtype=LOW)
    with pytest.raises(ValueError, match="logits_dtype: got torch.bfloat16 with dtype torch.float32"):
        plan_head(8, 16, 300, logits_dtype=LOW)


def test_a_plan_keeps_bf16_logits_in_one_block_without_a_tile():
    shapes = {"dtype": LOW, "device": "cuda", "architecture": 90, "memory_mib": 141 * 1024}
    plan = plan_head(8192, 4096, 151936, **shapes, logits_dtype=LOW)
    assert (plan.engine, plan.kept_tokens, plan.gemms) == ("kept_softmax", 8192, 3)
    assert plan.workspace_bytes == 2 * 8192 * 151936
    assert plan.predicted_ms < plan_head(8192, 4096, 151936, **shapes | {"architecture": 80}).predicted_ms
