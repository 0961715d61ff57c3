"""What the results of all ranks of a sharded head must be, for any number of ranks."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from fastalign_kernels.linear.chunks import planned_chunks
from fastalign_kernels.linear.inputs import HeadInputs, NeedsGrad
from fastalign_kernels.linear.options import HeadOptions
from fastalign_kernels.linear.sequence_chunks import group_chunks
from fastalign_kernels.linear.sequences import Rows
from fastalign_kernels.linear.sharded import Shards
from tests.linear.sharded_cases import CASES, ROWS, TIGHT, Data, H, K, N, Result, V, run
from tests.linear.sharded_ranks import DTYPES, LAYOUTS, TAIL, WORKSPACES, rows_of, tail_case
from tests.tolerance import assert_no_worse_than_eager

Found = list[dict[str, Any]]
SHARDED = ("weight", "bias", "lora_b")  # of which each rank has rows


def assert_equal_in_fp64(found: Tensor, truth: Tensor, what: str) -> None:
    """To 1e-12 of the largest element."""
    if truth.dtype == torch.bool:
        assert torch.equal(found, truth), what
        return
    assert torch.equal(found.isfinite(), truth.isfinite()), what
    size = max(truth.abs().nan_to_num(0.0).max().item(), 1e-3) if truth.numel() else 1.0
    torch.testing.assert_close(
        found, truth, rtol=0, atol=1e-12 * size, equal_nan=True, msg=f"{what}: {{}}".format
    )


@functools.cache
def _whole(name: str, dtype: str, plain: bool) -> Result:
    return run(CASES[name], Data.drawn(DTYPES[dtype]), plain=plain)


def whole(name: str, layout: str, rank: int, ranks: int) -> Result:
    """A case in one process in fp64, with the gradients of the rows of a rank."""
    mine, result = rows_of(LAYOUTS[ranks][layout], rank), _whole(name, "fp64", False)
    of_rows = [
        gradient[mine] if argument in SHARDED else gradient
        for argument, gradient in zip(CASES[name].trained, result.gradients)
    ]
    return result._replace(gradients=of_rows)


def check_case(found: Found, name: str, layout: str) -> None:
    """fp64 equals one process to 1e-12; fp32 is no worse than plain PyTorch; all ranks have the same bits."""
    ranks = len(found)
    for workspace in WORKSPACES:
        for rank, of_rank in enumerate(found):
            ours, truth = of_rank["cases"][layout, name, "fp64", workspace], whole(name, layout, rank, ranks)
            pairs = zip((*ours.outputs, *ours.gradients), (*truth.outputs, *truth.gradients), strict=True)
            for mine, right in pairs:
                assert_equal_in_fp64(mine, right, f"{name}, {workspace}, rank {rank}")
        _check_fp32(name, [of_rank["cases"][layout, name, "fp32", workspace] for of_rank in found], workspace)


def _check_fp32(name: str, of_ranks: list[Result], workspace: str) -> None:
    """The rows of all ranks together: eager's largest error is one of the whole tensor."""
    eager, truth = _whole(name, "fp32", True), _whole(name, "fp64", False)
    for rank, result in enumerate(of_ranks):
        what = f"{name}, {workspace}, rank {rank}"
        assert all(map(torch.equal, result.outputs, of_ranks[0].outputs)), f"{what}: other bits than rank 0"
        gradients = [
            torch.cat([other.gradients[place] for other in of_ranks]) if argument in SHARDED else gradient
            for place, (argument, gradient) in enumerate(zip(CASES[name].trained, result.gradients))
        ]
        for ours, theirs, right in zip(
            (*result.outputs, *gradients),
            (*eager.outputs, *eager.gradients),
            (*truth.outputs, *truth.gradients),
            strict=True,
        ):
            if ours.dtype == torch.bool:
                assert torch.equal(ours, right), what
            else:
                terms = 32 if name == "outputs, softcap" else 1  # mean_logit is mean log P + lse
                assert_no_worse_than_eager(ours, theirs, right.double(), what, terms=terms)


