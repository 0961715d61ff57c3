"""Log-probabilities over the ids that a filter kept: values, gradients, memory, refusals."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastalign_kernels import autograd, linear_logprobs, linear_ppo_loss, sample
from fastalign_kernels.linear.reference import linear_kept_stats_ref
from fastalign_kernels.policy.reference import ppo_loss_ref
from tests.linear.inputs import grads_of, make, op_arguments

pytestmark = pytest.mark.usefixtures("poisoned_memory")

TIGHT = 0.002  # MiB: 4 pairs of fp64 rows at a time at H = 19
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "all": {"softcap": 5.0, "logit_scale": 0.7, "temperature": 1.4},
    "negative scale": {"logit_scale": -0.3},
}


def sets_of(ids: Tensor, V: int, *sizes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sets of these sizes in turn, each with its token's id. An ignored token's set is empty."""
    generator = torch.Generator().manual_seed(seed)
    sets, targets = [], ids.reshape(-1).cpu()
    for n, target in enumerate(targets.tolist()):
        drawn = torch.randperm(V, generator=generator)[: sizes[n % len(sizes)] * (target >= 0)]
        if target >= 0 and target not in drawn:
            drawn[0] = target
        sets.append(drawn)
    lengths = torch.tensor([0, *(len(x) for x in sets)])
    return lengths.cumsum(0).to(ids.device), torch.cat(sets).to(ids.device)


@pytest.mark.parametrize("sizes", [(1,), (50,), (123,), (1, 50, 123)], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_the_reference(device, options, sizes):
    hidden, weight, ids, bias = make(device)
    kept, options = sets_of(ids, 123, *sizes), OPTIONS[options]
    ours = linear_logprobs(hidden, weight, ids, bias, kept=kept, workspace_mib=TIGHT, check=True, **options)
    reference, _ = linear_kept_stats_ref(hidden, weight, ids, bias, kept=kept, **options)
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(reference)
    for found, truth in zip(
        grads_of(ours, (hidden, weight, bias), upstream),
        grads_of(reference, (hidden, weight, bias), upstream),
    ):
        torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-12)


