"""Arguments in the shapes and dtypes in which other trainers have them."""

import pytest
import torch

from fastalign_kernels import (
    cross_entropy,
    gae,
    kto_loss,
    linear_cross_entropy,
    linear_dpo_loss,
    linear_kto_loss,
    linear_logprobs,
    linear_ppo_loss,
    linear_token_stats,
    masked_whiten,
    ppo_loss,
    sum_by_sequence,
    tail_report,
    token_logprobs,
    token_stats,
    value_loss,
)
from fastalign_kernels.linear.reference import linear_cross_entropy_ref, linear_token_stats_ref
from fastalign_kernels.logits import cross_entropy_ref, token_stats_ref
from fastalign_kernels.policy.reference import ppo_loss_ref
from tests.kernels.small_inputs import normal_numbers

B, T, H, V = 3, 4, 5, 7
normal, GENERATOR = normal_numbers(torch.float64)


LOGP, OLD, ADVANTAGES = normal(B, T), normal(B, T), normal(B, T)
HIDDEN, WEIGHT = normal(B, T, H), normal(V, H)
IDS = torch.randint(V, (B, T), generator=GENERATOR)
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 0, 0]]).bool()


def with_gradient(loss, *leaves):
    """The loss of the leaves, and its gradients."""
    leaves = [x.clone().requires_grad_() for x in leaves]
    value = loss(*leaves)
    return value, *torch.autograd.grad(value, leaves)


def policy(logp, old_logp=OLD, advantages=ADVANTAGES, mask=MASK):
    return ppo_loss(logp, old_logp, advantages, mask).loss


def head_policy(hidden, weight, old_logp=OLD, advantages=ADVANTAGES, mask=MASK, ids=IDS, **options):
    return linear_ppo_loss(hidden, weight, ids, old_logp, advantages, mask, **options).loss


def test_no_old_logp_is_on_policy():
    found = with_gradient(lambda x: policy(x, old_logp=None), LOGP)
    expected = with_gradient(lambda x: -(ADVANTAGES * (x - x.detach()).exp())[MASK].mean(), LOGP)
    torch.testing.assert_close(found, expected)
    metrics = ppo_loss(LOGP, None, ADVANTAGES, MASK)
    assert (metrics.mean_ratio, metrics.clip_fraction, metrics.approx_kl) == (1, 0, 0)
    torch.testing.assert_close(ppo_loss_ref(LOGP, None, ADVANTAGES, MASK), metrics)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("workspace_mib", [None, 2e-4])
def test_no_old_logp_in_the_head(dtype, workspace_mib):
    """In fp16 it goes through linear_token_stats."""
    hidden, weight = HIDDEN.to(dtype), WEIGHT.to(dtype)
    found = with_gradient(
        lambda h, w: head_policy(h, w, old_logp=None, workspace_mib=workspace_mib), hidden, weight
    )
    logp = linear_logprobs(hidden, weight, IDS)
    expected = with_gradient(lambda h, w: head_policy(h, w, old_logp=logp), hidden, weight)
    torch.testing.assert_close(found, expected)
    assert found[0].item() == pytest.approx(-ADVANTAGES[MASK].mean().item(), rel=1e-3)


@pytest.mark.parametrize("shape", [(B,), (B, 1)])
def test_advantages_of_rows(shape):
    """One number a row, as GRPO has it; also where B = T, which broadcasting would read as T numbers."""
    rows = normal(B)
    expanded = rows[:, None].expand(B, T)
    torch.testing.assert_close(policy(LOGP, advantages=rows.view(shape)), policy(LOGP, advantages=expanded))
    torch.testing.assert_close(
        ppo_loss_ref(LOGP, OLD, rows.view(shape), MASK).loss, policy(LOGP, advantages=expanded)
    )
    torch.testing.assert_close(
        head_policy(HIDDEN, WEIGHT, advantages=rows.view(shape)),
        head_policy(HIDDEN, WEIGHT, advantages=expanded),
    )
    square = (LOGP[:, :B], OLD[:, :B])
    found = ppo_loss(*square, rows.view(shape), MASK[:, :B])
    torch.testing.assert_close(found, ppo_loss(*square, expanded[:, :B], MASK[:, :B]))
    with pytest.raises(ValueError, match=r"advantages: got shape \[4\]"):
        policy(LOGP, advantages=normal(T))


