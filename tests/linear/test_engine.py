"""How the head runs: workspace, plan, compilation, each implementation, refusals."""

import pytest
import torch

import fastalign_kernels
from fastalign_kernels import (
    linear_cross_entropy,
    linear_logprobs,
    linear_token_stats,
    native,
    plan_head,
)
from fastalign_kernels.linear.inputs import NeedsGrad
from fastalign_kernels.linear.options import HeadOptions
from fastalign_kernels.linear.reference import linear_cross_entropy_ref
from fastalign_kernels.softmax import rows
from tests.linear.inputs import grads_of, make, op_arguments

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def test_workspace_holds(monkeypatch):
    """No tensor of logits is larger than the workspace, whatever N is."""
    hidden, weight, ids, _ = make("cpu", torch.float32, N=1000, H=8, V=500)
    allocated = []
    original = torch.empty

    def recording(*args, **kwargs):
        tensor = original(*args, **kwargs)
        allocated.append(tensor)
        return tensor

    monkeypatch.setattr(torch, "empty", recording)
    for workspace_mib in (0.002, 0.1, 1.0):
        allocated.clear()
        linear_cross_entropy(hidden, weight, ids, workspace_mib=workspace_mib).backward()
        tiles = [t for t in allocated if t.dim() == 2 and t.shape[-1] == 500 and t.shape[0] != 7]
        assert tiles and sum(t.nbytes for t in tiles) <= workspace_mib * 2**20
    with pytest.raises(ValueError, match=r"workspace_mib: got 0.001, expected at least 0.00191"):
        linear_cross_entropy(hidden, weight, ids, workspace_mib=0.001)


def test_the_plan():
    """The table at the top of linear/cross_entropy.py, and chunks as large and even as memory allows."""

    def plan(N=2048, H=576, V=49152, dtype=torch.float32, device="cpu", **options):
        return plan_head(N, H, V, dtype=dtype, device=device, architecture=0, **options)

    assert plan(hidden_grad=False, weight_grad=False)[:4:3] == ("no_grad", 1)
    assert plan()[:4:3] == ("gradient_in_forward", 3)
    assert plan(weight_grad=False)[:4:3] == ("gradient_in_forward", 2)
    assert plan(upstream="logp")[:4:3] == ("general", 4)
    assert plan(upstream="logp", weight_grad=False)[:4:3] == ("frozen_head", 2)
    assert plan(upstream="table", weight_grad=False)[:4:3] == ("general", 3)
    assert plan(dtype=torch.float16)[:4:3] == ("general", 4)
    assert plan(100).chunk == 100
    default = plan()
    assert default.workspace_bytes == default.chunk * 49152 * 4 <= 72 * 2**20 and default.chunk == 342
    assert plan(weight_grad=False).workspace_bytes == 512 * 49152 * 4 == 96 * 2**20
    assert -(-2048 // default.chunk) * default.chunk - 2048 < -(-2048 // default.chunk), "uneven chunks"
    gpu = plan(8192, 4096, 151936, torch.bfloat16, "cuda")
    assert gpu.engine == "kept_softmax" and gpu.kept_tokens == 8192 and gpu.gemms == 3
    assert gpu.workspace_bytes == 151936 * (4 * gpu.chunk + 2 * 8192) <= 2560 * 2**20
    assert plan(8192, 4096, 151936, torch.bfloat16, "cuda", upstream="logp").gemms == 3
    assert plan(16384, 4096, 151936, torch.bfloat16, "cuda", upstream="logp").gemms == 3
    assert plan(32768, 4096, 151936, torch.bfloat16, "cuda", upstream="logp").gemms == 4
    tail = plan(8192, 4096, 151936, torch.bfloat16, "cuda", tail_eps=1e-4)
    assert tail.engine == "token_tiles" and tail.workspace_bytes <= 512 * 2**20
    slices = plan(8192, 4096, 151936, torch.bfloat16, "cuda", workspace_mib=300)
    assert slices[3:5] == (4, "vocab_slices") and slices.slice_columns == 4864
    assert plan(8192, 4096, 151936, torch.float32, "cuda", workspace_mib=100).workspace_bytes <= 100 * 2**20
    assert plan(0).chunk == 1
    with pytest.raises(ValueError, match="device: got 'meta', expected a CPU or CUDA device"):
        plan(device="meta")
    for bad in ({"N": -1}, {"V": 0}, {"H": 0}, {"upstream": "x"}, {"workspace_mib": 0.1}):
        with pytest.raises(ValueError, match=next(iter(bad)) if len(next(iter(bad))) > 1 else "got"):
            plan(**bad)


def test_compiles_without_a_graph_break(device):
    hidden, weight, ids, bias = make(device)

    def function(h, w, b):
        stats = linear_token_stats(h, w, ids, b, softcap=5.0)
        loss = linear_cross_entropy(h, w, ids, b, label_smoothing=0.1)
        frozen = linear_logprobs(h, w.detach(), ids)
        return 2 * loss + stats.entropy.sum() + (stats.lse * frozen).sum()

    expected, found = (
        function(hidden, weight, bias),
        torch.compile(function, fullgraph=True)(hidden, weight, bias),
    )
    torch.testing.assert_close(found, expected)
    for a, b in zip(grads_of(found, (hidden, weight, bias)), grads_of(expected, (hidden, weight, bias))):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_compiles_with_a_dynamic_number_of_tokens(device):
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, dynamic=True)
    for N in (16, 23, 31):
        hidden, weight, ids, bias = make(device, N=N)
        torch.testing.assert_close(
            compiled(hidden, weight, ids, bias), linear_cross_entropy(hidden, weight, ids, bias)
        )


