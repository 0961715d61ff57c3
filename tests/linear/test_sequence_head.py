"""DPO and KTO through the head: every way equals plain PyTorch with full logits, padded or packed, whatever
the workspace."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign.measure import peak_memories
from fastalign_kernels import linear_dpo_loss, linear_kto_loss
from fastalign_kernels.linear import chunks
from fastalign_kernels.linear.options import HeadOptions
from fastalign_kernels.preference.formulas import DPO_LOSS_TYPES
from fastalign_kernels.preference.reference import dpo_loss_ref, kto_loss_ref
from tests.linear.inputs import op_arguments

V, H, T, S = 257, 16, 9, 3
# One of the rows has no scored token, and a NaN hidden state stands where none is read.
MIB_A_TOKEN = V * 8 / 2**20  # of fp64 logits
# The pairs have 10, 9 and 8 tokens. All at once; two fit and one does not; chunks of 4 tokens at most, 3 for
# two of the pairs; of 1 token.
WORKSPACES = [1.0, 9 * MIB_A_TOKEN, 4 * MIB_A_TOKEN, MIB_A_TOKEN]
TIGHT = 4 * MIB_A_TOKEN


def inputs(dtype: torch.dtype, rows: int, device: str = "cpu") -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    hidden, reference = (torch.randn(rows, T, H, generator=generator).to(device, dtype) for _ in range(2))
    weight, reference_weight = (torch.randn(V, H, generator=generator).to(device, dtype) for _ in range(2))
    ids = torch.randint(V, (rows, T), generator=generator)
    lengths = torch.tensor([4, 9, 1, 6, 0, 7, 3, 9, 2, 5][:rows])
    ids[torch.arange(T) >= lengths[:, None]] = -100
    hidden[ids.to(device) < 0] = torch.nan
    bias = torch.randn(V, generator=generator).to(device, dtype)
    trained = {
        "hidden": hidden.requires_grad_(),
        "weight": weight.requires_grad_(),
        "bias": bias.requires_grad_(),
    }
    return trained | {
        "ids": ids.to(device),
        "reference_hidden": reference,
        "reference_weight": reference_weight,
    }


def logps_of(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """[rows], by full logits."""
    z = torch.where((ids >= 0)[..., None], hidden, 0) @ weight.t() + (0 if bias is None else bias)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logp = (z / temperature).log_softmax(-1).gather(-1, ids.clamp(min=0)[..., None])[..., 0]
    return torch.where(ids >= 0, logp, 0).sum(-1)


def plain(given: dict[str, Any], loss: Any, **head: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        reference = logps_of(given["reference_hidden"], given["reference_weight"], given["ids"], None, **head)
    logps = logps_of(given["hidden"], given["weight"], given["ids"], given["bias"], **head)
    return loss(logps, reference), logps.detach()


def gradients(loss: Tensor, given: dict[str, Any]) -> dict[str, Tensor]:
    names = [
        name for name in ("hidden", "weight", "bias") if given[name] is not None and given[name].requires_grad
    ]
    return dict(zip(names, torch.autograd.grad(loss, [given[name] for name in names])))


def packed(given: dict[str, Any]) -> dict[str, Any]:
    """The rows without their ignored tokens, one behind the other."""
    kept = given["ids"] >= 0
    ends = torch.cat([torch.zeros(1, dtype=torch.int64, device=kept.device), kept.sum(1).cumsum(0)])
    dense = {name: given[name].detach()[kept] for name in ("hidden", "reference_hidden", "ids")}
    dense["hidden"].requires_grad_()
    return given | dense | {"cu_seqlens": ends}


def dpo(logps: Tensor, reference: Tensor, /, **options: Any) -> Tensor:
    return dpo_loss_ref(logps[:S], logps[S:], reference[:S], reference[S:], **options).loss


@pytest.mark.parametrize("loss_type", DPO_LOSS_TYPES)
@pytest.mark.parametrize("workspace", [*WORKSPACES, None])
def test_dpo_equals_plain_pytorch(loss_type: str, workspace: float | None, device: str) -> None:
    given = inputs(torch.float64, 2 * S)
    options: dict[str, Any] = {
        "beta": 0.3,
        "loss_type": loss_type,
        "label_smoothing": 0.1 if loss_type == "exo_pair" else 0.0,
    }
    lengths: dict[str, Any] = {}
    if loss_type == "sigmoid_norm":
        counts = (given["ids"] >= 0).sum(1)
        lengths = {"chosen_lengths": counts[:S], "rejected_lengths": counts[S:]}
    head: dict[str, Any] = {"softcap": 8.0, "temperature": 1.3}
    loss, logps = plain(given, lambda *a: dpo(*a, **options, **lengths), **head)
    expected = gradients(loss, given)
    for ours in (given, packed(given)):
        found = linear_dpo_loss(**ours, **options, **head, workspace_mib=workspace)
        torch.testing.assert_close(found.loss, loss.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            torch.cat([found.chosen_logps, found.rejected_logps]), logps, rtol=1e-12, atol=1e-12
        )
        found_grads = gradients(found.loss, ours)
        kept = given["ids"] >= 0
        for name, gradient in expected.items():
            true = gradient[kept] if name == "hidden" and ours is not given else gradient
            torch.testing.assert_close(found_grads[name], true, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_kto_equals_plain_pytorch(loss_type: str, workspace: float) -> None:
    given = inputs(torch.float64, 5)
    desirable, kl = torch.tensor([True, False, True, True, False]), torch.tensor(0.2, dtype=torch.float64)
    options: dict[str, Any] = {
        "beta": 0.3,
        "loss_type": loss_type,
        "desirable_weight": 1.3,
        "undesirable_weight": 0.7,
    }
    loss, logps = plain(
        given, lambda logps, reference: kto_loss_ref(logps, reference, desirable, kl, **options).loss
    )
    expected = gradients(loss, given)
    for ours in (given, packed(given)):
        found = linear_kto_loss(**ours, desirable=desirable, kl=kl, **options, workspace_mib=workspace)
        torch.testing.assert_close((found.loss, found.logps), (loss.detach(), logps), rtol=1e-12, atol=1e-12)
        found_grads = gradients(found.loss, ours)
        for name in ("weight", "bias"):
            torch.testing.assert_close(found_grads[name], expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "room, pairs, rows",
    [
        (19, [19, 8], [14, 6]),
        (9, [9, 8, *[5] * 3], [4, 9, 7]),
        (4, [4, 3, 3, 4, 3, *[3] * 5, *[4] * 3], [4, 1, *[3] * 5, *[3] * 3]),
    ],
)
def test_of_a_long_unit_the_logits_of_all_chunks_but_one_are_made_again(
    room: int, pairs: list[int], rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """GEMMs for logits, as [tokens] of each: the pairs have 10, 9 and 8 tokens, the rows 4, 9, 1, 6 and 0,
    and `room` fit the workspace."""
    seen: list[int] = []
    tiles = set()
    mm = chunks.mm

    def counted(a: Tensor, b: Tensor, out: Tensor) -> None:
        assert out.shape == (len(a), V) and out.untyped_storage().nbytes() <= room * V * 8
        seen.append(len(a))
        tiles.add(out.data_ptr())
        mm(a, b, out)

    monkeypatch.setattr(chunks, "mm", counted)
    given = inputs(torch.float64, 2 * S)
    options = {name: given[name] for name in ("hidden", "weight", "ids", "bias")}
    linear_dpo_loss(
        **options, reference_logps=torch.zeros(2 * S, dtype=torch.float64), workspace_mib=room * MIB_A_TOKEN
    )
    assert seen == pairs and len(tiles) == 1
    seen.clear()
    options |= {name: options[name][:5] for name in ("hidden", "ids")}
    unpaired: dict[str, Any] = {"desirable": torch.arange(5) % 2 == 0, "kl": torch.zeros(())}
    linear_kto_loss(
        **options,
        **unpaired,
        reference_logps=torch.zeros(5, dtype=torch.float64),
        workspace_mib=room * MIB_A_TOKEN,
    )
    assert seen == rows


@pytest.mark.parametrize("scored", [[], [0, 3], [2]], ids=["none", "a pair", "a chosen row"])
def test_pairs_without_a_scored_token(scored: list[int]) -> None:
    given = inputs(torch.float64, 2 * S)
    given["ids"] = torch.full_like(given["ids"], -100)
    given["ids"][scored] = 7
    given["hidden"] = torch.where(
        (given["ids"] < 0)[..., None], torch.nan, given["hidden"].detach().nan_to_num()
    ).requires_grad_()
    loss, logps = plain(given, dpo)
    found = linear_dpo_loss(**given, workspace_mib=TIGHT)
    torch.testing.assert_close(
        (found.loss, torch.cat([found.chosen_logps, found.rejected_logps])), (loss.detach(), logps)
    )
    expected, found_grads = gradients(loss, given), gradients(found.loss, given)
    for name, gradient in expected.items():
        torch.testing.assert_close(found_grads[name], gradient, rtol=1e-10, atol=1e-12)


TARGET = f"""
import torch