MASKED = {
    "ppo_loss": lambda mask: ppo_loss(LOGP, OLD, ADVANTAGES, mask)[0],
    "linear_ppo_loss": lambda mask: linear_ppo_loss(HIDDEN, WEIGHT, IDS, OLD, ADVANTAGES, mask)[0],
    "value_loss": lambda mask: value_loss(LOGP, OLD, ADVANTAGES, mask)[0],
    "gae": lambda mask: gae(LOGP, OLD, mask)[0],
    "masked_whiten": lambda mask: masked_whiten(LOGP, mask),
}


@pytest.mark.parametrize("loss", MASKED.values(), ids=MASKED.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_float_masks(loss, dtype):
    assert torch.equal(loss(MASK.to(dtype)), loss(MASK))
    for bad in (0.5, 2.0, float("nan")):  # 0.5 as a weight would count as 1
        weights = MASK.to(dtype).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(bad, dtype=dtype))
        with pytest.raises(ValueError, match=f"mask: got {bad}, expected 0 or 1"):
            loss(weights)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_float_mask_compiled(backend):
    torch._dynamo.reset()
    compiled = torch.compile(MASKED["ppo_loss"], fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(MASK.float()), MASKED["ppo_loss"](MASK))
    with pytest.raises(RuntimeError, match="mask: expected 0 or 1 for each token"):
        compiled(0.5 * MASK)


def test_kl_of_one_element():
    logps, reference, desirable, kl = (
        normal(B),
        normal(B),
        torch.tensor([True, False, True]),
        torch.tensor(0.3),
    )
    assert torch.equal(
        kto_loss(logps, reference, desirable, kl[None]).loss, kto_loss(logps, reference, desirable, kl).loss
    )
    for weight in (WEIGHT, WEIGHT.clone().requires_grad_()):
        first, second = (
            linear_kto_loss(HIDDEN, weight, IDS, desirable, x, reference_logps=reference).loss
            for x in (kl[None], kl)
        )
        assert torch.equal(first, second)
    with pytest.raises(ValueError, match=r"kl: got shape \[3\]"):
        kto_loss(logps, reference, desirable, normal(3).abs())


IGNORING = IDS.index_put((torch.tensor([0, 2]), torch.tensor([1, 0])), torch.tensor(-100))
TARGETED = {
    "cross_entropy": lambda **o: cross_entropy(HIDDEN, IGNORING.clamp(max=4), **o),
    "token_logprobs": lambda **o: token_logprobs(HIDDEN, IGNORING.clamp(max=4), **o),
    "token_stats": lambda **o: token_stats(HIDDEN, IGNORING.clamp(max=4), **o)[1],
    "linear_cross_entropy": lambda **o: linear_cross_entropy(HIDDEN, WEIGHT, IGNORING, **o),
    "linear_logprobs": lambda **o: linear_logprobs(HIDDEN, WEIGHT, IGNORING, **o),
    "linear_token_stats": lambda **o: linear_token_stats(HIDDEN, WEIGHT, IGNORING, **o)[1],
    "linear_ppo_loss": lambda **o: head_policy(HIDDEN, WEIGHT, ids=IGNORING, **o),
    "linear_dpo_loss": lambda **o: (
        linear_dpo_loss(
            HIDDEN[1:], WEIGHT, IGNORING[1:], reference_logps=OLD[0, :2], loss_type="sigmoid_norm", **o
        ).loss
    ),
    "linear_kto_loss": lambda **o: linear_kto_loss(
        HIDDEN, WEIGHT, IGNORING, MASK[:, 0], ADVANTAGES.var(), reference_logps=OLD[:, 0], **o
    )[0],
    "tail_report": lambda **o: torch.tensor(tail_report(HIDDEN, WEIGHT, IGNORING, tail_eps=0.1, **o)),
    "cross_entropy_ref": lambda **o: cross_entropy_ref(HIDDEN, IGNORING.clamp(max=4), **o),
    "token_stats_ref": lambda **o: token_stats_ref(HIDDEN, IGNORING.clamp(max=4), **o)[1],
    "linear_cross_entropy_ref": lambda **o: linear_cross_entropy_ref(HIDDEN, WEIGHT, IGNORING, **o),
    "linear_token_stats_ref": lambda **o: linear_token_stats_ref(HIDDEN, WEIGHT, IGNORING, **o)[1],
}


