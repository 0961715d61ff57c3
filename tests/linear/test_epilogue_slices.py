"""The engine of vocabulary slices with the statistics in the GEMM's epilogue; see test_epilogue.py."""

import pytest
import torch

from fastalign_kernels.linear.gpu import host_count
from fastalign_kernels.linear.gpu import plan as gpu_plan
from fastalign_kernels.linear.gpu.epilogue_slices import EpilogueSlices
from fastalign_kernels.linear.inputs import HeadInputs, NeedsGrad
from fastalign_kernels.linear.options import HeadOptions
from fastalign_kernels.linear.token_losses import TokenCrossEntropy
from fastalign_kernels.softmax.rows import Stat
from tests.linear.epilogue_cases import ALL, OPTIONS, TILES, check, make, upstream

pytest.importorskip("triton", reason="triton is not installed", exc_type=ImportError)
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy's, in the interpreter
]
WITH_BIAS = NeedsGrad(hidden=True, weight=True, bias=True)


@pytest.fixture(params=[48, 123])
def engine(request, monkeypatch):
    """Slices of 48 of 123 columns, whose last is smaller and is no whole tile; or one slice."""
    monkeypatch.setattr(EpilogueSlices, "width", lambda *_: request.param)
    return EpilogueSlices(tiles=TILES)


@pytest.mark.parametrize("options", ["plain", "scale"])
def test_loss_whose_coefficients_follow_from_a_token(no_worse_than_eager, device, engine, options):
    inputs = HeadInputs(*make(device), None, OPTIONS[options])
    coefs = upstream(inputs, Stat.LOGP, Stat.LSE)
    stats, gradients = engine.statistics_and_gradients(inputs, coefs, ALL)
    check(no_worse_than_eager, inputs, coefs, stats, gradients)


def test_gradients_of_every_statistic(no_worse_than_eager, device, engine):
    """Coefficients with a plogp and a uniform part; nothing is saved for them."""
    hidden, weight, ids = make(device)
    bias = torch.linspace(-1, 1, weight.shape[0], device=device)
    inputs = HeadInputs(hidden, weight, ids, bias, OPTIONS["scale"])
    coefs = upstream(inputs, Stat.LOGP, Stat.MEAN_LOGP, Stat.ENTROPY, Stat.LSE)
    stats, saved = engine.statistics(inputs, WITH_BIAS)
    assert saved == []
    gradients = engine.gradients(inputs, stats, saved, coefs(stats, slice(None)), WITH_BIAS)
    check(no_worse_than_eager, inputs, coefs, stats, gradients)


@pytest.mark.parametrize("scale", [0.001, 60.0])
def test_logits_far_from_the_sample(no_worse_than_eager, device, engine, scale):
    inputs = HeadInputs(*make(device, scale=scale), None, HeadOptions())
    coefs = upstream(inputs, Stat.LOGP)
    stats, gradients = engine.statistics_and_gradients(inputs, coefs, ALL)
    check(no_worse_than_eager, inputs, coefs, stats, gradients)


def test_label_smoothing_counts_the_whole_vocabulary(no_worse_than_eager, device, engine):
    hidden, weight, ids = make(device)
    inputs = HeadInputs(hidden, weight, ids, None, HeadOptions())
    loss = TokenCrossEntropy(torch.ones(ids.numel(), device=device), 0.2, 0.01, weight.shape[0])
    stats, gradients = engine.statistics_and_gradients(inputs, loss, ALL)
    check(no_worse_than_eager, inputs, loss, stats, gradients)


@pytest.mark.parametrize("needs", [NeedsGrad(hidden=True), NeedsGrad(weight=True)], ids=str)
def test_one_gradient_alone(no_worse_than_eager, device, engine, needs):
    inputs = HeadInputs(*make(device), None, HeadOptions())
    coefs = upstream(inputs, Stat.LOGP)
    stats, gradients = engine.statistics_and_gradients(inputs, coefs, needs)
    check(no_worse_than_eager, inputs, coefs, stats, gradients)
    assert bool(gradients.hidden.numel()) == needs.hidden and bool(gradients.weight.numel()) == needs.weight


@pytest.mark.parametrize("kept", [0, 1])
def test_few_tokens(device, engine, kept):
    hidden, weight, ids = make(device, N=5, ignored=False)
    ids[kept:] = -1
    inputs = HeadInputs(hidden, weight, ids, None, HeadOptions())
    stats, gradients = engine.statistics_and_gradients(inputs, upstream(inputs, Stat.LOGP), ALL)
    assert not stats[:, kept:].any() and not gradients.hidden[kept:].any()
    assert bool(gradients.weight.any()) == bool(kept)


def test_under_graph_capture(no_worse_than_eager, device, engine, monkeypatch):
    """There ignored tokens keep their places."""
    monkeypatch.setattr(host_count, "capturing", lambda tensor: True)
    inputs = HeadInputs(*make(device), None, HeadOptions())
    coefs = upstream(inputs, Stat.LOGP)
    stats, gradients = engine.statistics_and_gradients(inputs, coefs, ALL)
    check(no_worse_than_eager, inputs, coefs, stats, gradients)


def call(workspace_mib, **changed):
    given = gpu_plan.GpuCall(8192, 4096, 151936, torch.bfloat16, workspace_mib, True, True, architecture=90)
    return given._replace(**changed)


@pytest.mark.parametrize(
    "given, engine",
    [
        (call(300), "epilogue_slices"),
        (call(200), "vocab_slices"),  # the hidden states and dX's sum alone take 192 MiB
        (call(300, head_grad=False), "epilogue"),
        (call(100, hidden_size=576, head_grad=False), "epilogue_slices"),
        (call(300, architecture=80), "vocab_slices"),
        (call(300, dtype=torch.float16), "vocab_slices"),
        (call(300, cap=30.0), "vocab_slices"),
        (call(300, lora_rank=16), "vocab_slices"),
    ],
)
def test_the_engine_of_a_call(given, engine):
    assert gpu_plan.select_engine(given) == engine


def test_the_width_fills_the_workspace():
    """Gathered, scaled, dX's sum beyond dX: 64 MiB each; of the rest a column takes 16 KiB and its tiles 256
    bytes."""
    assert gpu_plan.epilogue_slice_width(call(300)) == (300 - 3 * 64) * 2**20 // (8192 * 2 + 256) // 256 * 256