def test_sets_of_all_ids_are_no_filter(device):
    hidden, weight, ids, bias = make(device)
    found = linear_logprobs(hidden, weight, ids, bias, kept=sets_of(ids, 123, 123))
    expected = linear_logprobs(hidden, weight, ids, bias)
    torch.testing.assert_close(found, expected)
    upstream = torch.linspace(-1, 1, 37, dtype=torch.float64, device=device)
    for ours, truth in zip(
        grads_of(found, (hidden, weight, bias), upstream),
        grads_of(expected, (hidden, weight, bias), upstream),
    ):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("scale", [0.02, 3.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_worse_than_eager(no_worse_than_eager, device, dtype, scale):
    results = []
    for ours, widen in ((True, False), (False, False), (False, True)):
        draws = []
        for seed in range(4):
            inputs = make(device, dtype, N=60, H=33, V=129, scale=scale, seed=seed)
            hidden, weight, ids, bias = (
                x.detach().double() if widen and x.is_floating_point() else x.detach() for x in inputs
            )
            trained = [x.requires_grad_() for x in (hidden, weight, bias)]
            kept = sets_of(ids, 129, 1, 50, 129, seed=seed)
            if ours:
                logp = linear_logprobs(hidden, weight, ids, bias, kept=kept, workspace_mib=0.02)
            else:
                logp, _ = linear_kept_stats_ref(hidden, weight, ids, bias, kept=kept)
            upstream = torch.linspace(-1, 1, 60, dtype=logp.dtype, device=device)
            draws.append([logp.detach(), *grads_of(logp, trained, upstream)])
        results.append([torch.stack(tensors) for tensors in zip(*draws)])
    for name, found, same_dtype, truth in zip(("logp", "d hidden", "d weight", "d bias"), *results):
        no_worse_than_eager(found, same_dtype, truth, name)


def policy(given: dict[str, Any], ids: Tensor, kept: Any, **options: Any) -> Any:
    """`linear_ppo_loss` of tokens under kept sets, and what the specifications make of it."""
    old_logp, advantages = (torch.linspace(low, 2, len(ids), dtype=torch.float64) for low in (-3.0, -1.0))
    mask = ids >= 0
    loss: dict[str, Any] = {"entropy_coefficient": 0.3}
    ours = linear_ppo_loss(
        **given, ids=ids, old_logp=old_logp, advantages=advantages, mask=mask, kept=kept, **loss, **options
    )
    logp, entropy = linear_kept_stats_ref(**given, ids=ids, kept=kept, **options)
    return ours, ppo_loss_ref(logp, old_logp, advantages, mask, entropy=entropy, **loss)


@pytest.mark.parametrize("options", OPTIONS)
def test_ppo_under_kept_sets(options):
    hidden, weight, ids, bias = make("cpu")
    given = {"hidden": hidden, "weight": weight, "bias": bias}
    found, expected = policy(given, ids, sets_of(ids, 123, 1, 50, 123), **OPTIONS[options])
    for name, ours, truth in zip(expected._fields, found, expected):
        if truth is not None:
            torch.testing.assert_close(ours, truth, msg=name)
    for ours, truth in zip(grads_of(found.loss, given.values()), grads_of(expected.loss, given.values())):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-11)


def test_gradcheck_of_log_probs_and_entropy():
    hidden, weight, ids, bias = make("cpu", N=6, H=4, V=11)
    kept = sets_of(ids, 11, 1, 5, 11)

    def loss(h, w, b):
        found, _ = policy({"hidden": h, "weight": w, "bias": b}, ids, kept, softcap=5.0)
        return found.loss, linear_logprobs(h, w, ids, b, kept=kept, softcap=5.0)

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


def test_a_ratio_under_top_p_is_one():
    """The rollout's logp is under the filtered policy. Over the whole vocabulary the ratio is the kept
    mass."""
    hidden, weight, _, _ = make("cpu", torch.float32)
    logits = hidden.detach() @ weight.detach().t()
    drawn = sample(logits, seed=1, top_p=0.8, temperature=0.7, return_kept=True)
    kept = drawn.kept_ids
    logp = linear_logprobs(hidden, weight, drawn.token, kept=kept, temperature=0.7, check=True)
    torch.testing.assert_close(logp, drawn.logp, rtol=1e-5, atol=2e-6)
    whole = linear_logprobs(hidden, weight, drawn.token, temperature=0.7)
    torch.testing.assert_close(whole, drawn.logp + drawn.log_kept, rtol=1e-5, atol=5e-6)
    assert (drawn.log_kept < -0.05).any()


def test_an_id_outside_its_set_and_an_empty_set():
    hidden, weight, ids, bias = make("cpu")
    offsets, kept_ids = sets_of(ids, 123, 4)
    outside = (ids + 1) % 123
    outside[3::7] = -100
    kept = offsets, torch.where(kept_ids == outside.repeat_interleave(offsets.diff()), 0, kept_ids)
    empty = torch.zeros_like(offsets), kept_ids[:0]
    for given, sets in ((outside, kept), (ids, empty)):
        logp = linear_logprobs(hidden, weight, given, bias, kept=sets)
        is_outside = logp == -math.inf
        assert is_outside.sum() > 20 and not is_outside[given < 0].any()
        assert is_outside[0] and (logp[3::7] == 0).all()
        upstream = torch.where(is_outside, 1.0, 0.0).double()
        for gradient in grads_of(logp, (hidden, weight, bias), upstream):
            assert (gradient == 0).all()
        with pytest.raises(ValueError, match=r"kept: got a set without id \d+ at token 0 \(\d+ such\)"):
            linear_logprobs(hidden, weight, given, bias, kept=sets, check=True)


def test_nan_in_an_ignored_token_and_masked_ids_reach_nothing():
    """An ignored token may have a set; an id whose bias is -inf has a probability of 0."""
    hidden, weight, ids, bias = (x.detach() for x in make("cpu", torch.float32))
    kept = torch.arange(0, 37 * 123 + 1, 123), torch.arange(123).repeat(37)
    hidden[ids < 0] = math.nan
    bias[(ids[0] + 1) % 123] = -math.inf
    trained = [x.requires_grad_() for x in (hidden, weight, bias)]
    found, expected = (
        linear_logprobs(hidden, weight, ids, bias, **options) for options in ({"kept": kept}, {})
    )
    upstream = torch.where(found.isfinite(), 1.0, 0.0)
    assert torch.equal(found.isfinite(), expected.isfinite()) and found.isfinite().sum() > 30
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for ours, truth in zip(grads_of(found, trained, upstream), grads_of(expected, trained, upstream)):
        assert not ours.isnan().any()
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


def test_the_kept_ids_of_a_sample():
    """With top-k and ties, a penalty, an allowed mask, temperature 0, a finished row and one that is not
    valid."""
    logits = torch.tensor([[3.0, 1.0, 3.0, 2.0, 0.0]]).repeat(6, 1)
    logits[1, 3] = 1.0
    logits[5, 0] = math.nan
    top_k = torch.tensor([2, 3, 2, 5, 2, 2])
    seen, allowed = torch.zeros(6, 1, dtype=torch.int32), torch.full((6, 1), -1, dtype=torch.int32)
    seen[2], allowed[3] = 1, 0b10110  # id 0 is penalised; ids 1, 2 and 4 are allowed
    temperature = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    options: dict[str, Any] = {"top_k": top_k, "temperature": temperature, "repetition_penalty": 2.0}
    drawn = sample(logits, seed=3, seen=seen, allowed=allowed, return_kept=True, **options)
    offsets, ids = drawn.kept_ids
    sets = [sorted(ids[a:b].tolist()) for a, b in zip(offsets[:-1], offsets[1:])]
    assert sets == [[0, 2], [0, 1, 2, 3], [2, 3], [1, 2, 4], [0], []]
    finished = torch.arange(6) < 5
    drawn = sample(logits, seed=3, finished=finished, return_kept=True, **options)
    assert drawn.kept_ids.offsets.tolist() == [0] * 7 and not drawn.kept_ids.ids.numel()
    assert sample(logits[:5], seed=3).kept_ids is None
    assert sample(logits[:0], seed=3, return_kept=True).kept_ids.offsets.tolist() == [0]


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returned."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return result


def test_no_tensor_has_a_row_of_the_vocabulary_for_each_token(monkeypatch):
    monkeypatch.setattr(autograd, "must_see_the_op", lambda _: False)  # the mode must see into the op
    N, H, V = 300, 8, 1000
    hidden, weight, ids, _ = make("cpu", torch.float32, N=N, H=H, V=V)
    kept = sets_of(ids, V, 1, 20)
    with Largest() as largest:
        linear_logprobs(hidden, weight, ids, kept=kept, workspace_mib=0.05).sum().backward()
    assert largest.numel == V * H  # the gradient of the weight; N V would be 37 times as much


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_bits_with_any_number_of_threads(dtype):
    hidden, weight, ids, bias = make("cpu", dtype, N=200, H=40, V=300)
    kept, found, threads = sets_of(ids, 300, 5, 300), [], torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            logp = linear_logprobs(hidden, weight, ids, bias, kept=kept)
            found.append([logp, *grads_of(logp, (hidden, weight, bias))])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_logits_in_bf16_are_rounded():
    hidden, weight, ids, _ = make("cpu", torch.bfloat16)
    kept = sets_of(ids, 123, 123)
    found = linear_logprobs(hidden, weight, ids, kept=kept, logits_dtype=torch.bfloat16)
    expected = linear_logprobs(hidden, weight, ids, logits_dtype=torch.bfloat16)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - linear_logprobs(hidden, weight, ids)).abs().max() > 1e-3


