"""The engines of a GPU on the rows of one rank, in Triton's interpreter where there is no GPU.

The ranks run one after another, and their collectives are done here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign_kernels.softmax.rows import Stat

pytest.importorskip(
    "fastalign_kernels.softmax.rows_triton", reason="triton is not installed", exc_type=ImportError
)

from fastalign_kernels.linear import sharded_engine
from fastalign_kernels.linear.engine import Engine, Gradients  # noqa: E402
from fastalign_kernels.linear.gpu import epilogue_gradients, kept_softmax
from fastalign_kernels.linear.gpu import plan as gpu_plan
from fastalign_kernels.linear.gpu.epilogue import EpilogueStatistics  # noqa: E402
from fastalign_kernels.linear.gpu.kept_softmax import KeptSoftmax  # noqa: E402
from fastalign_kernels.linear.gpu.vocab_slices import VocabSlices  # noqa: E402
from fastalign_kernels.linear.inputs import HeadInputs, NeedsGrad  # noqa: E402
from fastalign_kernels.linear.options import HeadOptions  # noqa: E402
from fastalign_kernels.linear.sharded import Shards, local_table, merged_table  # noqa: E402
from fastalign_kernels.linear.sharded_engine import ShardedEngine  # noqa: E402
from fastalign_kernels.linear.token_losses import TokenCrossEntropy  # noqa: E402
from tests.linear.epilogue_cases import TILES  # noqa: E402
from tests.linear.test_gpu_engines import CLOSE, N, V, make, truth  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy's, in the interpreter
]
OPTIONS = HeadOptions(logit_scale=0.7, softcap=5.0, temperature=1.3)
ROWS = (100, 0, 200)
ENGINES: dict[str, Any] = {
    "kept softmax": lambda: KeptSoftmax(1.0),
    "kept softmax, in blocks": lambda: KeptSoftmax((4 * 4 + 8 * 2) * V / 2**20),
    "slices": lambda: VocabSlices(N * (6 * 112 + 2 * 16) / 2**20),
}
NEEDS = NeedsGrad(hidden=True, weight=True, bias=True)


@pytest.fixture(autouse=True)
def tiny_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_plan, "TILES", (8, 4))
    monkeypatch.setattr(gpu_plan, "GRANULE", 4)


class Sum:
    """A sum over ranks that only looks whether its tensor is written after it began."""

    def __init__(self, x: Tensor, ranks: object) -> None:
        self.x, self.begun_with = x, x

    def start(self) -> None:
        self.begun_with = self.x.clone()

    def finish(self) -> Tensor:
        assert torch.equal(self.x, self.begun_with)
        return self.x


class Ranks:
    """Engines of all ranks, each on its rows, and collectives among them."""

    def __init__(self, inputs: HeadInputs, local: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        assert inputs.bias is not None
        self.engines: list[Engine] = [ShardedEngine(local()) for _ in ROWS]
        self.inputs = []
        for rank in range(len(ROWS)):
            shards = Shards(rank, True, ROWS)
            rows = slice(shards.first, shards.first + ROWS[rank])
            options = inputs.options._replace(shards=shards)
            self.inputs.append(
                inputs._replace(
                    weight=inputs.weight[rows], bias=inputs.bias[rows], options=options, group="group"
                )
            )
        self.tables: list[Tensor] = []
        monkeypatch.setattr(sharded_engine, "whole_stats", self._whole_stats)
        monkeypatch.setattr(sharded_engine, "RankSum", Sum)

    def _whole_stats(self, local: Tensor, ids: Tensor, shards: Shards, group: str, *, lean: bool) -> Tensor:
        """A first pass over the ranks collects their tables; in a second one they are merged."""
        if len(self.tables) < len(ROWS):
            self.tables.append(local_table(local, lean=lean))
            return local
        return merged_table(torch.stack(self.tables), ids, shards)

    def statistics(self) -> list[tuple[Tensor, list[Tensor]]]:
        self.tables = []
        for engine, inputs in zip(self.engines, self.inputs):
            engine.statistics(inputs, NEEDS)
        return [engine.statistics(inputs, NEEDS) for engine, inputs in zip(self.engines, self.inputs)]

    def gradients(self, stats: Tensor, saved: list[list[Tensor]], coefficients: Tensor) -> Gradients:
        found = [
            engine.gradients(inputs, stats, of_rank, coefficients, NEEDS)
            for engine, inputs, of_rank in zip(self.engines, self.inputs, saved)
        ]
        return Gradients(
            torch.stack([grads.hidden for grads in found]).sum(0),
            torch.cat([grads.weight for grads in found]),
            torch.cat([grads.bias for grads in found]),
            *found[0][3:],
        )


@pytest.mark.parametrize(
    "engine, dtype",
    [*((engine, torch.float32) for engine in ENGINES), ("kept softmax", torch.bfloat16)],
    ids=str,
)
def test_statistics_and_gradients_are_those_of_whole_rows(
    device: str, engine: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make(device, dtype, OPTIONS)
    ranks = Ranks(inputs, ENGINES[engine], monkeypatch)
    per_rank = ranks.statistics()
    stats = per_rank[0][0]
    assert all(torch.equal(of_rank, stats) for of_rank, _ in per_rank)
    loss = TokenCrossEntropy(torch.linspace(-1, 2, N, device=device), 0.1, 0.01, V)
    expected_stats, expected = truth(inputs, lambda table: loss(table, slice(None)))
    torch.testing.assert_close(stats.double(), expected_stats, rtol=1e-5, atol=2e-5)
    coefficients = loss(stats, slice(None))
    once = ranks.gradients(stats, [saved for _, saved in per_rank], coefficients)
    again = ranks.gradients(stats, [[] for _ in ROWS], coefficients)  # the first overwrote what was saved
    for found in (once, again):
        for name, ours, right in zip(Gradients._fields[:3], found, expected):
            error = (ours.double() - right).norm() / right.norm()
            assert error <= CLOSE[dtype], f"d {name} is off by {error:.3g}"
    assert stats[Stat.TOP1].sum() == expected_stats[Stat.TOP1].sum()


@pytest.mark.parametrize("engine", ["kept softmax", "kept softmax, in blocks", "epilogue"])
def test_the_sum_of_dx_begins_before_the_last_gemm_of_dw(
    device: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that it runs beside it. In blocks it is the last block's."""
    log: list[str] = []
    module, name = (epilogue_gradients, "mm") if engine == "epilogue" else (kept_softmax, "product")
    product = getattr(module, name)

    def noted(left: Tensor, right: Tensor, out: Tensor, **options: bool) -> None:
        log.append("dW" if out.shape[0] == ROWS[0] else "dX")
        product(left, right, out, **options)

    def begun(total: Sum) -> None:
        log.append("sum")

    local = {**ENGINES, "epilogue": lambda: EpilogueStatistics(tiles=TILES)}[engine]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    inputs = make(device, dtype, HeadOptions(logit_scale=0.7))
    ranks = Ranks(inputs, local, monkeypatch)
    stats, saved = ranks.statistics()[0]
    monkeypatch.setattr(module, name, noted)
    monkeypatch.setattr(Sum, "start", begun)
    coefficients = torch.ones(4, N, dtype=stats.dtype, device=device)
    ranks.engines[0].gradients(ranks.inputs[0], stats, saved, coefficients, NEEDS)
    assert log[-3:] == ["dX", "sum", "dW"] and log.count("sum") == 1