@pytest.mark.parametrize("tail_eps", [None, 0.1])
def test_opcheck(tail_eps):
    hidden, weight, ids, bias = make("cpu", N=6, H=4, V=11)
    ids = ids.clamp(min=-1)
    options = HeadOptions(0.7, 5.0, 1.3, None, tail_eps)
    head, ops = (hidden, weight, ids, bias), torch.ops.fastalign
    of_stats = op_arguments(head, options=options)
    torch.library.opcheck(ops.head_stats.default, of_stats)
    scale = torch.rand(6, dtype=torch.float64)
    torch.library.opcheck(ops.head_loss.default, op_arguments(head, scale, False, 0.1, 0.01, options=options))
    frozen = (hidden, weight.detach(), ids, bias.detach())
    needs = NeedsGrad(hidden=True)
    torch.library.opcheck(
        ops.head_frozen.default, op_arguments(frozen, hidden[:0].clone(), options=options, needs=needs)
    )
    with torch.no_grad():
        stats = ops.head_stats(*of_stats)
    detached = (hidden.detach(), weight.detach(), ids, bias.detach())
    of_backward = op_arguments(detached, torch.randn_like(stats), stats, [], options=options)
    torch.library.opcheck(ops.head_stats_grad.default, of_backward)


def test_triton_runs_the_whole_loop(device, monkeypatch):
    """The chunk loop over the Triton kernels, in the interpreter where there is no GPU."""
    rows_triton = pytest.importorskip(
        "fastalign_kernels.softmax.rows_triton", reason="triton is not installed", exc_type=ImportError
    )
    hidden, weight, ids, bias = make(device, torch.float32, N=9)
    monkeypatch.setattr(rows.KERNELS, "select", lambda logits: rows_triton)
    found = linear_cross_entropy(hidden, weight, ids, bias, softcap=5.0, z_loss=0.01, workspace_mib=0.002)
    expected = linear_cross_entropy_ref(hidden, weight, ids, bias, softcap=5.0, z_loss=0.01)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(grads_of(found, (hidden, weight, bias)), grads_of(expected, (hidden, weight, bias))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_reference_serves_where_the_native_library_is_missing(monkeypatch):
    hidden, weight, ids, bias = make("cpu")
    expected = linear_cross_entropy(hidden, weight, ids, bias)
    monkeypatch.setattr(native, "missing", "deleted by this test")
    found = linear_cross_entropy(hidden, weight, ids, bias)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(grads_of(found, (hidden, weight, bias)), grads_of(expected, (hidden, weight, bias))):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "change, named",
    [
        (
            {"hidden": torch.zeros(5, 3)},
            r"hidden: got shape \[5, 3\], expected \[\.\.\., H\] = \[\.\.\., 4\]",
        ),
        ({"hidden": torch.zeros(5, 4, dtype=torch.int64)}, "hidden: got torch.int64"),
        ({"weight": torch.zeros(4)}, r"weight: got shape \[4\], expected \[V, H\]"),
        (
            {"weight": torch.zeros(7, 4, dtype=torch.bfloat16)},
            "weight: got torch.bfloat16, expected torch.float32",
        ),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, r"targets: got shape \[4\]"),
        (
            {"targets": torch.full((5,), 7)},
            r"targets: got 7 at \[0\] \(5 such\), expected ids in \[0, 7\) or ignore_index -100",
        ),
        ({"bias": torch.zeros(6)}, r"bias: got shape \[6\], expected \[V\] = \[7\]"),
        ({"bias": torch.zeros(7, dtype=torch.float64)}, "bias: got torch.float64"),
        ({"temperature": -1.0}, "temperature: got -1.0"),
        ({"softcap": 0.0}, "softcap: got 0.0"),
        ({"workspace_mib": 0}, "workspace_mib: got 0"),
        ({"reduction": "token"}, "reduction: got 'token'"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_refusals_name_the_argument(change, named):
    arguments = {
        "hidden": torch.zeros(5, 4),
        "weight": torch.zeros(7, 4),
        "targets": torch.zeros(5, dtype=torch.int64),
    } | change
    with pytest.raises(ValueError, match=named):
        linear_cross_entropy(**arguments)


def test_devices_are_not_mixed():
    with pytest.raises(ValueError, match="weight: got a tensor on meta, expected cpu, where hidden is"):
        linear_logprobs(
            torch.zeros(2, 3), torch.zeros(5, 3, device="meta"), torch.zeros(2, dtype=torch.int64)
        )


def test_every_public_name_is_there():
    for name in fastalign_kernels.__all__:
        assert getattr(fastalign_kernels, name).__doc__, name
