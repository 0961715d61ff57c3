"""bench.reports.roofline against figures worked out by hand."""

import json
from pathlib import Path

import pytest

from bench.core.operation import OURS, Shape
from bench.reports import roofline
from bench.reports.roofline import GPUS, Machine, count, predict

H100 = GPUS[0]
QWEN = Shape(8192, 4096, 151936)
BOTH = ("hidden", "weight")
GEMM = 2 * 8192 * 4096 * 151936


def test_the_prediction_that_head_py_quotes() -> None:
    """Three GEMMs 43.7 ms at 700 TFLOP/s; fp32 logits read twice and bf16 gradients written once: 12.4 GB,
    3.7 ms at 3.35 TB/s."""
    work = count("linear_cross_entropy", "bf16", BOTH, QWEN, "cuda")
    assert work is not None and work.pass_bytes == (4 + 4 + 2) * 8192 * 151936 == 12_446_597_120
    at_full_bandwidth = predict(work, H100._replace(byte_share=1.0), "bf16")
    assert at_full_bandwidth.gemms == pytest.approx(43.7e-3, rel=2e-3)
    assert at_full_bandwidth.passes == pytest.approx(3.7e-3, rel=5e-3)
    assert predict(work, H100, "bf16").seconds == pytest.approx(43.7e-3 + 4.13e-3, rel=2e-3)
    # 512 MiB of workspace (586 tokens a chunk, 6 bytes a logit), dW in fp32 and bf16, dX in bf16, 7 numbers a
    # token.
    held = 586 * 6 * 151936 + 6 * 4096 * 151936 + 2 * 8192 * 4096 + 28 * 8192
    assert work.held_bytes == pytest.approx(held, rel=1e-9)


@pytest.mark.parametrize(
    ("operation", "trained", "gemms", "passes"),
    [
        ("linear_logprobs", BOTH, 4, 10),
        ("linear_logprobs", ("hidden",), 2, 10),
        ("linear_logprobs", (), 1, 4),
        ("linear_dpo", BOTH, 5, 14),
        ("linear_cross_entropy, SmolLM2's softmax", BOTH, 3, 10),
    ],
)
def test_gemms_and_passes_of_the_ways(
    operation: str, trained: tuple[str, ...], gemms: int, passes: int
) -> None:
    work = count(operation, "bf16", trained, QWEN, "cuda")
    assert work is not None
    assert sum(times * 2 * m * n * k for times, m, n, k in work.gemms) == gemms * GEMM
    assert work.pass_bytes == passes * 8192 * 151936


@pytest.mark.parametrize(
    ("operation", "tokens", "gemms"),
    [("linear_dpo", 1024, 4), ("linear_dpo", 2048, 4.5), ("linear_kto", 2048, 4)],
)
def test_on_a_cpu_logits_of_pairs_and_rows_beyond_the_workspace_are_made_again(
    operation: str, tokens: int, gemms: float
) -> None:
    """96 MiB hold 512 tokens of V 49152; there are 2 pairs, or 4 rows."""
    work = count(operation, "fp32", BOTH, Shape(tokens, 576, 49152), "cpu")
    assert work is not None
    assert sum(times * 2 * m * n * k for times, m, n, k in work.gemms) == gemms * 2 * tokens * 576 * 49152
    assert work.held_bytes == 512 * 4 * 49152 + 28 * tokens + 4 * 576 * (tokens + 49152)


def test_a_gemm_of_few_tokens_costs_the_bytes_of_the_weight() -> None:
    work = count("linear_logprobs", "bf16", (), Shape(1, 4096, 151936), "cuda")
    assert work is not None
    assert predict(work, H100, "bf16").gemms == pytest.approx(2 * 4096 * 151936 / (0.9 * 3.35e12), rel=1e-3)


def test_operations_on_logits_are_their_bytes() -> None:
    logits = 4 * 8192 * 151936
    for operation, trained, passes in (
        ("token_stats", (), 1),
        ("cross_entropy", ("logits",), 3),
        ("sample", (), 1),
    ):
        work = count(operation, "fp32", trained, QWEN, "cuda")
        assert work is not None and work.pass_bytes == passes * logits and not work.gemms
    assert (
        count("sample, top_k 50", "fp32", (), QWEN, "cuda") is None
    )  # what is read again depends on the logits


def test_operations_on_tokens_are_their_bytes() -> None:
    """64 sequences of 1024 tokens: reads and writes of 4 bytes, a mask of 1."""
    tokens = Shape(64, 0, 1024)
    for operation, trained, passes in (("ppo", ("logp", "entropy"), 41), ("gae", (), 17), ("whiten", (), 14)):
        work = count(operation, "fp32", trained, tokens, "cpu")
        assert work is not None and work.pass_bytes == passes * 65536 and not work.gemms


def test_a_whole_step_counts_smollm2s_weights() -> None:
    """SmolLM2-135M: 134,515,008 weights, of which 34,560 in norms, which are left out; 6 flops a token for
    each."""
    work = count("pretrain step", "fp32", (), Shape(512, 576, 49152), "cpu")
    assert work is not None
    flops = sum(times * 2 * m * n * k for times, m, n, k in work.gemms)
    assert flops == pytest.approx(6 * 512 * 134_515_008, rel=1e-3)
    dpo = count("dpo step", "fp32", (), Shape(512, 576, 49152), "cpu")
    assert dpo is not None
    extra = sum(times * 2 * m * n * k for times, m, n, k in dpo.gemms) - flops
    assert extra == pytest.approx(
        2 * 512 * 134_515_008 + 2 * 512 * 576 * 49152, rel=1e-3
    )  # the reference; logits computed twice


def test_the_machine_of_a_results_file_is_what_its_ceilings_reached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def case(name: str, trained: list[str], ceiling: str, ms: float, ours: float) -> dict:
        rows = {ceiling: {"seconds": [ms / 1e3]}, OURS: {"seconds": [ours / 1e3], "peak_mib": 7.0}}
        return {
            "name": name,
            "operation": name,
            "dtype": "fp32",
            "trained": trained,
            "shape": {"N": 100, "H": 10, "V": 1000},
            "rows": rows,
        }

    cases = [
        case("linear_logprobs", [], "1 bare GEMM", 2.0, 3.0),
        case("token_stats", [], "one read (amax)", 0.5, 0.6),
    ]
    results = {"machine_info": {"cpu": "A Processor", "gpu": "none"}, "cases": cases}
    machine = roofline.measured_machine(results)
    assert machine == Machine("A Processor", 1e9, 1e9, 8e8, 1.0, 1.0, "cpu")
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results))
    roofline.main([str(file)])
    lines = capsys.readouterr().out.splitlines()
    (row,) = (line for line in lines if line.startswith("| linear_logprobs |"))
    assert row.endswith("| 2.5, 0 | 3, 7 |")  # 2 ms, and 4 bytes of 100 x 1000 logits at 0.8 GB/s; measured
    assert roofline.measured_machine({**results, "cases": cases[:1]}) is None


def test_without_a_file_every_head_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    roofline.main([])
    out = capsys.readouterr().out
    assert "H100 700.2 TFLOP/s" in out and all(f", {head} |" in out for head in roofline.HEADS)
