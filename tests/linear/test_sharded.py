"""The head with its vocabulary sharded over two ranks equals the head of one process.

Two processes compute everything once (sharded_ranks.py). `python -m tests.hammer.sharded_head 4` does the
same with four.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastalign_kernels import linear_cross_entropy, linear_logprobs
from fastalign_kernels.linear import sharded_agreement
from fastalign_kernels.linear.chunks import planned_chunks
from fastalign_kernels.linear.inputs import HeadInputs, NeedsGrad
from fastalign_kernels.linear.options import HeadOptions
from fastalign_kernels.linear.sequence_chunks import group_chunks
from fastalign_kernels.linear.sequences import Rows
from fastalign_kernels.linear.sharded import Shards
from tests.linear import sharded_checks, sharded_ranks
from tests.linear.sharded_cases import CASES, Data, run
from tests.two_ranks import run_as_ranks

pytestmark = pytest.mark.cpu_only
RANKS = 2
FSDP2 = "weight: got a parameter that FSDP2 shards, .*expected the gathered weight"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank computed."""
    folder: Path = tmp_path_factory.mktemp("sharded")
    run_as_ranks(sharded_ranks.__file__, folder, RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize("layout", sharded_ranks.LAYOUTS[RANKS])
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_one_process(found: list, name: str, layout: str) -> None:
    sharded_checks.check_case(found, name, layout)


@pytest.mark.parametrize("layout", sharded_ranks.LAYOUTS[RANKS])
def test_the_tail_is_as_near_as_on_one_rank(found: list, layout: str) -> None:
    sharded_checks.check_tails(found, layout)


@pytest.mark.parametrize("name", CASES)
def test_the_collectives_are_those_of_the_docstring(found: list, name: str) -> None:
    sharded_checks.check_collectives(found, name)


def test_dtensors_bring_their_group(found: list) -> None:
    sharded_checks.check_dtensors(found)


def test_ligers_losses_of_a_sharded_head(found: list) -> None:
    """The mean logit, which they return too, is that of the whole vocabulary."""
    for of_rank in found:
        sharded, whole = of_rank["liger"]["sharded"], of_rank["liger"]["whole"]
        for number, (x, y) in enumerate(zip(sharded, whole, strict=True)):
            sharded_checks.assert_equal_in_fp64(x.detach(), y.detach(), f"output {number}")


def test_no_tokens_to_average(found: list) -> None:
    """0 with num_items, for the loss and the gradients; NaN without, as in torch."""
    sharded_checks.check_nothing(found)


@pytest.mark.parametrize("name", ["cross-entropy, all options", "logprobs"])
def test_compiled_code_is_one_graph(found: list, name: str) -> None:
    for rank, of_rank in enumerate(found):
        layout = next(iter(sharded_ranks.LAYOUTS[RANKS]))
        ours, truth = of_rank["compiled"][name], sharded_checks.whole(name, layout, rank, RANKS)
        for x, y in zip((*ours.outputs, *ours.gradients), (*truth.outputs, *truth.gradients), strict=True):
            sharded_checks.assert_equal_in_fp64(x, y, name)


def test_a_compiled_loss_outside_of_a_model_under_fsdp2(found: list) -> None:
    """Of the gathered weight, with other tokens on each rank."""
    data = Data.drawn(torch.float64)
    case = CASES["cross-entropy"]._replace(options={"num_items": 1.0}, trained=("weight", "bias"))
    truth = run(case, data)
    for of_rank in found:
        ours = of_rank["gathered"]
        for x, y in zip((*ours.outputs, *ours.gradients), (*truth.outputs, *truth.gradients), strict=True):
            sharded_checks.assert_equal_in_fp64(x, y, "gathered")


REFUSALS = {
    "no group": "group: got 'tp', expected a torch.distributed.ProcessGroup, one dimension",
    "two dimensions": r"group: got a DeviceMesh of 2 dimensions \('dp', 'tp'\), expected one dimension",
    "destroyed": "group: got a process group that was destroyed, expected one that is initialised",
    "another group": "group: got another process group than the DTensor's",
    "columns": r"weight: got a DTensor with placements \(Shard\(dim=1\),\) .*expected rows",
    "replicated": r"weight: got a DTensor with placements \(Replicate\(\),\) .*expected rows",
    "FSDP2": FSDP2,
    "FSDP2, detached": FSDP2,
    "FSDP2, compiled": FSDP2,
    "FSDP2, computed from, compiled": FSDP2,
    "HSDP": FSDP2,
    "rows of another V": r"weight: got shards of \[40, 83\] rows, expected 124 in all",
    "plain bias": "bias: got a DTensor beside a plain tensor, expected it sharded as weight is",
    "DTensor hidden": "hidden: got a DTensor with a weight that is none, expected a plain tensor",
    "DTensor ids": "targets: got a DTensor, expected a plain tensor on each rank",
    "DTensor bias": "bias: got a DTensor",
    "DTensor weights": "token_weights: got a DTensor, expected a plain tensor",
    "DTensor num_items": "num_items: got a DTensor, expected a plain tensor",
    "DTensor adapter": "lora: got a DTensor, expected a plain tensor",
    "DTensor mask": "mask: got a DTensor, expected a plain tensor",
    "other columns": r"weight.shape\[1\]: got \[19, 18\] on the ranks of group, expected the same",
    "hidden needs grad on rank 0": r"hidden.requires_grad: got \[True, False\] on the ranks of group",
    "weight needs grad on rank 0": r"weight.requires_grad: got \[True, False\] on the ranks of group",
    "bias on rank 0": "bias: got \\['one without a gradient', 'none'\\] on the ranks of group",
    "adapter on rank 0": r"lora: got \['rank 3, nothing trained', 'none'\] on the ranks of group",
    "A needs grad on rank 0": r"lora: got \['rank 3, A trained', 'rank 3, nothing trained'\] on the ranks",
    "other A": r"lora's A: got other values on ranks \[1\] of group than on rank 0",
    "other workspace": r"workspace_mib: got \[1.0, 2.0\] on the ranks of group, expected the same",
    "no reduction on rank 0": r"reduction: got \['none', 'mean'\] on the ranks of group, expected the same",
    "other smoothing": r"label_smoothing: got \[0.0, 0.25\] on the ranks of group, expected the same",
    "other z_loss": r"z_loss: got \[0.0, 0.25\] on the ranks of group, expected the same",
    "no reduction of a distillation on rank 0": r"reduction: got \['none', 'sum'\] on the ranks of group",
    "tail on rank 0": r"tail_eps: got \[0.0099.*, 0.0\] on the ranks of group, expected the same",
    "other hidden": r"hidden: got other values on ranks \[1\] of group than on rank 0",
    "other ids": r"ids: got other values on ranks \[1\] of group than on rank 0",
    "other ids, first call": r"ids: got other values on ranks \[1\] of group than on rank 0",
    "other ids, compiled": r"ids: got other values on ranks \[1\] of group than on rank 0",
    "other hidden, compiled": r"hidden: got other values on ranks \[1\] of group than on rank 0",
    "whole weight": "weight: got the same rows on all ranks of group, expected other rows on each",
    "whole weight, compiled": "weight: got the same rows on all ranks of group, expected other rows on each",
    "ids": r"targets: got 123 at \[0\] \(36 such\), expected ids in \[0, 123\) or ignore_index -100",
    "screen": "screen: got True, expected None: a head with a sharded vocabulary has exact logits alone",
    "lora beside a DTensor": "lora: got an adapter with a DTensor as hidden, expected plain hidden states",
    "whole reference": "reference_weight: got the same rows on all ranks of group, expected other rows",
    "whole reference of zeros": "reference_weight: got 246 rows over the ranks of group, expected 123 as in",
    "sample": "logits: got a DTensor, expected a plain tensor of the whole vocabulary on each rank",
    "logits": "logits: got a DTensor, expected a plain tensor of the whole vocabulary on each rank",
    "Liger's JSD": "student_weight: got a DTensor, expected a plain tensor on each rank",
    "class probabilities": "weight: got a DTensor, expected a plain tensor on each rank",
    "tail report": "weight: got a DTensor, expected a plain tensor: a report measures on one rank",
}


@pytest.mark.parametrize("wrong", REFUSALS)
def test_refusals_are_one_line_on_every_rank(found: list, wrong: str) -> None:
    for of_rank in found:
        message = of_rank["refusals"][wrong]
        with pytest.raises(ValueError, match=REFUSALS[wrong]):
            raise ValueError(message)
        assert "\n" not in message


def test_a_later_group_of_the_same_name_asks_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier group's ranks said of a weight is not theirs."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    asked = []

    def answer(facts: tuple[int, ...], ids: object, group: str, ranks: int, device: str) -> tuple[int, ...]:
        asked.append((group, ranks))
        return (facts[0],) * ranks

    monkeypatch.setattr(sharded_agreement, "_agreed_rows", answer)
    hidden, weight, ids = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 4])
    for ranks in (1, 2, 2):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        try:
            for _ in range(2):
                linear_cross_entropy(hidden, weight, ids, group=dist.group.WORLD)
        finally:
            dist.destroy_process_group()
    assert asked == [("0", 1), ("0", 2)], "once for each set of ranks"


