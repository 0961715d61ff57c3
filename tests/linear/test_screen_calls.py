"""What takes a screen and what refuses it: the report, refusals, compilers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign_kernels import (
    linear_cross_entropy,
    linear_distillation_loss,
    linear_logprobs,
    native,
    plan_head,
    screen_report,
)
from fastalign_kernels.linear.screen_weight import code_weight
from tests.linear.screen_inputs import H, N, V, make, needs_screen

pytestmark = pytest.mark.usefixtures("small_vocabulary")


@needs_screen
def test_the_report_tells_errors_and_shares() -> None:
    given = make()
    report = screen_report(given["hidden"], given["weight"], given["ids"])
    assert 0 < report.logp_error < 1e-3 and report.logp_error <= report.largest_logp_error
    assert 0 < report.entropy_error < 1e-2
    assert 1 <= report.exact_columns < V / 4 and report.exact_tokens == 0
    assert 0 < report.hidden_error < 0.02 and 0 < report.weight_error < 0.02
    assert report.open_columns > 0
    with pytest.raises(ValueError, match="sample: got 0"):
        screen_report(given["hidden"], given["weight"], given["ids"], sample=0)


def test_refusals_name_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    given = make()
    with pytest.raises(ValueError, match="screen: got 'int4', expected True or None"):
        linear_logprobs(**given, screen="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="screen: got True with logits_dtype torch.bfloat16"):
        linear_logprobs(**make(torch.bfloat16), screen=True, logits_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="screen: got True, expected None: factors of torch.float64"):
        linear_logprobs(**make(torch.float64), screen=True)
    monkeypatch.setattr(native, "has_int8_gemm", lambda: False)
    with pytest.raises(ValueError, match="screen: got True, expected None: "):
        linear_logprobs(**given, screen=True)
    linear_logprobs(**given, screen=False)


@needs_screen
def test_calls_that_need_all_logits_refuse_a_screen() -> None:
    given = make()
    offsets = torch.arange(N + 1)
    with pytest.raises(ValueError, match="screen: got True, expected None: a call with kept sets"):
        linear_logprobs(**given, kept=(offsets, given["ids"].clamp(min=0)), screen=True)
    outcomes = torch.zeros(N, 4, dtype=torch.int64), torch.full((N, 4), math.log(0.2))
    with pytest.raises(ValueError, match="screen: got True, expected None: linear_distillation_loss"):
        linear_distillation_loss(given["hidden"], given["weight"], *outcomes, screen=True)
    adapter = torch.zeros(4, H), torch.zeros(V, 4), 1.0
    with pytest.raises(ValueError, match="screen: got True, expected None: a head with lora"):
        linear_logprobs(**given, lora=adapter, screen=True)


@needs_screen
def test_compiles_without_a_graph_break() -> None:
    given = make()
    given["hidden"].requires_grad_()

    def loss(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, ids, screen=True, tail_eps=2.0**-12)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for function in (loss, compiled):
        function(**given).backward()
    assert torch.equal(loss(**given), compiled(**given))
    with torch.no_grad():
        assert torch.equal(loss(**given), compiled(**given))


@needs_screen
def test_a_fake_call_gives_shapes() -> None:
    meta = {name: tensor.to("meta") for name, tensor in make().items()}
    assert linear_logprobs(**meta, screen=True).shape == (N,)


@needs_screen
def test_the_plan_tells_the_codes_memory_and_the_time_of_the_products() -> None:
    given = make()
    rows = code_weight(given["weight"]).rows
    planned = plan_head(N, H, V, screen=True, tail_eps=2**-14)
    exact = plan_head(N, H, V, tail_eps=2**-14)
    assert planned.codes_bytes == 4 * (rows.packed.numel() + rows.lengths.numel() + rows.residuals.numel())
    assert planned.gemms == exact.gemms == 3 and 2 < planned.screened_gemms < 2.5
    assert planned.chunk <= 96 < exact.chunk
    assert "screen: predicted time of 2.28 exact GEMMs" in str(planned)
    assert exact.codes_bytes == 0 and "screen" not in str(exact)
    reading = plan_head(N, H, V, screen=True, hidden_grad=False, weight_grad=False)
    assert reading.chunk == N and reading.workspace_bytes < N * V  # no logits
    assert plan_head(N, H, V, screen=True, upstream="table").screened_gemms > planned.screened_gemms


CUDA: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16, "architecture": 90, "memory_mib": 143771}


def test_a_plan_for_a_gpu() -> None:
    """With a tail, for any upstream gradient, and without gradients."""
    shape = (8192, 4096, 151936)
    planned = plan_head(*shape, **CUDA, screen=True, tail_eps=2**-14)
    tail = plan_head(*shape, **CUDA, tail_eps=2**-14)
    assert (planned.engine, planned.chunk, planned.gemms) == ("screen", 8192, tail.gemms)
    assert planned.workspace_bytes == tail.workspace_bytes and planned.codes_bytes == 151936 * (4096 + 140)
    assert planned.screened_gemms == 0.6 and "0.60 exact GEMMs, 3 f more" in str(planned)
    general = plan_head(*shape, **CUDA, screen=True, tail_eps=2**-14, upstream="table")
    assert general.kept_tokens == 8192 and general.gemms == 3
    reading = plan_head(*shape, **CUDA, screen=True, hidden_grad=False, weight_grad=False)
    assert reading.workspace_bytes == 2 * 2048 * 151936 and reading.gemms == 1
    few = plan_head(1023, *shape[1:], **CUDA, screen=True, hidden_grad=False, weight_grad=False)
    assert few.engine != "screen" and few.codes_bytes == 0  # all logits are exact


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float64}, "factors of torch.float64 have no 8-bit codes"),
        (CUDA | {"dtype": torch.float32}, "a GPU has 8-bit products of bf16 and fp16 factors alone"),
        (CUDA | {"architecture": 80}, "8-bit products are for GPUs of compute capability 90, and .* has 80"),
        (CUDA, "on a GPU a screen saves nothing in training without tail_eps"),
    ],
    ids=["fp64", "fp32 on a GPU", "A100", "GPU without a tail"],
)
def test_no_plan_for_a_screen_that_a_call_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"screen: got True, expected None: {message}"):
        plan_head(N, H, V, screen=True, **options)


def test_no_plan_for_a_screen_with_lora() -> None:
    with pytest.raises(ValueError, match="screen: got True with lora_rank 4, expected None: a head"):
        plan_head(N, H, V, screen=True, lora_rank=4)
