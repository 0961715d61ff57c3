"""LoRA on the head in the GPU engines against fp64, in tiny tiles: on a GPU, or in Triton's interpreter."""

import pytest
import torch

from fastalign_kernels.softmax.rows import Stat, coefficients, row_grad_ref, row_stats_ref

pytest.importorskip(
    "fastalign_kernels.softmax.rows_triton", reason="triton is not installed", exc_type=ImportError
)

from fastalign_kernels.linear.engine import Engine, Gradients  # noqa: E402
from fastalign_kernels.linear.gpu import plan as gpu_plan  # noqa: E402
from fastalign_kernels.linear.gpu.kept_softmax import KeptSoftmax  # noqa: E402
from fastalign_kernels.linear.gpu.vocab_slices import VocabSlices  # noqa: E402
from fastalign_kernels.linear.inputs import HeadInputs, NeedsGrad  # noqa: E402
from fastalign_kernels.linear.options import HeadOptions  # noqa: E402
from fastalign_kernels.linear.token_losses import TokenCrossEntropy  # noqa: E402
from tests.linear.gpu_tiles import CLOSE, MARKS  # noqa: E402

N, H, V, RANK = 13, 16, 90, 3
MIB = 2**20
# bytes that hold all tokens; blocks of 8 tokens in 16 bits; slices of 48 columns
ENGINES = {
    "all kept": (KeptSoftmax, 1.0),
    "in blocks": (KeptSoftmax, (4 * 4 + 8 * 2) * V / MIB),
    "slices": (VocabSlices, N * (6 * 48 + 2 * H) / MIB),
}
OPTIONS = HeadOptions(logit_scale=0.7, softcap=5.0, temperature=1.3)
ADAPTER = NeedsGrad(hidden=True, lora_hidden=True, lora_weight=True)  # the weight is frozen
EVERYTHING = ADAPTER._replace(weight=True)
pytestmark = MARKS


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    make, workspace_mib = ENGINES[request.param]
    return make(workspace_mib)


def inputs_of(device: str, dtype: torch.dtype) -> HeadInputs:
    """Inputs with an adapter; one ignored token's states are NaN, which nobody may read."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ids = torch.randint(0, V, (N,), generator=generator)
    ids[[0, 5, 12]] = -1
    hidden, weight, lora_weight = normal(N, H), normal(V, H), normal(V, RANK)
    # numbers that bf16 holds, so that an engine that rounds them loses nothing
    lora_hidden = normal(N, RANK).bfloat16().float()
    hidden[12], lora_hidden[12] = torch.nan, torch.nan
    moved = [x.to(device, dtype) for x in (hidden, weight, lora_weight)]
    return HeadInputs(moved[0], moved[1], ids.to(device), None, OPTIONS, lora_hidden.to(device), moved[2])


def truth(inputs: HeadInputs, coefficients_of) -> tuple[torch.Tensor, Gradients]:
    """Statistics and gradients in fp64."""
    assert inputs.lora is not None
    x, w, u, b = (t.nan_to_num().double() for t in (inputs.hidden, inputs.weight, *inputs.lora))
    logits, transform = (x @ w.t() + u @ b.t())[None], inputs.options.transform
    stats = row_stats_ref(logits, inputs.ids, None, transform)
    grad = row_grad_ref(logits, inputs.ids, None, transform, stats, coefficients_of(stats))[0]
    return stats, Gradients(grad @ w, grad.t() @ x, grad.new_empty(0), grad @ b, grad.t() @ u)


def assert_close(found: Gradients, expected: Gradients, needs: NeedsGrad, dtype: torch.dtype) -> None:
    for name, ours, right, need in zip(Gradients._fields, found, expected, needs):
        if not need:
            assert ours.numel() == 0, f"d {name} was computed"
            continue
        error = (ours.double() - right).norm() / right.norm()
        assert error <= CLOSE[dtype], f"d {name} is off by {error:.3g}"


@pytest.mark.parametrize(
    "dtype, needs",
    [
        (torch.float32, ADAPTER),
        (torch.bfloat16, EVERYTHING),
        (torch.bfloat16, NeedsGrad(lora_weight=True)),
    ],
    ids=str,
)
def test_a_token_loss(device, engine, dtype, needs):
    inputs = inputs_of(device, dtype)
    loss = TokenCrossEntropy(torch.linspace(-1, 2, N, device=device), 0.1, 0.01, V)
    stats, expected = truth(inputs, lambda table: loss(table, slice(None)))
    table, found = engine.statistics_and_gradients(inputs, loss, needs)
    torch.testing.assert_close(table.double(), stats, rtol=1e-5, atol=2e-5)
    assert_close(found, expected, needs, dtype)
    without, _ = engine.statistics(inputs, NeedsGrad())
    torch.testing.assert_close(without.double(), stats, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16], ids=str)
def test_any_upstream_gradient_and_a_second_backward(device, engine, dtype):
    inputs = inputs_of(device, dtype)
    upstream = torch.randn(len(Stat), N, generator=torch.Generator().manual_seed(1)).to(device)

    def of_tokens(table: torch.Tensor) -> torch.Tensor:
        return coefficients(upstream.to(table), table, V)

    _, expected = truth(inputs, of_tokens)
    table, saved = engine.statistics(inputs, ADAPTER)
    given = of_tokens(table)
    for kept in (saved, []):  # as in a second backward pass
        assert_close(engine.gradients(inputs, table, kept, given, ADAPTER), expected, ADAPTER, dtype)


def test_the_planner_gives_adapters_to_an_engine_that_has_the_logits_in_memory():
    call = gpu_plan.GpuCall(8192, 4096, 151936, torch.bfloat16, 2560.0, True, False, architecture=90)
    adapted = call._replace(lora_rank=16, lora_grad=True)
    assert [gpu_plan.select_engine(c) for c in (call, adapted)] == ["epilogue", "kept_softmax"]
    tail = [gpu_plan.select_engine(c._replace(tail=True)) for c in (call, adapted)]
    assert tail == ["tail", "token_tiles"]
    assert gpu_plan.select_engine(adapted._replace(hidden_grad=False)) == "kept_softmax"
