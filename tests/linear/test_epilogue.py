"""The engine with the statistics in the GEMM's epilogue, against the fp64 specification of the row kernels.

Its kernels run in Triton's interpreter without a GPU. That reads bf16 tensor descriptors wrongly, so the
tests run in fp32, which takes bf16's way through the engine, and in fp16, which takes the other."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastalign_kernels import logits
from fastalign_kernels.linear.gpu import epilogue, epilogue_call, epilogue_gradients, host_count
from fastalign_kernels.linear.gpu import plan as gpu_plan
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


@pytest.mark.parametrize("options", OPTIONS)
def test_loss_whose_coefficients_follow_from_a_token(no_worse_than_eager, device, options):
    inputs = HeadInputs(*make(device), None, OPTIONS[options])
    engine = epilogue.EpilogueStatistics(tiles=TILES)
    coefs = upstream(inputs, Stat.LOGP, Stat.LSE)
    stats, gradients = engine.statistics_and_gradients(inputs, coefs, ALL)
    check(no_worse_than_eager, inputs, coefs, stats, gradients)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_of_every_statistic(no_worse_than_eager, device, options):
    """Rows whose coefficients have a plogp or uniform part take a pass over e."""
    hidden, weight, ids = make(device)
    bias = torch.linspace(-1, 1, weight.shape[0], device=device)
    inputs = HeadInputs(hidden, weight, ids, bias, OPTIONS[options])
    needs = NeedsGrad(hidden=True, weight=True, bias=True)
    engine = epilogue.EpilogueStatistics(tiles=TILES)
    coefs = upstream(inputs, Stat.LOGP, Stat.MEAN_LOGP, Stat.ENTROPY, Stat.LSE)
    stats, saved = engine.statistics(inputs, needs)
    gradients = engine.gradients(inputs, stats, saved, coefs(stats, slice(None)), needs)
    check(no_worse_than_eager, inputs, coefs, stats, gradients)


@pytest.mark.parametrize("scale", [0.001, 4.0, 60.0])
def test_logits_far_from_the_reference(no_worse_than_eager, device, scale):
    """With logits of +-1000 most rows have tiles beyond the window, which take references of their own."""
    inputs = HeadInputs(*make(device, scale=scale), None, HeadOptions())
    engine = epilogue.EpilogueStatistics(tiles=TILES)
    coefs = upstream(inputs, Stat.LOGP)
    stats, gradients = engine.statistics_and_gradients(inputs, coefs, ALL)
    check(no_worse_than_eager, inputs, coefs, stats, gradients)


def test_gradients_recompute_what_is_not_saved(no_worse_than_eager, device):
    """As in a second backward: the first has used up what was saved."""
    inputs = HeadInputs(*make(device), None, HeadOptions())
    engine = epilogue.EpilogueStatistics(tiles=TILES)
    stats, _ = engine.statistics(inputs, ALL)
    coefs = upstream(inputs, Stat.ENTROPY)
    gradients = engine.gradients(inputs, stats, [], coefs(stats, slice(None)), ALL)
    check(no_worse_than_eager, inputs, coefs, stats, gradients)


@pytest.mark.parametrize("label_smoothing, z_loss", [(0.0, 0.0), (0.2, 0.01)])
def test_cross_entropy_computes_its_coefficients_in_the_kernel(device, label_smoothing, z_loss):
    """The same gradients as by the table of coefficients; lean leaves two statistics 0."""
    hidden, weight, ids = make(device)
    scale = torch.rand(ids.numel(), generator=torch.Generator().manual_seed(2)).to(device)
    loss = TokenCrossEntropy(scale, label_smoothing, z_loss, weight.shape[0])
    engine = epilogue.EpilogueStatistics(tiles=TILES)
    inputs = HeadInputs(hidden, weight, ids, None, HeadOptions())
    lean = inputs._replace(options=HeadOptions(lean=True))
    stats, expected_gradients = engine.statistics_and_gradients(inputs, lambda s, t: loss(s, t), ALL)
    lean_stats, gradients = engine.statistics_and_gradients(lean, loss, ALL)
    for ours, other in zip(gradients[:2], expected_gradients[:2]):
        eps = torch.finfo(ours.dtype).eps  # a last digit of a coefficient may differ
        torch.testing.assert_close(ours, other, rtol=8 * eps, atol=8 * eps * other.abs().max().item())
    unused = [Stat.MEAN_LOGP, Stat.ENTROPY]
    assert not lean_stats[unused].any()
    stats[unused] = 0
    assert torch.equal(lean_stats, stats)


def test_a_mean_is_written_when_the_logits_are_queued(device, monkeypatch):
    """The same gradients as of a scale that was there before; it is written after the forward kernel."""
    inputs = HeadInputs(*make(device), None, HeadOptions(lean=True))
    scale = logits.loss_scale(inputs.ids >= 0, "mean", None, None, torch.float32)
    before = TokenCrossEntropy(scale, 0.0, 0.0, inputs.vocab_size)
    memory = torch.full_like(scale, torch.nan)
    later = TokenCrossEntropy.of_mean(memory, inputs.ids, 0.0, 0.0, inputs.vocab_size)
    launch, empty_at = epilogue_call.launch, {}

    def noted(kernel, *rest, **constants):
        empty_at[kernel] = bool(memory.isnan().all())
        launch(kernel, *rest, **constants)

    monkeypatch.setattr(epilogue_call, "launch", noted)
    engine = epilogue.EpilogueStatistics(tiles=TILES)
    expected = engine.statistics_and_gradients(inputs, before, ALL)[1]
    found = engine.statistics_and_gradients(inputs, later, ALL)[1]
    assert torch.equal(found.hidden, expected.hidden) and torch.equal(found.weight, expected.weight)
    assert empty_at["forward_kernel"] and not empty_at["dlogits_kernel"]


@pytest.mark.parametrize("tiles", [TILES._replace(parts=2, branch=False), TILES._replace(flatten=False)])
def test_tilings_agree(device, tiles):
    inputs = HeadInputs(*make(device), None, HeadOptions())
    one, other = (
        epilogue.EpilogueStatistics(tiles=t).statistics(inputs, NeedsGrad())[0] for t in (TILES, tiles)
    )
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_blocks(no_worse_than_eager, device):
    """A workspace for 256 tokens of 600, of which 400 are not ignored: two blocks, and one not reached."""
    hidden, weight, ids = make(device, N=600, H=16, V=40)
    inputs = HeadInputs(hidden, weight, ids, None, HeadOptions(workspace_mib=0.01))
    engine = epilogue.EpilogueStatistics(tiles=TILES)
    coefs = upstream(inputs, Stat.LOGP)
    stats, gradients = engine.statistics_and_gradients(inputs, coefs, ALL)
    check(no_worse_than_eager, inputs, coefs, stats, gradients)
    table, saved = engine.statistics(inputs, ALL)
    assert torch.equal(table, stats) and saved[0].shape[0] == 256
    later = engine.gradients(inputs, table, saved, coefs(table, slice(None)), ALL)
    check(no_worse_than_eager, inputs, coefs, table, later)


@pytest.mark.parametrize("needs", [NeedsGrad(hidden=True), NeedsGrad(weight=True)], ids=str)
def test_one_gradient_alone(no_worse_than_eager, device, needs):
    inputs = HeadInputs(*make(device), None, HeadOptions())
    coefs = upstream(inputs, Stat.LOGP)
    engine = epilogue.EpilogueStatistics(tiles=TILES)
    stats, gradients = engine.statistics_and_gradients(inputs, coefs, needs)
    check(no_worse_than_eager, inputs, coefs, stats, gradients)
    assert bool(gradients.hidden.numel()) == needs.hidden and bool(gradients.weight.numel()) == needs.weight


def test_without_gradients_nothing_is_kept(no_worse_than_eager, device):
    inputs = HeadInputs(*make(device), None, HeadOptions())
    stats, saved = epilogue.EpilogueStatistics(tiles=TILES).statistics(inputs, NeedsGrad())
    assert saved == [] and inputs.hidden.isnan().any()
    check(no_worse_than_eager, inputs, upstream(inputs), stats, ())


@pytest.mark.parametrize("kept", [0, 1])
def test_few_tokens(device, kept):
    hidden, weight, ids = make(device, N=5, ignored=False)
    ids[kept:] = -1
    inputs = HeadInputs(hidden, weight, ids, None, HeadOptions())
    coefs = upstream(inputs, Stat.LOGP)
    stats, gradients = epilogue.EpilogueStatistics(tiles=TILES).statistics_and_gradients(inputs, coefs, ALL)
    assert not stats[:, kept:].any() and not gradients.hidden[kept:].any()
    assert bool(gradients.weight.any()) == bool(kept)


@pytest.mark.parametrize(
    "n_tokens, workspace_mib, head_grad, tokens",
    [
        (8192, 2560.0, True, 8192),
        (16384, 2560.0, True, 8192),
        (10000, 2560.0, True, 5120),
        (100, 2560.0, True, 100),
        (8192, 1.0, True, 256),
        (8192, 2560.0, False, 2048),  # a frozen head
    ],
)
def test_tokens_of_a_block(n_tokens, workspace_mib, head_grad, tokens):
    call = gpu_plan.GpuCall(n_tokens, 4096, 151936, torch.bfloat16, workspace_mib, True, head_grad)
    assert gpu_plan.epilogue_tokens(call) == tokens


@pytest.mark.parametrize("vocab_size, tokens", [(49152, 4096), (151936, 2048), (248320, 2048)])
def test_a_frozen_heads_blocks_are_few_where_the_vocabulary_is_small(vocab_size, tokens):
    call = gpu_plan.GpuCall(8192, 576, vocab_size, torch.bfloat16, 2560.0, True, False)
    assert gpu_plan.epilogue_tokens(call) == tokens


def test_all_is_saved_where_it_fits():
    """16,384 tokens take 4,748 MiB; with a workspace that the call gives, nothing is added to it."""
    call = gpu_plan.GpuCall(16384, 2048, 151936, torch.bfloat16, 2560.0, True, True)
    assert gpu_plan.epilogue_saved(call) == 8192
    assert gpu_plan.epilogue_saved(call._replace(saved_mib=5120.0)) == 16384
    assert gpu_plan.epilogue_saved(call._replace(saved_mib=4096.0)) == 8192


def test_serves_what_it_can():
    def served(dtype=torch.bfloat16, N=1024, H=64, options=OPTIONS["plain"], architecture=90, V=512):
        hidden, weight = torch.empty(N, H, dtype=dtype), torch.empty(V, H, dtype=dtype)
        inputs = HeadInputs(hidden, weight, torch.zeros(N, dtype=torch.int64), None, options)
        return gpu_plan.epilogue_serves(inputs.gpu_call(ALL, 2560.0, architecture=architecture))

    assert served() and served(torch.float16) and served(options=HeadOptions(softcap=30.0))
    assert not served(torch.float32) and not served(torch.float64)
    assert not served(N=1023)
    assert not served(H=60), "TMA takes rows of whole 16 bytes"
    assert not served(architecture=80) and not served(architecture=100), "not measured"
    assert not served(options=HeadOptions(tail_eps=1e-4))
    assert not served(options=HeadOptions(softcap=30.0, temperature=0.5))


@pytest.mark.parametrize("options", ["plain", "softcap"])
def test_fp16_rows_take_a_pass_each(no_worse_than_eager, device, options, monkeypatch):
    if device == "cpu":  # our GEMMs there have fp32 results only
        monkeypatch.setattr(
            epilogue_gradients, "mm", lambda left, right, out: out.copy_(left.float() @ right.float())
        )
    inputs = HeadInputs(*make(device, torch.float16), None, OPTIONS[options])
    coefs = upstream(inputs, Stat.LOGP)
    engine = epilogue.EpilogueStatistics(tiles=TILES)
    stats, gradients = engine.statistics_and_gradients(inputs, coefs, ALL)
    check(no_worse_than_eager, inputs, coefs, stats, gradients)


class _Operations(TorchDispatchMode):
    """Notes what ATen operations write: each is a launch on a GPU."""

    def __init__(self, names):
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.partition(".")[0]
        if name not in ("empty", "new_empty", "empty_like", "slice", "t", "detach", "_local_scalar_dense"):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("ignored", [False, True])
def test_launches_of_a_call(device, monkeypatch, ignored):
    """5 kernels and 2 GEMMs, whether tokens are ignored or not: no copies, no fills, no index_put."""
    names: list[str] = []
    monkeypatch.setattr(epilogue_call, "launch", lambda kernel, *_, **constants: names.append(kernel))
    inputs = HeadInputs(*make(device, ignored=ignored), None, HeadOptions(lean=True))
    counted = int((inputs.ids >= 0).sum())
    monkeypatch.setattr(epilogue_call.HostCount, "__call__", lambda count: counted)
    scale = torch.ones(inputs.ids.numel(), device=device)
    loss = TokenCrossEntropy(scale, 0.0, 0.0, inputs.vocab_size)
    monkeypatch.setattr(epilogue_gradients, "mm", lambda left, right, out, **_: names.append("mm"))
    with _Operations(names):
        epilogue.EpilogueStatistics(tiles=TILES).statistics_and_gradients(inputs, loss, ALL)
    launches = [
        "gather_kernel",
        "forward_kernel",
        "merge_kernel",
        "dlogits_kernel",
        "mm",
        "scatter_kernel",
        "mm",
    ]
    if ignored:
        launches.insert(5, "zero_")  # dX of the ignored tokens
    # empty memory is poisoned here by fill_
    assert [name for name in names if name != "fill_"] == launches


@pytest.mark.parametrize("captured", ["forward", "backward"])
def test_one_pass_under_graph_capture(no_worse_than_eager, device, monkeypatch, captured):
    """There ignored tokens keep their places; the other pass takes the order that was saved."""
    inputs = HeadInputs(*make(device), None, HeadOptions())
    engine = epilogue.EpilogueStatistics(tiles=TILES)
    coefs = upstream(inputs, Stat.LOGP)
    now = {"captured": captured == "forward"}
    monkeypatch.setattr(host_count, "capturing", lambda tensor: now["captured"])
    stats, saved = engine.statistics(inputs, ALL)
    now["captured"] = captured == "backward"
    gradients = engine.gradients(inputs, stats, saved, coefs(stats, slice(None)), ALL)
    check(no_worse_than_eager, inputs, coefs, stats, gradients)
