"""Whether the head's GPU engines are right on this device: `python -m bench.gpu.head_check [--json FILE]`.

Each engine's statistics and gradients are compared with fp64, and must be no further from it than twice
PyTorch's own error in the same dtype, elementwise (tests/tolerance.py). Takes about a minute, most of it in
Triton's compiler. Exit status 1 if a case fails. Cases that an engine does not serve are counted apart.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign_kernels.linear.engine import Engine, Gradients
from fastalign_kernels.linear.gpu.epilogue import EpilogueStatistics
from fastalign_kernels.linear.gpu.epilogue_slices import EpilogueSlices
from fastalign_kernels.linear.gpu.kept_softmax import KeptSoftmax
from fastalign_kernels.linear.gpu.plan import epilogue_serves, epilogue_slice_width
from fastalign_kernels.linear.gpu.vocab_slices import VocabSlices
from fastalign_kernels.linear.inputs import HeadInputs, NeedsGrad
from fastalign_kernels.linear.options import HeadOptions
from fastalign_kernels.linear.token_losses import TokenCrossEntropy
from fastalign_kernels.scale_triton import scale_in_place
from fastalign_kernels.softmax.rows import Stat, coefficients, row_grad_ref, row_stats_ref
from tests.tolerance import assert_no_worse_than_eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MAJOR, MINOR = torch.cuda.get_device_capability() if DEVICE == "cuda" else (0, 0)
ARCHITECTURE = 10 * MAJOR + MINOR
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PLAIN = HeadOptions()
ALL = HeadOptions(logit_scale=0.7, softcap=30.0, temperature=1.3)
ENGINES: dict[str, tuple[Engine, float]] = {
    "kept_softmax": (KeptSoftmax(2560), 2560.0),
    "kept_softmax in blocks": (KeptSoftmax(2560), 7.0),
    "vocab_slices": (VocabSlices(300), 8.0),
    "epilogue": (EpilogueStatistics(), 2560.0),
    "epilogue_slices": (EpilogueSlices(), 2.0),
}
# The engines past 2^31 logits, of which "in blocks" keeps the softmax of a part.
LARGE: dict[str, Engine] = {
    "kept_softmax": KeptSoftmax(16384),
    "kept_softmax in blocks": KeptSoftmax(2560),
    "vocab_slices": VocabSlices(4096),
    "epilogue": EpilogueStatistics(16384),
    "epilogue_slices": EpilogueSlices(4096),
}
TRAINED = NeedsGrad(hidden=True, weight=True, bias=True)


class NotServed(Exception):
    """The engine does not serve the case on this device."""


class Case(NamedTuple):
    shape: tuple[int, int, int]
    dtype: torch.dtype
    options: HeadOptions
    bias: bool = False
    ignored: str = "some"  # none, some (their hidden states are NaN), all
    spread: float = 2.0  # of the logits
    master: bool = False  # fp32 weight


CASES = [
    Case((1100, 96, 1233), BF16, PLAIN, ignored="none"),
    Case((1100, 96, 1233), BF16, ALL, bias=True),
    Case((252, 507, 123), BF16, PLAIN, spread=20.0),
    Case((700, 64, 5003), FP16, ALL, bias=True),
    Case((700, 64, 5003), FP16, PLAIN),
    Case((700, 64, 5003), FP32, ALL, bias=True),
    Case((300, 64, 2049), FP32, PLAIN, spread=1e3),
    Case((1, 64, 5003), BF16, PLAIN, ignored="none"),
    Case((5, 64, 123), BF16, PLAIN, ignored="all"),
    Case((700, 64, 2048), BF16, PLAIN, master=True),
    # enough tokens for the epilogue
    Case((2100, 128, 5003), BF16, PLAIN, spread=20.0),
    Case((2100, 128, 5003), BF16, HeadOptions(logit_scale=0.7, temperature=1.3), bias=True),
    Case((2100, 128, 2048), BF16, PLAIN, master=True),
    Case((2100, 128, 5003), FP16, ALL),
]


def make(case: Case) -> tuple[HeadInputs, Tensor]:
    """Inputs, and hidden states without NaN."""
    N, H, V = case.shape
    generator = torch.Generator().manual_seed(N + V)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden = normal(N, H).to(case.dtype)
    weight = (normal(V, H) * case.spread / H**0.5).to(FP32 if case.master else case.dtype)
    ids = torch.randint(0, V, (N,), generator=generator)
    clean = hidden.clone()
    if case.ignored != "none":
        ids[::3] = -1
        ids[1] = -1
        hidden[1] = float("nan")
        clean[1] = 0
    if case.ignored == "all":
        ids[:] = -1
    bias = normal(V).to(case.dtype) if case.bias else None
    bias = None if bias is None else bias.to(DEVICE)
    inputs = HeadInputs(hidden.to(DEVICE), weight.to(DEVICE), ids.to(DEVICE), bias, case.options)
    return inputs, clean.to(DEVICE)


def reference(
    inputs: HeadInputs, hidden: Tensor, dtype: torch.dtype, coefficients_of: Any
) -> tuple[Tensor, Gradients]:
    """Statistics and gradients by plain PyTorch whose products are made in `dtype`."""
    _, weight, ids, bias, options = inputs[:5]
    accumulator = torch.float64 if dtype == torch.float64 else FP32
    x, w = hidden.to(dtype), weight.to(dtype)
    b = None if bias is None else bias.to(accumulator)
    z = (x @ w.t())[None].to(accumulator)
    stats = row_stats_ref(z, ids, b, options.transform)
    grad = row_grad_ref(z, ids, b, options.transform, stats, coefficients_of(stats))[0]
    low = grad.to(dtype)
    nothing = low.new_empty(0)  # there is no adapter
    return stats, Gradients(low @ w, low.t() @ x, low.to(accumulator).sum(0), nothing, nothing)


def compare(name: str, ours: tuple[Tensor, Gradients], eager: Any, truth: Any, dtype: torch.dtype) -> None:
    rounding = torch.finfo(dtype).eps
    for row in (Stat.LOGP, Stat.MEAN_LOGP, Stat.ENTROPY, Stat.LSE):
        assert_no_worse_than_eager(ours[0][row], eager[0][row], truth[0][row], f"{name} {row.name}", terms=4)
    for field in Gradients._fields:
        found = getattr(ours[1], field)
        if found.numel():
            assert_no_worse_than_eager(
                found,
                getattr(eager[1], field),
                getattr(truth[1], field),
                f"{name} d {field}",
                rounding=rounding,
                terms=16,
            )


def refuse_unserved(engine: Engine, inputs: HeadInputs) -> None:
    """Raise NotServed for a case that is not the engine's."""
    call = inputs.gpu_call(TRAINED, 2560.0, architecture=ARCHITECTURE)
    if isinstance(engine, EpilogueStatistics) and not epilogue_serves(call):
        raise NotServed
    if isinstance(engine, EpilogueSlices) and not epilogue_slice_width(call):
        raise NotServed


