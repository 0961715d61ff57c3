"""bench.reports.mesh against figures worked out by hand."""

from pathlib import Path

import pytest

from bench.__main__ import main
from bench.reports import mesh
from bench.reports.mesh import MODELS, Group, Mesh, predict_head, predict_step

EIGHT, SEVENTY, _ = MODELS


def test_the_models_have_their_published_sizes() -> None:
    assert [round(model.weights / 1e9, 2) for model in MODELS] == [8.03, 70.55, 405.85]


@pytest.mark.parametrize(
    ("shape", "replicas", "shards"),
    [((1, 8, 1), (1, 1), (8, 8)), ((8, 8, 1), (8, 1), (8, 8)), ((1, 64, 1), (1, 1), (64, 8))]
    + [((1, 8, 8), (1, 1), (8, 1)), ((16, 2, 2), (16, 2), (2, 2)), ((2, 128, 4), (2, 1), (128, 2))],
)
def test_a_groups_ranks_in_a_node_are_neighbours_of_its_mesh(
    shape: tuple[int, int, int], replicas: tuple[int, int], shards: tuple[int, int]
) -> None:
    groups = Mesh(*shape).groups
    assert (groups["dp_replicate"], groups["dp_shard"]) == (Group(*replicas), Group(*shards))
    assert groups["tp"] == Group(shape[2], shape[2])


def test_a_collective_takes_its_bytes_and_its_hops() -> None:
    """8 GB within a node: 7/8 of them at 450 GB/s, and 7 hops. Over 8 nodes of 8 ranks: 63/64 at 8 x 50 GB/s.
    With one rank in each of 8 nodes: 7/8 at 50 GB/s, twice for an all-reduce."""
    within = 8.4e-6 + 7 * 3.4e-6 + 7e9 / 450e9
    assert Group(8, 8).seconds(8e9) == pytest.approx(within, rel=1e-12)
    across = 8.4e-6 + 56 * 3.4e-6 + 7 * 9.6e-6 + 8e9 * 63 / 64 / 400e9
    assert Group(64, 8).seconds(8e9) == pytest.approx(across, rel=1e-12)
    alone = 8.4e-6 + 2 * (7 * 9.6e-6 + 7e9 / 50e9)
    assert Group(8, 1).seconds(8e9, rounds=2) == pytest.approx(alone, rel=1e-12)
    assert Group(1, 1).seconds(8e9) == 0


def test_the_heads_traffic_and_memory_by_hand() -> None:
    """8B on 1 x 8 x 1: [128256, 4096] gathered in bf16 and reduced in fp32 once."""
    weight = 128256 * 4096
    head = predict_head(EIGHT, Mesh(1, 8, 1))
    assert head.data_parallel == pytest.approx(
        2 * (8.4e-6 + 7 * 3.4e-6) + 6 * weight * 7 / 8 / 450e9, rel=1e-9
    )
    assert head.tensor_parallel == 0 and head.bound == "compute"
    three_gemms = 3 * 2 * 8192 * weight / 700.2e12
    assert three_gemms < head.compute < 1.1 * three_gemms
    alone = predict_head(EIGHT, Mesh(8, 1, 1)).memory
    # A shard's states for whole ones; the gathered weight, and its gradient in fp32 beside the bf16 one.
    assert alone - head.memory == pytest.approx((16 * 7 / 8 - 6) * weight, rel=1e-9)


def test_a_sharded_vocabulary_computes_as_much_and_moves_a_table_and_dx() -> None:
    """On tp = 8 each rank multiplies 8 x 8192 tokens by an eighth of the columns. dX [65536, 4096] in fp32
    takes 4.2 ms on NVLink, less than dW's GEMM of 12.3 ms beside it, so only the table is left."""
    head, whole = predict_head(EIGHT, Mesh(1, 1, 8)), predict_head(EIGHT, Mesh(1, 8, 1))
    assert head.compute == pytest.approx(whole.compute, rel=0.05)
    table = 8.4e-6 + 7 * 3.4e-6 + 24 * 65536 * 8 * 7 / 8 / 450e9
    assert head.tensor_parallel == pytest.approx(table, rel=1e-9)


def test_a_step_is_the_flops_of_its_weights_and_its_memory_their_states() -> None:
    """Checkpointed: 8 flops a weight and token in the layers, 6 in the head, and attention's half square."""
    step = predict_step(EIGHT, Mesh(1, 8, 1))
    layers = 32 * EIGHT.layer_weights
    attention = 4 * 32 * 2 * 8192 * 8192 * 4096
    compute = (8 * 8192 * layers + attention) / 700.2e12 + step.head.compute
    assert step.seconds == pytest.approx(compute + 28 * EIGHT.weights / 8 / 3.015e12, rel=1e-3)
    assert step.memory > 16 * EIGHT.weights / 8
    assert not predict_step(SEVENTY, Mesh(1, 8, 1)).fits and predict_step(SEVENTY, Mesh(1, 64, 1)).fits


def test_from_some_tokens_on_the_gemms_hide_the_heads_traffic() -> None:
    shape = Mesh(1, 64, 1)
    tokens = mesh.hidden_from(EIGHT, shape)
    assert predict_head(EIGHT, shape, tokens).bound == "compute"
    assert predict_head(EIGHT, shape, tokens - 256).bound == "dp"


def test_the_table_in_the_docs_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["roofline", "--mesh"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Predicted, not measured")
    assert printed in Path(__file__, "../../../docs/scale.md").resolve().read_text()
    assert main(["roofline", "--mesh", "--tokens", "1024"]) == 0
    assert "1,024 tokens a GPU and step" in capsys.readouterr().out


def test_tokens_without_a_mesh_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["roofline", "--tokens", "1024"])
    assert "tokens: got 1024 without --mesh, expected both" in capsys.readouterr().err