def test_a_group_before_torch_distributed_is_initialised() -> None:
    hidden, weight, ids = torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64)
    group = dist.ProcessGroup(dist.HashStore(), 0, 1)
    with pytest.raises(
        ValueError, match="group: got a ProcessGroup before torch.distributed was initialised"
    ):
        linear_logprobs(hidden, weight, ids, group=group)


@pytest.mark.parametrize("tail_eps", [None, 1e-3])
def test_all_ranks_plan_the_same_chunks(tail_eps: float | None) -> None:
    """From the largest shard: a rank that followed its own rows would wait for the others' collectives."""
    rows, T = (3, 40, 0, 80), 12

    def chunks(rank: int) -> list[int]:
        shards = Shards(rank, True, rows)
        options = HeadOptions(workspace_mib=0.002, tail_eps=tail_eps, shards=shards)
        ids = torch.arange(4 * T) % 123
        inputs = HeadInputs(
            torch.zeros(4 * T, 8), torch.zeros(rows[rank], 8), ids, None, options, group="group"
        )
        needs = NeedsGrad(hidden=True, weight=True)
        groups = group_chunks(inputs, Rows.of(ids.view(4, T), None, group=2, check=False).sequences(), needs)
        planned = [inputs.ids[tokens].numel() for tokens in planned_chunks(inputs, needs)]
        return [*planned, -1, *(len(tokens) for group in groups for tokens in group)]

    expected = chunks(0)
    assert len(expected) > 8 and all(chunks(rank) == expected for rank in range(1, 4))
