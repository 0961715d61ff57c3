"""The tail's engine for GPUs against the formula of linear/tail_columns.py in fp64, with the columns that the
engine kept. Its kernels run in Triton's interpreter without a GPU; see test_epilogue.py for the dtypes."""

import math

import pytest
import torch

from fastalign_kernels import (
    linear_cross_entropy,
    linear_dpo_loss,
    linear_kto_loss,
    linear_logprobs,
    linear_ppo_loss,
    linear_token_stats,
)
from fastalign_kernels.linear import engines
from fastalign_kernels.linear.engine import Gradients
from fastalign_kernels.linear.gpu import epilogue, tail_tiles
from fastalign_kernels.linear.gpu import plan as gpu_plan
from fastalign_kernels.linear.gpu import tail as tail_gpu
from fastalign_kernels.linear.inputs import HeadInputs, NeedsGrad
from fastalign_kernels.linear.options import HeadOptions
from fastalign_kernels.linear.tail_columns import kept_share
from fastalign_kernels.linear.token_losses import TokenCrossEntropy
from fastalign_kernels.softmax.rows import Stat, coefficients, row_grad_ref, row_stats_ref, slope_ref

pytest.importorskip("triton", reason="triton is not installed", exc_type=ImportError)
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy's, in the interpreter
]

GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if GPU else torch.float32
# relative error of a gradient; fp16 keeps P as e 2^15 with 11 digits, bf16 rounds twice to 8
CLOSE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 6e-3}
N, H, V = 43, 24, 299
EPS = 2.0**-5
ALL = NeedsGrad(hidden=True, weight=True, bias=True)
OPTIONS = {
    "plain": HeadOptions(tail_eps=EPS),
    "scale": HeadOptions(logit_scale=-0.7, temperature=1.3, tail_eps=EPS),
    "softcap": HeadOptions(softcap=9.0, tail_eps=EPS),
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Parts of 16 tokens, tiles of 16 columns."""
    if not GPU:
        monkeypatch.setattr(tail_tiles, "PART", 16)
        monkeypatch.setattr(tail_tiles, "TILE", 16)
        for name in ("COLLECT", "COLLECT_FULL"):
            monkeypatch.setattr(tail_gpu, name, tail_tiles.RowTiles(rows=16, columns=64, warps=4, stages=1))
        monkeypatch.setattr(tail_gpu, "PROGRAMS", 4)
        monkeypatch.setattr(tail_gpu, "TILES", {90: tail_gpu.TailTiles(16, 32, 16)})


def engine(workspace_mib=64.0):
    tiles = None if GPU else epilogue.Tiles(bm=16, bn=64, bk=32, group=2)
    return tail_gpu.TailEpilogue(workspace_mib, tiles=tiles)


def make(device, options, dtype=DTYPE, ignored=True, bias=False, peak=9.0):
    """Logits as of a trained head: each token is nearly sure of its id. Ignored tokens hold NaN."""
    generator = torch.Generator().manual_seed(0)
    n, h, v = (1300, 256, 4000) if GPU else (N, H, V)
    weight = torch.randn(v, h, generator=generator, dtype=torch.float64)
    ids = (torch.rand(n, generator=generator) ** 3 * v).long()
    hidden = weight[ids] * peak / h + torch.randn(n, h, generator=generator).double() / h**0.5
    if options.logit_scale < 0:
        hidden = -hidden
    if ignored:
        ids[5::7], hidden[5::7] = -1, torch.nan
    b = torch.linspace(-1, 1, v).to(device, dtype) if bias else None
    return HeadInputs(hidden.to(device, dtype), weight.to(device, dtype), ids.to(device), b, options)


def formula(inputs, token_coefficients, selected):
    """Gradients in fp64 for the columns that `selected`, the KeptTiles of each block in turn, say."""
    _, weight, ids, bias, options = inputs[:5]
    order = (ids >= 0).nonzero()[:, 0]
    x, w = inputs.hidden[order].double(), weight.double()
    b = None if bias is None else bias.double()
    logits = (x @ w.t())[None]
    stats = row_stats_ref(logits, ids[order], b, options.transform)
    given = token_coefficients(stats, order)
    exact = row_grad_ref(logits, ids[order], b, options.transform, stats, given)[0]
    uniform = given[3][:, None] * options.logit_scale / options.temperature
    slope = slope_ref(logits[0], b, options.transform)
    z = logits[0] if b is None else logits[0] + b
    z = z * options.logit_scale
    z = options.softcap * torch.tanh(z / options.softcap) if options.softcap else z
    P = (z / options.temperature).softmax(-1)
    approximate = exact.clone()
    position = 0
    for kept, rows in selected:
        bits = kept.column_parts
        for part in range(kept.parts):
            begin = position + part * kept.part_rows
            t = slice(begin, position + min(rows, (part + 1) * kept.part_rows))
            keep = (bits >> part & 1).bool()
            needed = P[t].amax(0) > options.tail_eps * 1.02
            needed[ids[order][t]] = True
            assert not (needed & ~keep).any(), "a column above tail_eps was dropped"
            q = (P[t] * slope[t])[:, ~keep].sum(0)
            r = (exact[t] - uniform[t])[:, ~keep].sum(1)
            share = q / q.sum() if q.numel() and q.sum() != 0 else q
            approximate[t, ~keep] = torch.outer(r, share) + uniform[t]
        position += rows
    d_hidden = torch.zeros(inputs.hidden.shape, dtype=torch.float64, device=ids.device)
    d_hidden[order] = approximate @ w
    nothing = approximate.new_empty(0)  # there is no adapter
    return Gradients(d_hidden, approximate.t() @ x, approximate.sum(0), nothing, nothing)


def assert_close(found, expected, dtype):
    for name, ours, right in zip(Gradients._fields, found, expected):
        if ours.numel():
            error = (ours.double() - right).norm() / right.norm().clamp(min=1e-12)
            assert error <= CLOSE[dtype], f"d {name} is off by {error:.3g}"


@pytest.fixture
def selected(monkeypatch):
    """The tiles that were selected, and the tokens of their blocks."""
    blocks = []
    original = tail_tiles.select_tiles

    def spy(call, block, rows, stats, rule):
        kept, how_many = original(call, block, rows, stats, rule)
        blocks.append((kept, rows))
        return kept, how_many

    monkeypatch.setattr(tail_tiles, "select_tiles", spy)
    return blocks


def loss_of(inputs, label_smoothing=0.0, z_loss=0.0):
    scale = torch.linspace(-1, 2, inputs.ids.numel(), device=inputs.ids.device)
    return TokenCrossEntropy(scale, label_smoothing, z_loss, inputs.vocab_size)


def upstream(inputs, *statistics):
    grad = torch.zeros(len(Stat), inputs.ids.numel())
    generator = torch.Generator().manual_seed(1)
    grad[list(statistics)] = torch.randn(len(statistics), grad.shape[1], generator=generator)
    grad = grad.to(inputs.ids.device)
    return lambda stats, tokens: coefficients(grad[:, tokens].to(stats.dtype), stats, inputs.vocab_size)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_token_loss_follows_the_formula(device, selected, options):
    inputs = make(device, OPTIONS[options], bias=options == "scale")
    smoothing = 0.0 if options == "softcap" else 0.1
    loss = loss_of(inputs, smoothing, 0.01)
    kept_share()
    _, found = engine().statistics_and_gradients(inputs, loss, ALL._replace(bias=inputs.bias is not None))
    assert 0.05 < kept_share() < 0.6
    assert len(selected) == 1 and selected[0][0].parts == (2 if GPU else 3)
    wide = TokenCrossEntropy(loss.scale.double(), smoothing, 0.01, inputs.vocab_size)
    assert_close(found, formula(inputs, wide, selected), DTYPE)


@pytest.mark.parametrize("dtype", [DTYPE, torch.float16], ids=str)
def test_any_upstream_gradient_follows_the_formula(device, selected, dtype):
    inputs = make(device, HeadOptions(tail_eps=EPS), dtype, bias=True)
    coefs = upstream(inputs, Stat.LOGP, Stat.ENTROPY, Stat.LSE)
    tail = engine()
    stats, saved = tail.statistics(inputs, ALL)
    assert [x.shape for x in saved] == [x.shape for x in tail.empty_saved(inputs, ALL)]
    found = tail.gradients(inputs, stats, saved, coefs(stats, slice(None)), ALL)
    expected = formula(inputs, coefs, selected)
    assert_close(found, expected, dtype)
    again = tail.gradients(inputs, stats, [], coefs(stats, slice(None)), ALL)  # logits are recomputed
    assert_close(again, expected, dtype)


def test_blocks_add_up(device, selected):
    """A workspace of 16 tokens: three blocks, summed in fp32; and under a frozen head."""
    inputs = make(device, HeadOptions(tail_eps=EPS), bias=True)
    v = inputs.vocab_size
    rows = 512 if GPU else 16
    loss = loss_of(inputs)
    tail = engine(rows * -(-v // 8) * 8 * 2 / 2**20)
    for needs in (ALL, NeedsGrad(hidden=True), NeedsGrad(weight=True)):
        selected.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gpu_plan, "GRANULE", rows)
            patch.setattr(gpu_plan, "FROZEN_TOKENS", rows)
            _, found = tail.statistics_and_gradients(inputs, loss, needs)
        assert len(selected) == 3
        assert_close(found, formula(inputs, loss, selected), DTYPE)


def test_a_flat_softmax_runs_dense_and_exact(device):
    inputs = make(device, HeadOptions(tail_eps=1e-6), peak=0.0)
    loss = loss_of(inputs)
    kept_share()
    _, found = engine().statistics_and_gradients(inputs, loss, NeedsGrad(True, True, False))
    assert kept_share() == 1
    tiles = None if GPU else epilogue.Tiles(bm=16, bn=64, bk=32, group=2)
    exact = epilogue.EpilogueStatistics(64.0, tiles=tiles)
    _, expected = exact.statistics_and_gradients(inputs, loss, NeedsGrad(True, True, False))
    for ours, right in zip(found, expected):
        assert torch.equal(ours, right)


@pytest.mark.parametrize("scale", [0.0, 100.0])
def test_logits_without_range_and_far_from_the_reference(device, selected, scale):
    """All logits 0, and logits of +-1000, where tiles have references of their own."""
    options = HeadOptions(tail_eps=0.2 if scale else 1e-3, logit_scale=scale)
    inputs = make(device, options)
    loss = loss_of(inputs)
    _, found = engine().statistics_and_gradients(inputs, loss, NeedsGrad(True, True, False))
    if scale:
        assert_close(found, formula(inputs, loss, selected), DTYPE)
    else:
        assert all((g == 0).all() for g in found)


def test_no_token_and_ignored_tokens_alone(device):
    inputs = make(device, HeadOptions(tail_eps=EPS))
    for ids in (torch.full_like(inputs.ids, -1), inputs.ids[:0]):
        few = inputs._replace(ids=ids, hidden=inputs.hidden[: len(ids)])
        _, found = engine().statistics_and_gradients(few, loss_of(few), NeedsGrad(True, True, False))
        assert all((g == 0).all() for g in found)


def test_parts_of_a_block():
    assert tail_tiles.part_tokens(8192, 1024) == 1024
    for rows in (1, 15 * 1024, 15 * 1024 + 1, 40000):
        part = tail_tiles.part_tokens(rows, 1024)
        assert math.ceil(rows / part) <= tail_tiles.MOST_PARTS


def test_public_losses_run_on_it(device, monkeypatch):
    """With all columns kept, values and gradients are the exact ones."""
    inputs = make(device, HeadOptions(), ignored=False)
    n = 1100 if GPU else 24
    hidden, weight = (x.detach().requires_grad_() for x in (inputs.hidden[:n], inputs.weight))
    ids = inputs.ids[:n]
    mixed = torch.linspace(-1, 1, n, device=device)
    ends = torch.tensor([0, n // 4, n // 2, n // 4 * 3, n], device=device)
    rows = {"cu_seqlens": ends, "reference_logps": torch.linspace(-9, -8, 4, device=device)}
    desirable, kl = torch.tensor([True, False] * 2, device=device), torch.tensor(0.1, device=device)

    def results(eps):
        stats = linear_token_stats(hidden, weight, ids, tail_eps=eps)
        values = {
            "cross-entropy": 3 * linear_cross_entropy(hidden, weight, ids, tail_eps=eps),
            "statistics": (stats.logp * mixed + stats.entropy * mixed**2 - stats.lse).sum(),
            "PPO": linear_ppo_loss(
                hidden, weight, ids, None, mixed, ids >= 0, entropy_coefficient=0.1, tail_eps=eps
            ).loss,
            "DPO": linear_dpo_loss(hidden, weight, ids, **rows, tail_eps=eps).loss,
            "KTO": linear_kto_loss(hidden, weight, ids, desirable, kl, **rows, tail_eps=eps).loss,
        }
        grads = {name: torch.autograd.grad(value, (hidden, weight)) for name, value in values.items()}
        logp = linear_logprobs(hidden, weight.detach(), ids, tail_eps=eps)
        grads["frozen"] = torch.autograd.grad((logp * mixed).sum(), hidden)
        return values, grads

    values, grads = results(None)
    tail = engine()
    if not GPU:
        monkeypatch.setattr(engines, "engine_for", lambda inputs, needs: tail)
        monkeypatch.setattr(engines, "overwrites_saved", lambda inputs, needs: True)
    monkeypatch.setattr(tail_tiles, "DENSE", 2.0)
    kept_share()
    found_values, found = results(1e-12)
    assert kept_share() == 1
    for name, expected in grads.items():
        if name in values:
            torch.testing.assert_close(found_values[name], values[name], rtol=1e-4, atol=1e-5)
        for ours, right in zip(found[name], expected):
            error = (ours.double() - right.double()).norm() / right.double().norm()
            assert error <= CLOSE[DTYPE], f"{name} is off by {error:.3g}"