def check(case: Case, engine_name: str) -> None:
    """Cross-entropy, a loss given by a function, any upstream gradient twice, frozen, without gradient."""
    engine, workspace = ENGINES[engine_name]
    inputs, clean = make(case)
    if inputs.hidden.shape[0] * inputs.weight.shape[0] < 400_000:
        workspace = 2560.0
    inputs = inputs._replace(options=inputs.options._replace(workspace_mib=workspace))
    V, N = inputs.weight.shape[0], inputs.hidden.shape[0]
    refuse_unserved(engine, inputs)
    needs = TRAINED._replace(bias=inputs.bias is not None)
    generator = torch.Generator(DEVICE).manual_seed(1)
    scale = torch.randn(N, device=DEVICE, generator=generator)
    smoothing = 0.0 if case.options.softcap and case.dtype == FP16 else 0.1
    loss = TokenCrossEntropy(scale, smoothing, 0.01, V)
    upstream = torch.randn(len(Stat), N, device=DEVICE, generator=generator)

    def in_loss(stats: Tensor) -> Tensor:
        return replace(loss, scale=scale.to(stats.dtype))(stats, slice(None))

    def in_upstream(stats: Tensor) -> Tensor:
        return coefficients(upstream.to(stats.dtype), stats, V)

    truth, eager = (reference(inputs, clean, d, in_loss) for d in (torch.float64, case.dtype))
    found = engine.statistics_and_gradients(inputs, loss, needs)
    compare("cross-entropy", found, eager, truth, case.dtype)
    given = engine.statistics_and_gradients(inputs, lambda stats, tokens: loss(stats, tokens), needs)
    compare("given coefficients", given, eager, truth, case.dtype)
    frozen = engine.statistics_and_gradients(inputs, loss, NeedsGrad(True, False, False))
    compare("frozen", frozen, eager, truth, case.dtype)

    truth, eager = (reference(inputs, clean, d, in_upstream) for d in (torch.float64, case.dtype))
    stats, saved = engine.statistics(inputs, needs)
    again = [x.clone() for x in saved]
    first = engine.gradients(inputs, stats, saved, in_upstream(stats), needs)
    compare("any upstream", (stats, first), eager, truth, case.dtype)
    second = engine.gradients(inputs, stats, [], in_upstream(stats), needs)
    compare("recomputed", (stats, second), eager, truth, case.dtype)
    if again:
        third = engine.gradients(inputs, stats, again, in_upstream(stats), needs._replace(weight=False))
        assert torch.equal(third.hidden, first.hidden), "the same saved tensors gave another dX"
    none, _ = engine.statistics(inputs, NeedsGrad(False, False, False))
    torch.testing.assert_close(none, stats, rtol=1e-4, atol=1e-4)


