"""bench.reports.roofline against figures worked out by hand."""

import json
from pathlib import Path

import pytest
import torch

from bench.core.operation import OURS, Shape
from bench.reports import roofline, roofline_command
from bench.reports.roofline import GPUS, Machine, count, predict
from fastalign_kernels import HeadPlan, plan_head
from fastalign_kernels.linear.gpu import work as gpu_work
from fastalign_kernels.linear.gpu.plan import GpuCall
from fastalign_kernels.linear.gpu.work import RATES

H100 = GPUS[0]
QWEN = Shape(8192, 4096, 151936)
BOTH = ("hidden", "weight")
GEMM = 2 * 8192 * 4096 * 151936


def test_the_prediction_that_head_py_quotes() -> None:
    """Three GEMMs 43.7 ms at 700 TFLOP/s. An fp32 tile is written in place of bf16 logits and read twice, and
    bf16 gradients are written: 14.9 GB, 4.5 ms at 3.35 TB/s."""
    work = count("linear_cross_entropy", "bf16", BOTH, QWEN, "cuda")
    assert work is not None and work.pass_bytes == (4 - 2 + 4 + 4 + 2) * 8192 * 151936 == 14_935_916_544
    at_full_bandwidth = predict(work, H100._replace(byte_share=1.0, architecture=0), "bf16")
    assert at_full_bandwidth.gemms == pytest.approx(43.7e-3, rel=2e-3)
    assert at_full_bandwidth.passes == pytest.approx(4.46e-3, rel=5e-3)
    # all dlogits in bf16, dW and dX in bf16, 7 numbers a token; an H200 measured 3626 MiB
    held = 2 * 8192 * 151936 + 2 * 4096 * 151936 + 2 * 8192 * 4096 + 28 * 8192
    assert work.held_bytes == pytest.approx(held, rel=1e-9) == pytest.approx(3626 * 2**20, rel=1e-3)


# Measured on an H200, ms: three bare GEMMs, the prototypes `keep` and `sliced` (in slices of 8192 columns) of
# 2026-11-26 (docs/gpu_history.md); three bare GEMMs and the engine `epilogue` in rounds of 2026-11-27
# (bench/results/gpu/head-h200-2026-11-27.json; at the two small shapes queued behind other work, since the
# host took 0.4 ms of the call).
MEASURED = {
    (8192, 4096, 151936): (44.1, 47.2, 66.0, 43.11, 45.39),
    (16384, 2048, 151936): (45.2, 52.0, 72.0, 42.21, 46.32),
    (8192, 896, 151936): (9.10, 13.2, 19.0, 10.01, 11.52),
    (8192, 576, 49152): (2.12, 3.15, 4.44, 1.880, 2.232),
    (2048, 2048, 128256): (4.12, 5.18, 7.61, 4.367, 4.402),
}


def milliseconds(shape: tuple[int, int, int], bare: float, plan: HeadPlan) -> float:
    """Predicted of a plan, with GEMMs at the rate of the bare ones of the same run."""
    N, H, V = shape
    call = GpuCall(N, H, V, torch.bfloat16, 2560.0, True, True)
    rates = RATES[90]._replace(flops=3 * 2 * N * H * V / bare * 1e3)
    return gpu_work.milliseconds(gpu_work.gpu_work(plan, call), call, rates)


@pytest.mark.parametrize("shape", MEASURED)
def test_the_gpu_engines_are_predicted_within_a_tenth(shape: tuple[int, int, int]) -> None:
    bare, keep, sliced, bare_in_rounds, epilogue = MEASURED[shape]
    all_kept = HeadPlan("gradient_in_forward", 1024, 0, 3, "kept_softmax", kept_tokens=shape[0])
    assert milliseconds(shape, bare, all_kept) == pytest.approx(keep, rel=0.1)
    in_slices = HeadPlan("gradient_in_forward", shape[0], 0, 4, "vocab_slices", slice_columns=8192)
    assert milliseconds(shape, bare, in_slices) == pytest.approx(sliced, rel=0.1)
    plan = plan_head(*shape, dtype=torch.bfloat16, device="cuda", architecture=90, memory_mib=143771)
    assert plan.engine == "epilogue"
    assert milliseconds(shape, bare_in_rounds, plan) == pytest.approx(epilogue, rel=0.1)


# MiB beyond the inputs that torch's allocator measured of `epilogue` on an H200 (the results file).
PEAKS = {
    ((8192, 4096, 151936), "scalar"): 3856,
    ((16384, 2048, 151936), "scalar"): 4360,
    ((8192, 896, 151936), "scalar"): 2727,
    ((8192, 576, 49152), "scalar"): 870,
    ((2048, 2048, 128256), "scalar"): 1042,
    ((8192, 4096, 151936), "table"): 3837,
}


@pytest.mark.parametrize(("shape", "upstream"), PEAKS)
def test_the_peak_of_a_plan_is_the_measured_one(shape: tuple[int, int, int], upstream: str) -> None:
    plan = plan_head(
        *shape, dtype=torch.bfloat16, device="cuda", upstream=upstream, architecture=90, memory_mib=143771
    )
    assert plan.engine == "epilogue"
    assert plan.held_bytes / 2**20 == pytest.approx(PEAKS[shape, upstream], rel=0.01)


def test_a_plan_prints_what_memory_buys() -> None:
    plan = plan_head(
        16384, 2048, 151936, dtype=torch.bfloat16, device="cuda", architecture=90, memory_mib=143771
    )
    assert (plan.engine, plan.kept_tokens, plan.gemms) == ("epilogue", 8192, 3)
    first, *_, last = plan.budgets
    assert first.kept_tokens == 16384 and last.engine == "vocab_slices" and last.gemms == 4
    predicted = [budget.predicted_ms or 0.0 for budget in plan.budgets]
    assert predicted == sorted(predicted) and plan.predicted_ms in predicted
    lines = str(plan).splitlines()
    assert lines[0] == "gradient_in_forward by epilogue: 3 GEMMs, 2,374 MiB"
    assert len(lines) == 2 + len(plan.budgets) and "16,384 tokens" in lines[2]
    unknown = plan_head(16384, 2048, 151936, dtype=torch.bfloat16, device="cuda", architecture=0)
    assert unknown.engine == "kept_softmax" and unknown.predicted_ms is None


@pytest.mark.parametrize(
    ("operation", "trained", "gemms", "passes"),
    [
        ("linear_logprobs", BOTH, 3, 16),
        ("linear_logprobs", ("hidden",), 2, 12),
        ("linear_logprobs", (), 1, 6),
        ("linear_dpo", BOTH, 4, 22),
        ("linear_cross_entropy, SmolLM2's softmax", BOTH, 3, 12),
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
    roofline_command.main([str(file)])
    lines = capsys.readouterr().out.splitlines()
    (row,) = (line for line in lines if line.startswith("| linear_logprobs |"))
    assert row.endswith("| 2.5, 0 | 3, 7 |")  # 2 ms, and 4 bytes of 100 x 1000 logits at 0.8 GB/s; measured
    assert roofline.measured_machine({**results, "cases": cases[:1]}) is None


def test_without_a_file_every_head_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    roofline_command.main([])
    out = capsys.readouterr().out
    assert "H100 700.2 TFLOP/s" in out and all(f", {head} |" in out for head in roofline.HEADS)