from fastalign_kernels import linear_dpo_loss

def pair(tokens, workspace_mib):
    hidden = torch.ones(2, tokens, {H}, requires_grad=True)
    weight = torch.zeros(8192, {H}, requires_grad=True)
    ids, reference = torch.arange(2 * tokens).view(2, tokens) % 8192, torch.zeros(2)
    return lambda: linear_dpo_loss(
        hidden, weight, ids, reference_logps=reference, workspace_mib=workspace_mib
    ).loss.backward()
"""


@pytest.mark.cpu_only
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(),
    reason="peak memory of a process needs Linux's /proc/self/clear_refs",
)
def test_a_longer_pair_takes_no_more_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A workspace of 32 MiB holds 1024 tokens; beyond it come the gradients, 2 MiB at most, and what the
    GEMMs pack."""
    (tmp_path / "long_pairs.py").write_text(TARGET)
    monkeypatch.syspath_prepend(tmp_path)
    calls = [{"tokens": tokens, "workspace_mib": 32} for tokens in (512, 1024, 8192)]
    fits, twice, long = peak_memories("long_pairs:pair", calls, warmup=calls[1])
    assert 32 < fits < 48 and twice < 48 and long < fits + 8


def test_first_losses() -> None:
    """The policy is its own reference: ln 2 and 1/2, no rewards."""
    given = inputs(torch.float32, 2 * S)
    given |= {
        "reference_hidden": given["hidden"].detach(),
        "reference_weight": given["weight"].detach(),
        "reference_bias": given["bias"].detach(),
    }
    found = linear_dpo_loss(**given)
    assert (
        abs(found.loss.item() - 0.6931472) < 1e-6
        and not found.chosen_rewards.any()
        and not found.rejected_rewards.any()
    )
    unpaired = linear_kto_loss(**given, desirable=torch.arange(2 * S) % 2 == 0, kl=torch.zeros(()))
    assert abs(unpaired.loss.item() - 0.5) < 1e-7 and not unpaired.rewards.any()


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("workspace", [None, TIGHT])
def test_one_trained_tensor(trained: str, dtype: torch.dtype, workspace: float | None) -> None:
    """A frozen head, and fp16, whose gradients come in the backward pass, give the same."""
    given = inputs(torch.float64, 2 * S)
    for name in ("hidden", "weight", "bias"):
        given[name] = given[name].detach().to(dtype).requires_grad_(name == trained)
    given |= {name: given[name].to(dtype) for name in ("reference_hidden", "reference_weight")}
    wide = {
        name: value.detach().double() if value.is_floating_point() else value for name, value in given.items()
    }
    wide[trained].requires_grad_()
    loss, _ = plain(wide, dpo)
    found = linear_dpo_loss(**given, workspace_mib=workspace)
    tolerance = 2e-3 if dtype == torch.float16 else 1e-5
    torch.testing.assert_close(found.loss.double(), loss.detach(), rtol=tolerance, atol=tolerance)
    found_grads, expected = gradients(found.loss, given)[trained].double(), gradients(loss, wide)[trained]
    assert (found_grads - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("workspace", [None, TIGHT])
def test_low_precision_is_no_worse_than_eager(workspace: float | None, no_worse_than_eager) -> None:
    given = inputs(torch.bfloat16, 2 * S)
    wide = {
        name: value.detach().double().requires_grad_(value.requires_grad)
        if value.is_floating_point()
        else value
        for name, value in given.items()
    }
    truth, _ = plain(wide, dpo)
    eager, _ = plain(given, lambda logps, reference: dpo(logps.float(), reference.float()))
    found = linear_dpo_loss(**given, workspace_mib=workspace)
    expected, theirs, found_grads = (
        gradients(truth, wide),
        gradients(eager, given),
        gradients(found.loss, given),
    )
    for name, true in expected.items():
        no_worse_than_eager(found_grads[name], theirs[name], true, name)


def test_upstream_scale_and_a_second_backward() -> None:
    given = inputs(torch.float64, 2 * S)
    found = linear_dpo_loss(**given)
    names = ("hidden", "weight", "bias")
    first = torch.autograd.grad(3 * found.loss, [given[name] for name in names], retain_graph=True)
    second = torch.autograd.grad(found.loss, [given[name] for name in names])
    for name, a, b in zip(names, first, second):
        torch.testing.assert_close(a, 3 * b, rtol=1e-12, atol=1e-15, msg=name)


@pytest.mark.parametrize("tail_eps", [None, 0.1])
def test_opcheck_and_compile(tail_eps: float | None) -> None:
    given = inputs(torch.float32, 2 * S) | {"tail_eps": tail_eps}
    ids = torch.where(given["ids"] < 0, -1, given["ids"]).flatten()
    ends, reference = (
        torch.arange(0, 2 * S * T + 1, T),
        torch.randn(2 * S, generator=torch.Generator().manual_seed(1)),
    )
    head = (
        given["hidden"].detach().nan_to_num().view(-1, H).requires_grad_(),
        given["weight"],
        ids,
        given["bias"],
    )
    options = HeadOptions(tail_eps=tail_eps)
    ops = torch.ops.fastalign
    pairs = op_arguments(head, ends, reference, None, "sigmoid", 0.1, 0.0, options=options)
    torch.library.opcheck(ops.head_pairs.default, pairs)
    desirable, kl = torch.arange(2 * S) % 2 == 0, torch.tensor(0.2)
    unpaired = op_arguments(head, ends, reference, desirable, kl, [0.1, 1.0, 1.5], options=options)
    torch.library.opcheck(ops.head_unpaired.default, unpaired)
    step = torch.compile(lambda **tensors: linear_dpo_loss(**tensors), fullgraph=True, backend="aot_eager")
    eager, ours = linear_dpo_loss(**given), step(**given)
    torch.testing.assert_close(tuple(ours), tuple(eager))
    for name, gradient in gradients(ours.loss, given).items():
        torch.testing.assert_close(gradient, gradients(linear_dpo_loss(**given).loss, given)[name])


@pytest.mark.parametrize(
    "change, said",
    [
        (
            {"ids": torch.zeros(6 * T, dtype=torch.int64)},
            r"ids: got shape \[54\], expected \[rows, T\], or \[N\] with cu_seqlens",
        ),
        ({"ids": torch.zeros(5, T, dtype=torch.int64)}, "ids: got 5 rows, expected the chosen ones"),
        ({"reference_logps": torch.zeros(6)}, "reference_hidden, reference_logps: got both"),
        (
            {"reference_logps": torch.zeros(6), "reference_hidden": None},
            "reference_weight, reference_logps: got both, expected one of them",
        ),
        ({"reference_hidden": None}, "reference_hidden, reference_logps: got neither"),
        ({"reference_weight": None}, "reference_weight: got None"),
        (
            {"reference_hidden": None, "reference_weight": None, "reference_logps": torch.zeros(5)},
            r"reference_logps: got shape \[5\]",
        ),
        ({"loss_type": "dpo"}, "loss_type: got 'dpo'"),
        ({"beta": 0.0}, "beta: got 0.0"),
        ({"weight": torch.zeros(V, H + 1)}, "^hidden: got shape"),
        (
            {"reference_weight": torch.zeros(V, H + 1)},
            "^reference_hidden: got shape .* as in reference_weight",
        ),
        (
            {"reference_hidden": torch.zeros(6, T + 1, H)},
            "^reference_hidden, reference_weight: ids: got shape",
        ),
        (
            {"reference_weight": torch.zeros(1, H)},
            r"^reference_hidden, reference_weight: ids: got .* \[0, 1\)",
        ),
        ({"reference_weight": torch.zeros(V, H).half()}, "^reference_weight: got torch.float16"),
        ({"reference_bias": torch.zeros(V + 1)}, "^reference_bias: got shape"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_by_name(change: dict[str, Any], said: str) -> None:
    given = inputs(torch.float32, 2 * S)
    given["reference_bias"] = None
    with pytest.raises(ValueError, match=said):
        linear_dpo_loss(**given | change)


def test_no_rows_at_all_is_the_mean_of_nothing() -> None:
    given = inputs(torch.float32, 0)
    found = linear_dpo_loss(**given)
    assert found.loss.isnan() and found.chosen_logps.shape == (0,)
    assert linear_kto_loss(
        **given, desirable=torch.zeros(0, dtype=torch.bool), kl=torch.zeros(())
    ).loss.isnan()
