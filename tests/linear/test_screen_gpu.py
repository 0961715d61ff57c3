"""The screen's engine for GPUs, against exact statistics and against the tail's formula in fp64. Its kernels
run in Triton's interpreter without a GPU; see test_epilogue.py for the dtypes."""

import warnings

import pytest
import torch

from fastalign_kernels import dispatch, linear_cross_entropy, linear_dpo_loss, linear_token_stats
from fastalign_kernels.gemm_int8 import Coding, code_rows_ref, mm_int8_ref
from fastalign_kernels.linear import engines
from fastalign_kernels.linear.gpu import epilogue, tail_tiles
from fastalign_kernels.linear.gpu import plan as gpu_plan
from fastalign_kernels.linear.gpu import screen as screen_gpu
from fastalign_kernels.linear.gpu import screen_codes as screen_gpu_codes
from fastalign_kernels.linear.gpu import tail as tail_gpu
from fastalign_kernels.linear.inputs import NeedsGrad
from fastalign_kernels.linear.options import HeadOptions
from fastalign_kernels.linear.screen import screen_counts
from fastalign_kernels.linear.tail_columns import kept_share
from fastalign_kernels.linear.token_losses import TokenCrossEntropy
from fastalign_kernels.softmax.rows import Stat, row_stats_ref

from .test_tail_gpu import DTYPE, GPU, formula, loss_of, make, upstream

pytest.importorskip("triton", reason="triton is not installed", exc_type=ImportError)
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy's, in the interpreter
]

