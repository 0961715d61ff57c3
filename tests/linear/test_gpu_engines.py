"""The head's GPU engines against fp64 and against token tiles, in tiny tiles: on a GPU, or in Triton's
interpreter."""

import pytest
import torch

from fastalign_kernels.softmax.rows import Stat, coefficients, row_grad_ref, row_stats_ref

pytest.importorskip(
    "fastalign_kernels.softmax.rows_triton", reason="triton is not installed", exc_type=ImportError
)

from fastalign_kernels import (  # noqa: E402
    linear_cross_entropy,
    linear_cross_entropy_stats,
    linear_dpo_loss,
    linear_kto_loss,
    linear_logprobs,
    linear_ppo_loss,
    linear_token_stats,
)
from fastalign_kernels.linear import engines  # noqa: E402
from fastalign_kernels.linear.engine import Engine, Gradients  # noqa: E402
from fastalign_kernels.linear.gpu import head_call, kept_softmax  # noqa: E402
from fastalign_kernels.linear.gpu import tokens as gpu_tokens  # noqa: E402
from fastalign_kernels.linear.gpu.kept_softmax import KeptSoftmax  # noqa: E402
from fastalign_kernels.linear.gpu.vocab_slices import VocabSlices  # noqa: E402
from fastalign_kernels.linear.inputs import HeadInputs, NeedsGrad  # noqa: E402
from fastalign_kernels.linear.options import HeadOptions  # noqa: E402
from fastalign_kernels.linear.token_losses import TokenCrossEntropy  # noqa: E402
from fastalign_kernels.linear.token_tiles import TOKEN_TILES  # noqa: E402
from fastalign_kernels.scale_triton import scale_in_place  # noqa: E402
from fastalign_kernels.softmax import tile_rows_triton  # noqa: E402
from tests.linear.gpu_tiles import CLOSE, MARKS  # noqa: E402

N, H, V = 13, 16, 300
MIB = 2**20
# bytes that hold all tokens; blocks of 8 tokens in 16 bits; slices of 112 columns
ENGINES = {
    "all kept": (KeptSoftmax, 1.0),
    "in blocks": (KeptSoftmax, (4 * 4 + 8 * 2) * V / MIB),
    "slices": (VocabSlices, N * (6 * 112 + 2 * H) / MIB),
}
PLAIN = HeadOptions()
ALL = HeadOptions(logit_scale=0.7, softcap=5.0, temperature=1.3)
CASES = [
    (torch.float32, ALL),
    (torch.bfloat16, ALL),
    (torch.bfloat16, HeadOptions(lean=True)),
    (torch.float16, PLAIN),
]
pytestmark = MARKS


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    make, workspace_mib = ENGINES[request.param]
    return make(workspace_mib)


def make(device, dtype=torch.float32, options=PLAIN, ignored=(0, 5, 12), n_tokens=N) -> HeadInputs:
    """Inputs with a bias if there are options; one ignored token's hidden state is NaN, which nobody may
    read."""
    generator = torch.Generator().manual_seed(n_tokens)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    hidden, weight = normal(n_tokens, H), normal(V, H)
    ids = torch.randint(0, V, (n_tokens,), generator=generator)
    ids[list(ignored)] = -1
    if ignored:
        hidden[ignored[-1]] = float("nan")
    bias = normal(V) if options != HeadOptions(lean=options.lean) else None
    return HeadInputs(hidden, weight, ids.to(device), bias, options)


def truth(inputs: HeadInputs, coefficients_of) -> tuple[torch.Tensor, Gradients]:
    """Statistics and gradients in fp64."""
    hidden, weight, ids, bias, options = inputs[:5]
    x, w = hidden.nan_to_num().double(), weight.double()
    b = None if bias is None else bias.double()
    logits = (x @ w.t())[None]
    stats = row_stats_ref(logits, ids, b, options.transform)
    grad = row_grad_ref(logits, ids, b, options.transform, stats, coefficients_of(stats))[0]
    nothing = grad.new_empty(0)  # there is no adapter
    return stats, Gradients(grad @ w, grad.t() @ x, grad.sum(0), nothing, nothing)


def assert_close(found: Gradients, expected: Gradients, dtype: torch.dtype) -> None:
    for name, ours, right in zip(Gradients._fields, found, expected):
        if ours.numel():
            error = (ours.double() - right).norm() / right.norm().clamp(min=1e-12)
            assert error <= CLOSE[dtype], f"d {name} is off by {error:.3g}"