@pytest.mark.parametrize("function", TARGETED.values(), ids=TARGETED.keys())
def test_ignore_index_of_none(function):
    """As in torch: F.linear_cross_entropy takes None for -100."""
    assert torch.equal(function(ignore_index=None), function(ignore_index=-100))


@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_ignored_ids_are_outside_the_mask(ignore_index, dtype, aggregation):
    ids = torch.where(IGNORING == -100, ignore_index, IGNORING)
    hidden, weight = HIDDEN.to(dtype), WEIGHT.to(dtype)
    options = {"ids": ids, "aggregation": aggregation, "ignore_index": ignore_index}
    found = with_gradient(lambda h, w: head_policy(h, w, **options), hidden, weight)
    smaller = MASK & (ids != ignore_index)
    expected = with_gradient(
        lambda h, w: head_policy(h, w, mask=smaller, ids=IDS, aggregation=aggregation), hidden, weight
    )
    torch.testing.assert_close(found, expected)
    assert not found[1][~smaller].any()


def test_ids_in_the_mask_are_checked_and_the_message_has_no_mark():
    ids = IDS.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(V))
    with pytest.raises(
        ValueError, match=r"ids: got 7 at \[1, 2\] \(1 such\), expected ids in \[0, 7\) or ignore_index -100"
    ):
        head_policy(HIDDEN, WEIGHT, ids=ids)
    outside = IDS.masked_fill(~MASK, 10**9)
    assert torch.equal(head_policy(HIDDEN, WEIGHT, ids=outside), head_policy(HIDDEN, WEIGHT))


PACKED_HIDDEN, PACKED_IDS, ROWS = HIDDEN[:2].reshape(-1, H), IDS[:2].reshape(-1), normal(2)
FIRST = PACKED_HIDDEN[:, 0]
PACKED = {
    "sum_by_sequence": lambda cu, check: sum_by_sequence(FIRST, cu),
    "ppo_loss": lambda cu, check: ppo_loss(
        FIRST, FIRST, FIRST, PACKED_IDS >= 0, aggregation="sequence_mean", cu_seqlens=cu
    ),
    "linear_ppo_loss": lambda cu, check: linear_ppo_loss(
        PACKED_HIDDEN,
        WEIGHT,
        PACKED_IDS,
        FIRST,
        FIRST,
        PACKED_IDS >= 0,
        aggregation="sequence_mean",
        cu_seqlens=cu,
        check=check,
    ),
    "linear_dpo_loss": lambda cu, check: linear_dpo_loss(
        PACKED_HIDDEN,
        WEIGHT.clone().requires_grad_(),
        PACKED_IDS,
        reference_logps=ROWS,
        cu_seqlens=cu,
        check=check,
    ),
    "linear_dpo_loss frozen": lambda cu, check: linear_dpo_loss(
        PACKED_HIDDEN, WEIGHT, PACKED_IDS, reference_logps=ROWS, cu_seqlens=cu, check=check
    ),
    "linear_kto_loss": lambda cu, check: linear_kto_loss(
        PACKED_HIDDEN,
        WEIGHT.clone().requires_grad_(),
        PACKED_IDS,
        ROWS > 0,
        ROWS.abs()[0],
        reference_logps=ROWS,
        cu_seqlens=cu,
        check=check,
    ),
}


@pytest.mark.parametrize("loss", PACKED.values(), ids=PACKED.keys())
@pytest.mark.parametrize("cu_seqlens", [[0, 4, 7], [0, 4, 9], [0, -1, 8], [1, 4, 8], [0, 9, 8]])
def test_cu_seqlens_that_do_not_fit(loss, cu_seqlens):
    loss(torch.tensor([0, 3, 8]), check=False)
    for dtype in (torch.int32, torch.int64):
        with pytest.raises(
            ValueError, match=r"cu_seqlens: got \[.*\], expected 0 <= ... <= N = 8 without a decrease"
        ):
            loss(torch.tensor(cu_seqlens, dtype=dtype), check=True)


@pytest.mark.parametrize("loss", PACKED.values(), ids=PACKED.keys())
@pytest.mark.parametrize(
    "cu_seqlens",
    [torch.tensor(0), torch.empty(0).long(), torch.tensor([[0, 8]]), torch.tensor([0.0, 3.0, 8.0])],
)
def test_cu_seqlens_of_a_wrong_shape_or_dtype(loss, cu_seqlens):
    with pytest.raises(ValueError, match="cu_seqlens: got (shape|torch.float32)"):
        loss(cu_seqlens, check=False)