EPS = 2.0**-5
BOTH = NeedsGrad(hidden=True, weight=True)
OPTIONS = {
    "plain": HeadOptions(tail_eps=EPS, screen=True),
    "scale": HeadOptions(logit_scale=-0.7, temperature=1.3, tail_eps=EPS, screen=True),
}
# What an 8-bit error of 0.03 nats in every logit that is not kept comes to: nats of a statistic, and of a
# gradient's norm.
NEAR = {torch.float32: 2e-3, torch.float16: 4e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Parts of 32 tokens, tiles of 16 columns."""
    monkeypatch.setattr(screen_gpu, "LARGEST_NOISE", 1.0)  # 24 numbers in 8 bits are off by more than 576
    monkeypatch.setattr(screen_gpu, "LARGEST_SHARE", 1.0)  # of 299 columns many matter
    screen_counts()
    kept_share()
    if GPU:
        return
    rows = tail_tiles.RowTiles(rows=16, columns=64, warps=4, stages=1)
    for module, name, value in (
        (tail_tiles, "PART", 32),
        (tail_tiles, "TILE", 16),
        (screen_gpu, "UNKEPT_PART", 32),
        (screen_gpu, "REST", rows),
        (screen_gpu, "PROGRAMS", 4),
        (screen_gpu, "EXACT_TILES", screen_gpu.ExactTiles(bm=32, bk=16)),
        (screen_gpu, "MERGE_ROWS", 16),
        (screen_gpu, "FINISH_ROWS", 16),
        (tail_gpu, "COLLECT", rows),
        (tail_gpu, "COLLECT_FULL", rows),
        (tail_gpu, "PROGRAMS", 4),
        (tail_gpu, "TILES", {90: tail_gpu.TailTiles(16, 32, 16)}),
    ):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(screen_gpu.ScreenedEpilogue, "unkept_tokens", 32)


def engine(workspace_mib=64.0):
    if GPU:
        return screen_gpu.ScreenedEpilogue(workspace_mib)
    tiles = epilogue.Tiles(bm=16, bn=64, bk=32, group=2, parts=2, branch=False)
    return screen_gpu.ScreenedEpilogue(workspace_mib, tiles=tiles, screen_tiles=tiles)


@pytest.fixture
def selected(monkeypatch):
    """The tiles that were selected, and the tokens of their blocks."""
    blocks = []
    original = tail_tiles.select_tiles

    def spy(call, block, rows, *rest):
        kept, how_many = original(call, block, rows, *rest)
        blocks.append((kept, rows))
        return kept, how_many

    monkeypatch.setattr(tail_tiles, "select_tiles", spy)
    return blocks


def exact_stats(inputs):
    """Of the tokens that are not ignored, in fp64."""
    order = (inputs.ids >= 0).nonzero()[:, 0]
    logits = (inputs.hidden[order].double() @ inputs.weight.double().t())[None]
    return order, row_stats_ref(logits, inputs.ids[order], None, inputs.options.transform)


def assert_near(stats, inputs, allowed):
    order, truth = exact_stats(inputs)
    for stat in Stat:
        error = (stats[stat][order].double() - truth[stat]).abs().max()
        exact = stat in (Stat.MAX, Stat.TOP1)
        assert error <= (1e-4 if exact else allowed), f"{stat.name} is off by {error:.3g}"
    ignored = inputs.ids < 0
    assert (stats[:, ignored] == 0).all()


def assert_gradients(found, expected, allowed):
    for name, ours, right in zip(("hidden", "weight"), found, expected):
        error = (ours.double() - right).norm() / right.norm()
        assert error <= allowed, f"d {name} is off by {error:.3g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [64, 100, 192])
def test_codes_are_those_of_the_specification(device, dtype, size):
    if GPU and dtype == torch.float32:
        pytest.skip("on a GPU factors have 16 bits")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(70, size, generator=generator) + 2 * torch.randn(1, size, generator=generator)
    hidden = 3 * torch.randn(37, size, generator=generator)
    hidden[:, 5] *= 20
    hidden[3, 7], hidden[4] = torch.nan, 0.0
    weight, hidden = weight.to(device, dtype), hidden.to(device, dtype)
    coded = screen_gpu_codes.code_weight(weight)
    rows = screen_gpu_codes.code_hidden(hidden, coded)
    assert (coded.basis @ coded.basis.t() - torch.eye(16, device=device)).abs().max() < 1e-5
    width, _, matrix = coded.rotation
    coding = Coding(width, len(matrix), coded.basis.cpu())
    left = code_rows_ref(hidden.cpu(), coding, left=True)
    right = code_rows_ref(weight.cpu(), coding, left=False)
    good = torch.arange(37) != 3
    assert rows.scales[3].isnan() and rows.scales[4] == 0
    for ours, reference, row in ((rows, left, good), (coded.rows, right, slice(None))):
        difference = (ours.codes.cpu().int() - reference.codes.int())[row]
        assert difference.abs().max() <= 1 and (difference != 0).float().mean() < 0.01
        torch.testing.assert_close(ours.scales.cpu()[row], reference.scales[row], rtol=1e-5, atol=1e-9)
    low = rows.low.float() @ coded.rows.low.float().t()
    products = (rows.codes.long().cpu() @ coded.rows.codes.long().cpu().t()).to(device).float()
    products = products * rows.scales[:, None] * coded.rows.scales + low
    scale = hidden.float()[good].norm(dim=1)[:, None] * weight.float().norm(dim=1)
    assert ((products.cpu() - mm_int8_ref(left, right))[good].abs() <= 2e-3 * scale.cpu()).all()
    error = (products.double() - hidden.double() @ weight.double().t())[good]
    assert (error.abs() <= coded.bounds(rows)[good, None] * (1 + 1e-4) + 1e-4).all()
    noise = coded.noise(rows)[good].square().mean().sqrt()
    assert 0.5 < error.square().mean().sqrt() / noise < 1.5


@pytest.mark.parametrize("options", OPTIONS)
def test_statistics_without_gradients(device, options):
    inputs = make(device, OPTIONS[options])
    stats, saved = engine().statistics(inputs, NeedsGrad())
    counts = screen_counts()
    assert saved == [] and counts.exact_tokens == 0
    assert (
        counts.tokens == (inputs.ids >= 0).sum() and 0.02 < counts.exact_columns / stats.shape[1] / 299 < 0.6
    )
    assert_near(stats, inputs, NEAR[DTYPE])
    with pytest.raises(AssertionError, match="off by"):  # they are no exact logits
        assert_near(stats, inputs, 1e-5)


def test_the_largest_logit_is_exact_where_no_column_matters(device):
    """A flat softmax over the threshold: the target and what may be the largest are kept."""
    inputs = make(device, HeadOptions(screen=True), peak=0.0)
    inputs = inputs._replace(hidden=inputs.hidden * 0.1, options=HeadOptions(tail_eps=0.9, screen=True))
    stats, _ = engine().statistics(inputs, NeedsGrad())
    assert screen_counts().exact_tokens == 0
    assert_near(stats, inputs, NEAR[DTYPE])


@pytest.mark.parametrize("options", OPTIONS)
def test_a_token_loss_follows_the_formula(device, selected, options):
    inputs = make(device, OPTIONS[options])
    loss = loss_of(inputs, 0.1, 0.01)
    stats, found = engine().statistics_and_gradients(inputs, loss, BOTH)
    assert screen_counts().exact_tokens == 0 and 0.05 < kept_share() < 0.6
    assert_near(stats, inputs, NEAR[DTYPE])
    wide = TokenCrossEntropy(loss.scale.double(), 0.1, 0.01, inputs.vocab_size)
    assert_gradients(found, formula(inputs, wide, selected), NEAR[DTYPE])


@pytest.mark.parametrize("dtype", [DTYPE, torch.float16], ids=str)
def test_any_upstream_gradient_follows_the_formula(device, selected, dtype):
    inputs = make(device, OPTIONS["plain"], dtype)
    coefs = upstream(inputs, Stat.LOGP, Stat.ENTROPY, Stat.LSE)
    screened = engine()
    stats, saved = screened.statistics(inputs, BOTH)
    assert [x.shape for x in saved] == [x.shape for x in screened.empty_saved(inputs, BOTH)]
    found = screened.gradients(inputs, stats, saved, coefs(stats, slice(None)), BOTH)
    expected = formula(inputs, coefs, selected)
    assert_gradients(found, expected, NEAR[dtype])
    again = screened.gradients(inputs, stats, [], coefs(stats, slice(None)), BOTH)  # logits are recomputed
    assert_gradients(again, expected, NEAR[dtype])
    assert screen_counts().exact_tokens == 0


def test_blocks_add_up(device, selected, monkeypatch):
    """A workspace of 16 tokens: three blocks, summed in fp32; and under a frozen head."""
    inputs = make(device, OPTIONS["plain"])
    rows = 512 if GPU else 16
    loss = loss_of(inputs)
    screened = engine(rows * -(-inputs.vocab_size // 8) * 8 * 2 / 2**20)
    monkeypatch.setattr(gpu_plan, "GRANULE", rows)
    monkeypatch.setattr(gpu_plan, "FROZEN_TOKENS", rows)
    for needs in (BOTH, NeedsGrad(hidden=True)):
        selected.clear()
        _, found = screened.statistics_and_gradients(inputs, loss, needs)
        assert len(selected) == 3
        expected = formula(inputs, loss, selected)
        pairs = [(ours, right) for ours, right in zip(found, expected) if ours.numel()]
        assert_gradients(*zip(*pairs), NEAR[DTYPE])


HOSTILE = {
    "noisy": lambda x: x.hidden.mul_(1e4),
    "enormous coordinate": lambda x: x.hidden[1, :1].fill_(1e6),
    "NaN": lambda x: x.hidden[1, :1].fill_(torch.nan),
    "constant": lambda x: x.hidden.fill_(0.0),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_inputs_run_exact(device, monkeypatch, kind):
    """And have the tail's bits."""
    monkeypatch.setattr(screen_gpu, "LARGEST_NOISE", 0.25)
    if kind == "constant":  # all columns matter alike
        monkeypatch.setattr(screen_gpu, "LARGEST_SHARE", 1 / 32)
    inputs = make(device, OPTIONS["plain"], ignored=False)
    HOSTILE[kind](inputs)
    loss = loss_of(inputs)
    stats, found = engine().statistics_and_gradients(inputs, loss, BOTH)
    counts = screen_counts()
    assert counts.tokens == counts.exact_tokens == inputs.ids.numel()
    tail = tail_gpu.TailEpilogue(64.0, tiles=engine().tiles)
    unscreened = inputs._replace(options=HeadOptions(tail_eps=EPS))
    exact_stats, exact = tail.statistics_and_gradients(unscreened, loss, BOTH)
    assert torch.equal(stats.isnan(), exact_stats.isnan())
    assert torch.equal(stats.nan_to_num(), exact_stats.nan_to_num())
    for ours, right in zip(found[:2], exact):
        assert torch.equal(ours.nan_to_num(), right.nan_to_num())


def test_a_block_of_many_columns_runs_exact(device, monkeypatch):
    """Also where it was saved for the backward pass."""
    inputs = make(device, HeadOptions(tail_eps=1e-6, screen=True), peak=0.0)
    coefs = upstream(inputs, Stat.LOGP)
    results = []
    for new in (engine, lambda: tail_gpu.TailEpilogue(64.0, tiles=engine().tiles)):
        of = new()
        stats, saved = of.statistics(inputs, BOTH)
        results.append((stats, of.gradients(inputs, stats, saved, coefs(stats, slice(None)), BOTH)))
    assert screen_counts().exact_tokens == (inputs.ids >= 0).sum()
    assert torch.equal(results[0][0], results[1][0])
    for ours, right in zip(results[0][1][:2], results[1][1]):
        assert torch.equal(ours, right)


def test_no_token_and_ignored_tokens_alone(device):
    inputs = make(device, OPTIONS["plain"])
    for ids in (torch.full_like(inputs.ids, -1), inputs.ids[:0]):
        few = inputs._replace(ids=ids, hidden=inputs.hidden[: len(ids)])
        _, found = engine().statistics_and_gradients(few, loss_of(few), BOTH)
        assert all((g == 0).all() for g in found)
        stats, _ = engine().statistics(few, NeedsGrad())
        assert (stats == 0).all()


def test_open_columns_are_counted(device):
    inputs = make(device, OPTIONS["plain"]._replace(check=True))
    engine().statistics(inputs, NeedsGrad())
    assert screen_counts().open_columns > 0


def test_public_losses_run_on_it(device, monkeypatch):
    """Their values and gradients are near the exact ones."""
    inputs = make(device, HeadOptions(), ignored=False)
    n = 1104 if GPU else 32  # p of all columns fits e's memory where n is a multiple of 16
    hidden, weight = (x.detach().requires_grad_() for x in (inputs.hidden[:n], inputs.weight))
    ids = inputs.ids[:n]
    ends = torch.tensor([0, n // 4, n // 2, n // 4 * 3, n], device=device)
    rows = {"cu_seqlens": ends, "reference_logps": torch.linspace(-9, -8, 4, device=device)}

    def results(**options):
        values = {
            "cross-entropy": 3 * linear_cross_entropy(hidden, weight, ids, **options),
            "entropy": linear_token_stats(hidden, weight, ids, **options).entropy.sum(),
            "DPO": linear_dpo_loss(hidden, weight, ids, **rows, **options).loss,
        }
        return values, {name: torch.autograd.grad(x, (hidden, weight)) for name, x in values.items()}

    tail = {"tail_eps": 1e-6}
    values, grads = results(**tail)
    monkeypatch.setattr(gpu_plan, "LEAST_SCREENED_HIDDEN", 0)
    if not GPU:
        monkeypatch.setattr(engines, "engine_for", lambda inputs, needs: engine())
        monkeypatch.setattr(engines, "overwrites_saved", lambda inputs, needs: True)
        monkeypatch.setattr("fastalign_kernels.linear.inputs.no_screen", lambda *_: "")
    monkeypatch.setattr(screen_gpu, "DENSE", 2.0)
    screen_counts()
    found_values, found = results(screen=True, **tail)
    assert screen_counts().exact_tokens == 0
    for name, expected in grads.items():
        torch.testing.assert_close(found_values[name], values[name], rtol=2e-3, atol=2e-3)
        assert_gradients(found[name], [g.double() for g in expected], NEAR[DTYPE])


def test_its_first_use_warns_that_no_gpu_has_run_it():
    dispatch.warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert isinstance(engines._engine(engines.Selection("screen", 64.0)), screen_gpu.ScreenedEpilogue)
    assert [str(warning.message) for warning in caught] == [f"fastalign: {engines.UNTRIED}"]
