"""The cross-entropy whose gradient a GPU computes in forward, in one launch: on a GPU, or in Triton's
interpreter."""

import pytest
import torch

from fastalign_kernels import cross_entropy, logits_ops
from fastalign_kernels import logits as public
from fastalign_kernels.logits import cross_entropy_ref
from fastalign_kernels.softmax import rows

rows_triton = pytest.importorskip(
    "fastalign_kernels.softmax.rows_triton", reason="triton is not installed", exc_type=ImportError
)

GPU = torch.cuda.is_available()
OPTIONS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "all": {"label_smoothing": 0.2, "z_loss": 1e-2, "softcap": 7.0, "temperature": 1.4, "num_items": 5.0},
}
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy's, in the interpreter
]


@pytest.fixture(autouse=True)
def gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU its kernels run in the interpreter, 2 programs for all rows."""
    if GPU:
        return
    monkeypatch.setattr(rows.KERNELS, "select", lambda _: rows_triton)
    monkeypatch.setattr(public, "gradient_in_forward", lambda logits: True)


def make(device, dtype, V=300, seed=0):
    """[2, 4, V] logits, of whose 8 rows 2 are ignored and hold NaN, which nobody may read."""
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(2, 5, V, generator=generator, dtype=torch.float64)).to(dtype).to(device)[:, 1:]
    targets = torch.randint(0, V, (2, 4), generator=generator).to(device)
    targets[0, 1] = targets[1, 3] = -100
    logits = logits.masked_fill((targets == -100)[..., None], float("nan"))
    return logits.requires_grad_(), targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("upstream", [1.0, 1.5])
def test_loss_and_gradient_are_no_worse_than_eager(no_worse_than_eager, device, dtype, options, upstream):
    logits, targets = make(device, dtype)
    filled = logits.detach().nan_to_num(0)
    weights = torch.rand(2, 4, device=device).requires_grad_()
    found = []
    for function, x, w in (
        (cross_entropy, logits, weights),
        (cross_entropy_ref, filled.clone().requires_grad_(), weights),
        (cross_entropy_ref, filled.double().requires_grad_(), weights.detach().double().requires_grad_()),
    ):
        loss = function(x, targets, token_weights=w, **OPTIONS[options])
        found.append((loss.detach(), *torch.autograd.grad(loss * upstream, (x, w))))
    for name, ours, eager, truth in zip(("loss", "gradient", "gradient of the weights"), *found):
        if dtype == torch.bfloat16 and name == "gradient" and not (GPU and upstream == 1):
            # Rounded in forward, by at most 2^-8 (the interpreter truncates: 2^-7). An upstream scalar that
            # is no power of two rounds once more in backward: 2^-8.
            bound = 2**-7 if GPU else 2**-7 + 2**-8
            assert ((ours.double() - truth).abs() <= truth.abs() * bound + 1e-9).all()
        else:
            no_worse_than_eager(ours, eager, truth, name)
    assert (found[0][1][targets == -100] == 0).all(), "an ignored row has a gradient"


def test_it_runs_in_one_launch_and_backward_computes_nothing_again(device, monkeypatch):
    calls = []
    for name in ("row_loss", "row_stats", "row_grad"):
        kernel = getattr(logits_ops, name)
        monkeypatch.setattr(
            logits_ops, name, lambda *x, name=name, kernel=kernel: calls.append(name) or kernel(*x)
        )
    logits, targets = make(device, torch.float32)
    cross_entropy(logits, targets).backward()
    assert calls == ["row_loss"]


def test_a_second_backward_has_the_same_gradient(device):
    logits, targets = make(device, torch.float32)
    loss = cross_entropy(logits, targets, label_smoothing=0.1)
    (first,) = torch.autograd.grad(3 * loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(3 * loss, logits)
    assert torch.equal(first, second)


def test_in_place_and_unreduced_losses_take_two_launches(device):
    """The forward pass leaves the logits as they are; backward writes their gradient over them."""
    logits, targets = make(device, torch.float32)
    (expected,) = torch.autograd.grad(cross_entropy(logits, targets), logits)
    x = logits * 1.0
    before = x.detach().clone()
    loss = cross_entropy(x, targets, inplace_backward=True)
    torch.testing.assert_close(x.detach(), before, rtol=0, atol=0, equal_nan=True)
    (found,) = torch.autograd.grad(loss, x)
    assert found.data_ptr() == x.data_ptr()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    none = cross_entropy(logits, targets, reduction="none")
    (found,) = torch.autograd.grad(none.sum() / 6, logits)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_opcheck_and_compile(device):
    logits, targets = make(device, torch.float32, V=11)
    logits = logits.detach().nan_to_num(0).requires_grad_()
    scale = torch.rand(8, device=device).requires_grad_()
    ids = targets.flatten().clamp(min=-1)
    torch.library.opcheck(torch.ops.fastalign.token_loss.default, (logits, ids, scale, [5.0, 0.7, 0.1, 0.01]))
    expected = cross_entropy(logits, targets)
    found = torch.compile(cross_entropy, fullgraph=True)(logits, targets)
    torch.testing.assert_close(found, expected)
    grads = (torch.autograd.grad(2 * x, logits)[0] for x in (found, expected))
    torch.testing.assert_close(*grads)


def test_unneeded_statistics_are_zero_and_cost_nothing(device):
    logits, targets = make(device, torch.float32)
    ids = targets.flatten().clamp(min=-1)
    whole = rows.row_stats(logits.detach(), ids, None, rows.Transform())
    lean = rows.row_stats(logits.detach(), ids, None, rows.Transform(), rows.NeedsStats(False, False))
    dropped = [rows.Stat.MEAN_LOGP, rows.Stat.ENTROPY]
    assert (lean[dropped] == 0).all() and (whole[dropped][:, ids >= 0] != 0).all()
    kept = [stat for stat in rows.Stat if stat not in dropped]
    assert torch.equal(lean[kept], whole[kept])


@pytest.mark.skipif(GPU, reason="the interpreter counts what a launch reads")
def test_a_launch_goes_over_all_rows_with_few_programs():
    assert rows_triton.grid_size(2, 1000, torch.device("cpu")) == 4
    assert rows_triton.grid_size(2, 3, torch.device("cpu")) == 3
    assert rows_triton.grid_size(0, 1000, torch.device("cpu")) == 1000