def test_compiles_and_the_op_checks():
    hidden, weight, ids, bias = make("cpu", N=6, H=4, V=11)
    kept = sets_of(ids, 11, 1, 5)
    step = torch.compile(lambda *x: linear_logprobs(*x[:4], kept=x[4:]), fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, lambda *x: linear_logprobs(*x[:4], kept=x[4:])):
        logp = function(hidden, weight, ids, bias, *kept)
        results.append([logp, *grads_of(logp, (hidden, weight, bias))])
    torch.testing.assert_close(*results)
    tensors = (hidden, weight, torch.where(ids < 0, -1, ids), bias)
    torch.library.opcheck(torch.ops.fastalign.kept_stats.default, op_arguments(tensors, *kept))


GOOD = torch.arange(0, 4 * 37 + 1, 4), torch.arange(4).repeat(37)


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (GOOD[0], r"got a tensor of shape \[38\], expected a pair of tensors"),
        ((GOOD[0][1:], GOOD[1]), r"got offsets \[37\] and ids \[148\], expected \[38\] for 37 tokens"),
        ((GOOD[0], GOOD[1].view(37, 4)), r"got offsets \[38\] and ids \[37, 4\]"),
        ((GOOD[0].float(), GOOD[1]), "got torch.float32, expected torch.int64 or torch.int32"),
        ((GOOD[0] + 1, GOOD[1]), "got offsets from 1 to 149, expected a rise from 0 to 148"),
        ((GOOD[0].flip(0), GOOD[1]), "got offsets from 148 to 0"),
        ((GOOD[0], GOOD[1] + 120), r"got id 123 at 3, expected ids in \[0, 123\)"),
        ((GOOD[0], GOOD[1] - 1), r"got id -1 at 0, expected ids in \[0, 123\)"),
        ((GOOD[0], GOOD[1].clamp(max=2)), "got id 2 twice at token 0, expected different ids"),
    ],
)
def test_refusals_name_kept(kept, said):
    hidden, weight, ids, _ = make("cpu")
    with pytest.raises(ValueError, match=f"^kept: {said}"):
        linear_logprobs(hidden, weight, torch.where(ids < 0, ids, 0), kept=kept, check=True)


def test_a_tail_beside_kept_sets_is_refused():
    hidden, weight, ids, _ = make("cpu")
    with pytest.raises(ValueError, match="tail_eps: got 0.001, expected None"):
        linear_logprobs(hidden, weight, ids, kept=GOOD, tail_eps=1e-3)