def check_tails(found: Found, layout: str) -> None:
    """Losses are exact; gradients are as near to the exact ones as those of one rank's tail."""
    ranks = len(found)
    for name in {case for of_layout, case in found[0]["tails"] if of_layout == layout}:
        case, data = tail_case(name), Data.drawn(torch.float64)
        exact = run(case, data)
        one_rank = run(case, data, tail_eps=TAIL, workspace_mib=TIGHT)
        of_ranks = [of_rank["tails"][layout, name] for of_rank in found]
        for result in of_ranks:
            for ours, right in zip(result.outputs, exact.outputs, strict=True):
                assert_equal_in_fp64(ours, right, name)
        for place, argument in enumerate(case.trained):
            parts = [result.gradients[place] for result in of_ranks]
            ours = parts[0] if argument == "hidden" else torch.cat(parts)
            right, theirs = exact.gradients[place], one_rank.gradients[place]
            if V in LAYOUTS[ranks][layout]:  # one rank has all rows
                assert_equal_in_fp64(ours, theirs, f"{name}, d {argument}")
            if (name, argument) == ("cross-entropy", "bias"):  # the tail keeps the sums of all columns
                assert_equal_in_fp64(ours, right, f"{name}, d {argument}")
            error, of_one = ((found - right).norm() / right.norm() for found in (ours, theirs))
            # each rank's part of rank 1 has its own columns' sums: with mixed signs upstream not those of all
            assert error <= ranks * of_one + 1e-12, (
                f"{name}, d {argument}: {error:.3g}, one rank {of_one:.3g}"
            )


def expected_collectives(name: str, ranks: int, workspace: str) -> list[tuple[str, int]]:
    """What the docstring of linear/sharded.py says that a rank sends in a call and its backward pass."""
    case, data = CASES[name], Data.drawn(torch.float64)
    inside = torch.arange(N) % 5 != 1 if name.startswith("ppo") else torch.ones(N, dtype=torch.bool)
    ids = torch.where(inside & (data.ids >= 0), data.ids, -1)
    d_hidden = [("all_reduce_", N * H)] if "hidden" in case.trained else []
    d_hidden += [("all_reduce_", N * 2)] if "lora_a" in case.trained else []  # dU, of rank 2
    if "kept sets" in name:
        return [("all_reduce_", len(data.kept[1])), *d_hidden]
    rows = next(iter(LAYOUTS[ranks].values()))
    options = HeadOptions(workspace_mib=WORKSPACES[workspace], shards=Shards(0, True, rows))
    inputs = HeadInputs(data.hidden, data.weight[: rows[0]], ids, None, options, group="group")
    needs = NeedsGrad("hidden" in case.trained, "weight" in case.trained)

    def gathers(numbers: int) -> list[tuple[str, int]]:
        chunks = planned_chunks(inputs, needs)
        return [("all_gather_into_tensor", numbers * ids[tokens].numel()) for tokens in chunks]

    if name.startswith("distillation"):
        return gathers(K + 2) * (1 + ("none" in name)) + d_hidden
    if name.startswith("outputs"):  # of the doubled logits too
        return [*gathers(6), *gathers(4), *([] if "softcap" in name else [("all_reduce_", N)]), *d_hidden]
    if name.startswith(("dpo", "kto")) and "frozen" not in name:
        sequences = Rows.of(
            ids.view(ROWS, -1), None, group=1 + name.startswith("dpo"), check=False
        ).sequences()
        chunks = [len(tokens) for group in group_chunks(inputs, sequences, needs) for tokens in group]
        return [*gathers(4), *(("all_gather_into_tensor", 4 * count) for count in chunks), *d_hidden]
    if name.startswith(("dpo", "kto")):  # the reference's pass, and the policy's
        return gathers(4) * 2 + d_hidden
    lean = ("label_smoothing" not in case.options and name.startswith("cross")) or name.startswith("logprobs")
    return gathers(4 if lean else 6) + d_hidden


def check_collectives(found: Found, name: str) -> None:
    """Their names, order and bytes."""
    for of_rank in found:
        for workspace in WORKSPACES:
            events = of_rank["counted"][f"{name}, {workspace}"]
            assert events == expected_collectives(name, len(found), workspace), f"{name}, {workspace}"


def check_dtensors(found: Found) -> None:
    data = Data.drawn(torch.float64)
    case = CASES["cross-entropy"]._replace(options={"label_smoothing": 0.1})
    truth = run(case, data)
    for of_rank in found:
        for name, result in of_rank["dtensors"].items():
            for ours, right in zip(
                (*result.outputs, *result.gradients), (*truth.outputs, *truth.gradients), strict=True
            ):
                assert_equal_in_fp64(ours, right, f"hidden is {name}")
        assert_equal_in_fp64(of_rank["mesh"], truth.outputs[0], "one dimension of a mesh")


def check_nothing(found: Found) -> None:
    for of_rank in found:
        for name, result in of_rank["nothing"].items():
            expected = 0.0 if "num_items" in name else math.nan
            torch.testing.assert_close(
                result.outputs[0], torch.tensor(expected, dtype=torch.float64), equal_nan=True
            )
            if "num_items" in name:
                assert all((gradient == 0).all() for gradient in result.gradients), name