def check_large(engine_name: str) -> None:
    """N V > 2^31: the last tokens' gradient and some rows of dW."""
    N, H, V = (16384, 64, 151936) if DEVICE == "cuda" else (64, 16, 512)
    engine = LARGE[engine_name]
    torch.manual_seed(0)
    hidden = torch.randn(N, H, device=DEVICE).to(BF16)
    weight = (torch.randn(V, H, device=DEVICE) * 0.3).to(BF16)
    ids = torch.randint(0, V, (N,), device=DEVICE)
    inputs = HeadInputs(hidden, weight, ids, None, HeadOptions(lean=True))
    refuse_unserved(engine, inputs)
    scale = torch.full((N,), 1.0 / N, device=DEVICE)
    loss = TokenCrossEntropy(scale, 0.0, 0.0, V)
    table, found = engine.statistics_and_gradients(inputs, loss, NeedsGrad(True, True, False))
    last = slice(N - 16, N)
    z = hidden[last].double() @ weight.double().t()
    logp = z.log_softmax(-1)
    grad = logp.exp()
    grad[torch.arange(16), ids[last]] -= 1
    torch.testing.assert_close(
        table[Stat.LOGP, last].double(), logp.gather(1, ids[last, None])[:, 0], rtol=1e-4, atol=1e-4
    )
    expected = grad / N @ weight.double()
    error = ((found.hidden[last].double() - expected).norm() / expected.norm()).item()
    assert error < 4e-3, f"dX of the last tokens is off by {error}"
    columns = torch.tensor([0, V // 2, V - 1], device=DEVICE)
    expected = torch.zeros(3, H, dtype=torch.float64, device=DEVICE)
    for begin in range(0, N, 2048):
        x = hidden[begin : begin + 2048].double()
        p = (x @ weight[columns].double().t() - table[Stat.LSE, begin : begin + 2048, None].double()).exp()
        p -= (ids[begin : begin + 2048, None] == columns).double()
        expected += (p / N).t() @ x
    error = ((found.weight[columns].double() - expected).norm() / expected.norm()).item()
    assert error < 1e-2, f"dW is off by {error}"


def check_capture(engine_name: str) -> None:
    """Captured in a graph and replayed, it gives what it gave."""
    if DEVICE == "cpu" or (engine_name.startswith("epilogue") and ARCHITECTURE != 90):
        raise NotServed
    engine, _ = ENGINES[engine_name]
    inputs, _ = make(Case((700, 64, 5003), BF16, PLAIN))
    loss = TokenCrossEntropy(torch.ones(700, device=DEVICE), 0.1, 0.0, 5003)
    needs = NeedsGrad(True, True, False)
    expected = engine.statistics_and_gradients(inputs, loss, needs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        table, found = engine.statistics_and_gradients(inputs, loss, needs)
    graph.replay()
    torch.testing.assert_close(table, expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.hidden, expected[1].hidden, rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(found.weight, expected[1].weight, rtol=2e-2, atol=1e-2)


def check_scale() -> None:
    for dtype in (BF16, FP32):
        x = torch.randn(1_000_003, device=DEVICE).to(dtype)
        for factor in (1.0, -0.37):
            y = x.clone()
            scale_in_place(y, torch.tensor(factor, device=DEVICE))
            torch.testing.assert_close(y, (x.float() * factor).to(dtype))


OUT_OF_TIME, NOT_SERVED = "not run: out of time", "not served"


def run_job(function: Callable[..., Any], given: tuple[Any, ...]) -> str:
    """What came of a job: "ok", NOT_SERVED, or the error."""
    try:
        function(*given)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    except NotServed:
        return NOT_SERVED
    except Exception as error:
        text = f"{type(error).__name__}: {str(error)[:600]}"
        return text if isinstance(error, AssertionError) else text + traceback.format_exc(limit=-4)[-900:]
    return "ok"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.head_check")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--seconds", type=float, default=100.0, help="begin no case after that")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    jobs: list[tuple[str, Any, tuple[Any, ...]]] = [("scale", check_scale, ())]
    jobs += [(f"capture, {name}", check_capture, (name,)) for name in ENGINES]
    jobs += [(f"{name}, {case}", check, (case, name)) for case, name in itertools.product(CASES, ENGINES)]
    jobs += [(f"N V > 2^31, {name}", check_large, (name,)) for name in LARGE]
    results: dict[str, str] = {}
    for name, function, given in jobs:
        if time.perf_counter() - begin > arguments.seconds:
            results[name] = OUT_OF_TIME
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1))
            continue
        results[name] = run_job(function, given)
        print(f"{time.perf_counter() - begin:6.1f} s  {name}: {results[name]}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1))
    right, unserved, left_out = (
        sum(result == kind for result in results.values()) for kind in ("ok", NOT_SERVED, OUT_OF_TIME)
    )
    wrong = len(results) - right - unserved - left_out
    print(f"{right} are right, {wrong} wrong, {unserved} {NOT_SERVED}, {left_out} {OUT_OF_TIME}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