def cross_entropy(inputs: HeadInputs) -> TokenCrossEntropy:
    scale = torch.linspace(-1, 2, inputs.ids.numel(), device=inputs.ids.device)
    smoothing = 0.0 if inputs.options.lean else 0.1
    return TokenCrossEntropy(scale, smoothing, 0.01, V)


def needs_of(inputs: HeadInputs) -> NeedsGrad:
    return NeedsGrad(hidden=True, weight=True, bias=inputs.bias is not None)


@pytest.mark.parametrize("dtype, options", CASES, ids=str)
def test_a_token_loss(device, engine, dtype, options):
    """In one launch, by a function of the statistics, and under a frozen head."""
    inputs = make(device, dtype, options)
    loss, needs = cross_entropy(inputs), needs_of(inputs)
    stats, expected = truth(inputs, lambda table: loss(table, slice(None)))
    table, found = engine.statistics_and_gradients(inputs, loss, needs)
    rows = [Stat.LOGP, Stat.LSE] if options.lean else list(Stat)
    torch.testing.assert_close(table[rows].double(), stats[rows], rtol=1e-5, atol=2e-5)
    assert_close(found, expected, dtype)
    again, given = engine.statistics_and_gradients(inputs, lambda s, t: loss(s, t), needs)
    torch.testing.assert_close(again, table, rtol=1e-6, atol=1e-6)
    assert_close(given, expected, dtype)
    frozen = engine.statistics_and_gradients(inputs, loss, NeedsGrad(hidden=True))[1]
    assert frozen.weight.numel() == 0 and frozen.bias.numel() == 0
    assert_close(frozen, expected, dtype)


@pytest.mark.parametrize("dtype, options", CASES, ids=str)
def test_any_upstream_gradient_and_a_second_backward(device, engine, dtype, options):
    inputs = make(device, dtype, options)
    needs = needs_of(inputs)
    upstream = torch.randn(len(Stat), N, generator=torch.Generator().manual_seed(1)).to(device)
    if options.lean:
        upstream[[Stat.MEAN_LOGP, Stat.ENTROPY]] = 0
    stats, expected = truth(inputs, lambda table: coefficients(upstream.double(), table, V))
    table, saved = engine.statistics(inputs, needs)
    assert [x.shape for x in saved] == [x.shape for x in engine.empty_saved(inputs, needs)]
    given = coefficients(upstream, table, V)
    assert_close(engine.gradients(inputs, table, saved, given, needs), expected, dtype)
    assert_close(engine.gradients(inputs, table, [], given, needs), expected, dtype)
    assert_close(engine.gradients(inputs, table, [], given, NeedsGrad(hidden=True)), expected, dtype)
    without, nothing = engine.statistics(inputs, NeedsGrad())
    assert not nothing
    torch.testing.assert_close(without, table, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", [*ENGINES, "token tiles"])
def test_a_wide_gradient_of_the_hidden_states_is_not_rounded(device, name):
    """linear_logprobs of a frozen head multiplies it by the upstream gradient, and rounds the product."""
    make_engine, workspace_mib = ENGINES.get(name, (lambda _: TOKEN_TILES, 0.0))
    engine = make_engine(workspace_mib)
    inputs = make(device, torch.float16, ignored=(3,))
    loss = cross_entropy(inputs)
    rounded = engine.statistics_and_gradients(inputs, loss, NeedsGrad(hidden=True))[1].hidden
    wide = inputs._replace(options=inputs.options._replace(wide=True))
    found = engine.statistics_and_gradients(wide, loss, NeedsGrad(hidden=True))[1].hidden
    assert found.dtype == torch.float32 and not torch.equal(found, rounded.float())
    torch.testing.assert_close(found.half(), rounded, rtol=0, atol=0)


@pytest.mark.parametrize("captured", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_one_pass_under_graph_capture(device, engine, monkeypatch, captured, dtype):
    """There ignored tokens keep their places; the other pass takes the order that was saved."""
    inputs = make(device, dtype, ignored=(0, 3, 4))
    needs = needs_of(inputs)
    upstream = torch.randn(len(Stat), N, generator=torch.Generator().manual_seed(1)).to(device)
    upstream[[Stat.MEAN_LOGP, Stat.ENTROPY]] = 0
    _, expected = truth(inputs, lambda table: coefficients(upstream.double(), table, V))
    now = {"captured": captured == "forward"}
    monkeypatch.setattr(gpu_tokens, "capturing", lambda tensor: now["captured"])
    table, saved = engine.statistics(inputs, needs)
    now["captured"] = captured == "backward"
    found = engine.gradients(inputs, table, saved, coefficients(upstream, table, V), needs)
    assert_close(found, expected, dtype)


@pytest.mark.parametrize("n_tokens, ignored", [(0, ()), (1, ()), (9, range(9)), (9, range(8)), (9, ())])
def test_few_tokens(device, engine, n_tokens, ignored):
    inputs = make(device, ignored=tuple(ignored), n_tokens=n_tokens)
    loss, needs = cross_entropy(inputs), needs_of(inputs)
    stats, expected = truth(inputs, lambda table: loss(table, slice(None)))
    table, found = engine.statistics_and_gradients(inputs, loss, needs)
    torch.testing.assert_close(table.double(), stats, rtol=1e-5, atol=2e-5)
    assert_close(found, expected, torch.float32)
    table, saved = engine.statistics(inputs, needs)
    found = engine.gradients(inputs, table, saved, loss(table, slice(None)), needs)
    assert_close(found, expected, torch.float32)


def test_a_tile_lies_where_dlogits_will_come(device):
    """26 tokens are kept and a tile is of 4, but where 8 fit behind what is kept, 8 go together."""
    inputs = make(device, torch.float16, HeadOptions(lean=True), ignored=(3,), n_tokens=26)
    loss = cross_entropy(inputs)
    expected = truth(inputs, lambda table: loss(table, slice(None)))[1]
    engine = KeptSoftmax((4 * 4 + 28 * 2) * V / MIB)
    assert engine.sizes(inputs, needs_of(inputs))[:2] == (4, 26)
    found = engine.statistics_and_gradients(inputs, loss, needs_of(inputs))[1]
    assert_close(found, expected, torch.float16)


def test_launches_and_gemms_of_a_call(device, monkeypatch):
    """One row kernel and one GEMM a tile, then a GEMM each for dX and dW; nothing else of V columns."""
    launches, gemms = [], []
    original, product = tile_rows_triton._tile_rows, kept_softmax.product

    def launched(*args, **kwargs):
        launches.append(kwargs["write"])
        original(*args, **kwargs)

    def multiplied(left, right, out, **kwargs):
        gemms.append(tuple(out.shape))
        product(left, right, out, **kwargs)

    monkeypatch.setattr(tile_rows_triton, "_tile_rows", launched)
    for module in (kept_softmax, head_call):
        monkeypatch.setattr(module, "product", multiplied)
    inputs = make(device, torch.float16, HeadOptions(lean=True), ignored=())
    needs = needs_of(inputs)
    KeptSoftmax(1.0).statistics_and_gradients(inputs, cross_entropy(inputs), needs)
    assert launches == [tile_rows_triton.TOKEN_LOSS.value] * 2
    assert gemms == [(8, V), (5, V), (N, H), (V, H)]
    launches.clear()
    stats, saved = KeptSoftmax(1.0).statistics(inputs, needs)
    KeptSoftmax(1.0).gradients(inputs, stats, saved, torch.ones(4, N, device=device), needs)
    assert launches == [tile_rows_triton.SOFTMAX.value] * 2, "the kept softmax is not computed again"
    assert gemms[4:] == gemms[:4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_an_upstream_gradient_scales_in_place(device, dtype):
    x = torch.randn(5000, dtype=torch.float64).to(dtype).to(device)
    for factor in (1.0, -0.37):
        scaled = x.clone()
        scale_in_place(scaled, torch.tensor(factor, dtype=torch.float64, device=device))
        wide = x.double() if dtype == torch.float64 else x.float()
        torch.testing.assert_close(scaled, (wide * factor).to(dtype), rtol=0, atol=0)


def test_fp32_master_weights_get_an_fp32_gradient(device, engine):
    inputs = make(device, torch.bfloat16)
    inputs = inputs._replace(weight=inputs.weight.float())
    loss = cross_entropy(inputs)
    expected = truth(inputs, lambda table: loss(table, slice(None)))[1]
    found = engine.statistics_and_gradients(inputs, loss, needs_of(inputs))[1]
    assert found.weight.dtype == torch.float32 and found.hidden.dtype == torch.bfloat16
    assert_close(found, expected, torch.bfloat16)


def test_a_sure_token_keeps_its_gradient_when_the_softmax_is_kept(device):
    """P of the target rounds to 1 in 16 bits; P - 1 comes from the statistics."""
    inputs = make(device, torch.bfloat16, ignored=())
    scale = 6 / (inputs.hidden.float() ** 2).sum(1).sqrt()
    weight = inputs.weight.clone()
    ids = torch.arange(N, device=device)
    weight[:N] = (inputs.hidden.float() * scale[:, None]).to(torch.bfloat16)
    inputs = inputs._replace(weight=weight, ids=ids)
    loss = TokenCrossEntropy(torch.ones(N, device=device), 0.0, 0.0, V)
    expected = truth(inputs, lambda table: loss(table, slice(None)))[1]
    engine = KeptSoftmax(1.0)
    table, saved = engine.statistics(inputs, needs_of(inputs))
    assert (table[Stat.LOGP] > -1e-2).sum() > 2
    found = engine.gradients(inputs, table, saved, loss(table, slice(None)), needs_of(inputs))
    assert_close(found, expected, torch.bfloat16)


@pytest.mark.parametrize("name", ["all kept", "in blocks", "slices"])
def test_every_public_loss_runs_on_it(device, monkeypatch, name):
    """Values and gradients are those of token tiles."""
    inputs = make(device, ignored=(3,), n_tokens=12)
    leaves = [x.detach().nan_to_num().requires_grad_() for x in (inputs.hidden, inputs.weight)]
    hidden, weight = leaves
    ids = torch.where(inputs.ids < 0, -100, inputs.ids)
    mixed = torch.linspace(-1, 1, 12, device=device)
    rows = {"cu_seqlens": torch.tensor([0, 4, 6, 10, 12], device=device)}
    reference = rows | {"reference_hidden": hidden.detach(), "reference_weight": weight.detach() * 0.9}
    desirable = torch.tensor([True, False, True, False], device=device)
    kl = torch.tensor(0.1, device=device)

    def values() -> dict[str, torch.Tensor]:
        stats = linear_token_stats(hidden, weight, ids)
        shared = linear_cross_entropy_stats(hidden, weight, ids, label_smoothing=0.1, z_loss=1e-2)
        return {
            "cross-entropy": linear_cross_entropy(hidden, weight, ids) * 3,
            "cross-entropy of tokens": (
                linear_cross_entropy(hidden, weight, ids, reduction="none") * mixed
            ).sum(),
            "cross-entropy, statistics": shared.loss + shared.entropy.sum() * 0,
            "log-probs": (linear_logprobs(hidden, weight, ids) * mixed).sum(),
            "statistics": (stats.logp * mixed + stats.entropy * mixed**2 - stats.lse).sum(),
            "PPO": linear_ppo_loss(hidden, weight, ids, None, mixed, ids >= 0, entropy_coefficient=0.1).loss,
            "DPO": linear_dpo_loss(hidden, weight, ids, **reference).loss,
            "KTO": linear_kto_loss(hidden, weight, ids, desirable, kl, **reference).loss,
        }

    def results() -> dict[str, list[torch.Tensor]]:
        return {
            name: [value.detach(), *torch.autograd.grad(value, leaves)] for name, value in values().items()
        }

    def twice() -> dict[str, list[torch.Tensor]]:
        """A second backward: what was saved for the first is overwritten."""
        value = values()["log-probs"]
        torch.autograd.grad(value, leaves, retain_graph=True)
        return {"log-probs": [value.detach(), *torch.autograd.grad(value, leaves)]}

    expected = results()
    # fp32: 8 of 12 tokens, or 152 of 300 columns
    workspace_mib = {"all kept": 1.0, "in blocks": 8 * 4 * V / MIB, "slices": 12 * 4 * 152 / MIB}[name]
    selected = engines.Selection("vocab_slices" if name == "slices" else "kept_softmax", workspace_mib)
    calls = []

    def forced(inputs, needs):
        calls.append(selected)
        return selected

    monkeypatch.setattr(engines, "select", forced)
    for loss, found in (results() | twice()).items():
        for ours, right in zip(found, expected[loss]):
            torch.testing.assert_close(
                ours, right, rtol=2e-4, atol=2e-5, msg=lambda m, loss=loss: f"{loss}: {m}"
            )
    assert calls
