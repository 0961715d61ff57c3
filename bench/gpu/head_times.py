"""Times and peaks of the head on this GPU: `python -m bench.gpu.head_times [--json FILE] [--seconds S]`.

For each shape: bare GEMMs, the public functions forward and backward, each engine by itself, PyTorch eager
and compiled, and the prototypes if `--prototypes FILE` names head_prototypes.py. Medians of CUDA events;
peaks of torch's allocator beyond the inputs. Each case stands alone: what fails is written down, and the
next begins. `--tune` times the row kernels over BLOCK_SIZE and warps instead.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import fastalign_kernels as fk
from fastalign_kernels.linear.engine import Engine
from fastalign_kernels.linear.epilogue import EpilogueStatistics
from fastalign_kernels.linear.inputs import HeadInputs, HeadOptions, NeedsGrad
from fastalign_kernels.linear.kept_softmax import KeptSoftmax
from fastalign_kernels.linear.token_losses import TokenCrossEntropy
from fastalign_kernels.linear.vocab_slices import VocabSlices
from fastalign_kernels.softmax import slice_rows_triton as slices
from fastalign_kernels.softmax import tile_rows_triton as rows
from fastalign_kernels.softmax.rows import Stat, Transform, coefficients

SHAPES = [
    (8192, 4096, 151936),
    (8192, 896, 151936),
    (8192, 576, 49152),
    (2048, 2048, 128256),
    (16384, 2048, 151936),
]
COMPILED = SHAPES[:3]  # shapes at which torch.compile runs: it takes half a minute to compile
BOTH = NeedsGrad(hidden=True, weight=True, bias=False)
NONE = NeedsGrad(hidden=False, weight=False, bias=False)


def timed(function: Callable[[], object], rounds: int = 7) -> tuple[float, float]:
    """Median ms of `rounds` runs after two, and the peak in MiB beyond what was allocated before."""
    torch.cuda.empty_cache()
    for _ in range(2):
        function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - base) / 2**20
    times = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times), peak


def load(path: Path | None) -> ModuleType | None:
    """The prototypes' module."""
    if path is None or not path.exists():
        return None
    spec = importlib.util.spec_from_file_location("head_prototypes", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def engine_cases(
    x: Tensor, w: Tensor, ids: Tensor, engine: Engine, workspace: float | None
) -> dict[str, Callable[[], object]]:
    """The calls that the public functions make of an engine."""
    (N, _), V = x.shape, w.shape[0]
    options = HeadOptions(lean=True, workspace_mib=workspace)
    inputs = HeadInputs(x, w, ids, None, options)
    full = inputs._replace(options=options._replace(lean=False))
    scale = torch.full((N,), 1.0 / N, device=x.device)
    loss = TokenCrossEntropy(scale, 0.0, 0.0, V)
    upstream = torch.zeros(len(Stat), N, device=x.device)
    upstream[Stat.LOGP] = torch.randn(N, device=x.device)

    def any_upstream() -> object:
        stats, saved = engine.statistics(inputs, BOTH)
        return engine.gradients(inputs, stats, saved, coefficients(upstream, stats, V), BOTH)

    def given(stats: Tensor, tokens: Tensor | slice) -> Tensor:
        return loss(stats, tokens)

    return {
        "cross-entropy": lambda: engine.statistics_and_gradients(inputs, loss, BOTH),
        "cross-entropy, all statistics": lambda: engine.statistics_and_gradients(full, loss, BOTH),
        "given coefficients": lambda: engine.statistics_and_gradients(full, given, BOTH),
        "any upstream": any_upstream,
        "frozen": lambda: engine.statistics_and_gradients(inputs, loss, NeedsGrad(True, False, False)),
        "no gradient": lambda: engine.statistics(inputs, NONE),
    }


def public_cases(x: Tensor, w: Tensor, ids: Tensor) -> dict[str, Callable[[], object]]:
    """fastalign's functions, forward and backward."""
    N = x.shape[0]
    a, b = x.detach().requires_grad_(), w.detach().requires_grad_()
    some = torch.randn(N, device=x.device)
    rows_of = torch.linspace(0, N, 9, device=x.device).round().long()  # 4 pairs, or 8 completions
    reference: dict[str, Any] = {"reference_hidden": x, "reference_weight": w, "cu_seqlens": rows_of}
    desirable = torch.arange(8, device=x.device) % 2 == 0
    kl = torch.zeros((), device=x.device)
    mask = torch.ones(N, dtype=torch.bool, device=x.device)

    def logprobs(weight: Tensor) -> object:
        leaves = [t for t in (a, weight) if t.requires_grad]
        return torch.autograd.grad(fk.linear_logprobs(a, weight, ids), leaves, some)

    def dpo() -> object:
        return torch.autograd.grad(fk.linear_dpo_loss(a, b, ids, **reference).loss, (a, b))

    def kto() -> object:
        return torch.autograd.grad(fk.linear_kto_loss(a, b, ids, desirable, kl, **reference).loss, (a, b))

    def ppo() -> object:
        loss = fk.linear_ppo_loss(a, b, ids, None, some, mask, entropy_coefficient=0.01).loss
        return torch.autograd.grad(loss, (a, b))

    def no_grad() -> object:
        with torch.no_grad():
            return fk.linear_logprobs(x, w, ids)

    return {
        "cross-entropy": lambda: torch.autograd.grad(fk.linear_cross_entropy(a, b, ids), (a, b)),
        "log-probs": lambda: logprobs(b),
        "frozen log-probs": lambda: logprobs(w),
        "PPO": ppo,
        "DPO with reference": dpo,
        "KTO with reference": kto,
        "no gradient": no_grad,
        "cross-entropy, workspace 300 MiB": lambda: torch.autograd.grad(
            fk.linear_cross_entropy(a, b, ids, workspace_mib=300), (a, b)
        ),
    }


def torch_cases(x: Tensor, w: Tensor, ids: Tensor, *, compiled: bool) -> dict[str, Callable[[], object]]:
    a, b = x.detach().requires_grad_(), w.detach().requires_grad_()

    def loss(a: Tensor, b: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(a, b), ids)

    cases: dict[str, Callable[[], object]] = {"eager": lambda: torch.autograd.grad(loss(a, b, ids), (a, b))}
    if compiled:
        fast = torch.compile(loss)
        cases["torch.compile"] = lambda: torch.autograd.grad(fast(a, b, ids), (a, b))
    return cases


def bare(x: Tensor, w: Tensor) -> dict[str, Callable[[], object]]:
    z = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype, device=x.device)

    def one() -> Tensor:
        return torch.mm(x, w.t(), out=z)

    return {
        "3 GEMMs": lambda: (one() @ w, z.t() @ x),
        "2 GEMMs": lambda: one() @ w,
        "1 GEMM": one,
    }


def groups_of(
    x: Tensor, w: Tensor, ids: Tensor, prototypes: ModuleType | None
) -> dict[str, Callable[[], dict[str, Callable[[], object]]]]:
    """Cases by group; a group is made when its turn comes."""
    kept, in_slices = KeptSoftmax(2560), VocabSlices(300)

    def all_kept() -> dict[str, Callable[[], object]]:
        cases = engine_cases(x, w, ids, kept, 16384)
        return {name: cases[name] for name in ("cross-entropy", "any upstream")}

    groups: dict[str, Callable[[], dict[str, Callable[[], object]]]] = {
        "bare": lambda: bare(x, w),
        "public": lambda: public_cases(x, w, ids),
        "kept": lambda: engine_cases(x, w, ids, kept, None),
        "epilogue": lambda: engine_cases(x, w, ids, EpilogueStatistics(), None),
        "slices": lambda: engine_cases(x, w, ids, in_slices, None),
        "kept, all in memory": all_kept,
    }
    if prototypes is not None:
        functions = {"keep": prototypes.keep, "sliced": prototypes.sliced}
        groups["prototype"] = lambda: {
            name: functools.partial(function, x, w, ids) for name, function in functions.items()
        }
    groups["torch"] = lambda: torch_cases(x, w, ids, compiled=False)
    return groups


def run(arguments: argparse.Namespace) -> None:
    begin = time.perf_counter()
    prototypes = load(arguments.prototypes)
    results: list[dict[str, Any]] = []

    def note(**entry: Any) -> None:
        results.append(entry)
        print(f"{time.perf_counter() - begin:6.1f} s  {entry}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1))

    note(card=torch.cuda.get_device_name(), torch=torch.__version__)
    for shape in SHAPES[: arguments.shapes]:
        N, H, V = shape
        torch.manual_seed(0)
        x = torch.randn(N, H, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(V, H, device="cuda", dtype=torch.bfloat16) * (2 / H**0.5)
        ids = torch.randint(0, V, (N,), device="cuda")
        groups = groups_of(x, w, ids, prototypes)
        floor = {"3": float("nan"), "2": float("nan"), "1": float("nan")}
        for group, make in groups.items():
            try:
                cases = make()
            except Exception as error:
                note(shape=shape, group=group, error=f"{type(error).__name__}: {str(error)[:500]}")
                continue
            for name, case in cases.items():
                if time.perf_counter() - begin > arguments.seconds:
                    note(shape=shape, group=group, case=name, error="not run: out of time")
                    continue
                try:
                    ms, mib = timed(case)
                except Exception as error:
                    note(
                        shape=shape, group=group, case=name,
                        error=f"{type(error).__name__}: {str(error)[:500]}",
                    )  # fmt: skip
                    continue
                if group == "bare":
                    floor[name[0]] = ms
                note(
                    shape=shape, group=group, case=name, ms=round(ms, 3), mib=round(mib),
                    of_three=round(ms / floor["3"], 3), of_two=round(ms / floor["2"], 3),
                    of_one=round(ms / floor["1"], 3),
                )  # fmt: skip
            del cases
    for shape in COMPILED if arguments.compile else ():
        N, H, V = shape
        x = torch.randn(N, H, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(V, H, device="cuda", dtype=torch.bfloat16) * (2 / H**0.5)
        ids = torch.randint(0, V, (N,), device="cuda")
        if time.perf_counter() - begin > arguments.seconds:
            note(shape=shape, group="torch", case="torch.compile", error="not run: out of time")
            continue
        try:
            ms, mib = timed(torch_cases(x, w, ids, compiled=True)["torch.compile"])
            note(shape=shape, group="torch", case="torch.compile", ms=round(ms, 3), mib=round(mib))
        except Exception as error:
            note(shape=shape, group="torch", case="torch.compile", error=str(error)[:500])


def tune(arguments: argparse.Namespace) -> None:
    """The row kernels over BLOCK_SIZE and warps at [1024, 151936] fp32 to bf16: ms, best first."""
    C, V = 1024, 151936
    tile = torch.randn(C, V, device="cuda") * 2
    out = torch.empty(C, V, dtype=torch.bfloat16, device="cuda")
    ids = torch.randint(0, V, (C,), device="cuda")
    stats = torch.zeros(len(Stat), C, device="cuda")
    scale = torch.full((C,), 1.0 / C, device="cuda")
    given = torch.zeros(4, C, device="cuda")
    given[:2] = torch.tensor([-1.0, 1.0], device="cuda")[:, None]
    lines = rows.Rows(None, 0)
    found: dict[str, list[tuple[float, int, int]]] = {}
    for lean in (True, False):
        softmaxes = rows.Softmaxes(ids, None, Transform(), stats, lean)
        loss = rows.TokenLoss(scale, 0.0, 0.0)
        suffix = "lean" if lean else "full"
        running = slices.new_running(ids)
        calls: dict[str, tuple[str, Callable[[], None]]] = {
            "stats": (f"stats_{suffix}", functools.partial(rows.tile_stats, tile, lines, softmaxes)),
            "loss": (f"loss_{suffix}", functools.partial(rows.tile_loss, tile, lines, softmaxes, loss, out)),
            "given": (
                f"given_{suffix}", functools.partial(rows.tile_grad, tile, lines, softmaxes, given, out)
            ),
            "softmax": (
                f"softmax_{suffix}", functools.partial(rows.tile_softmax, tile, lines, softmaxes, out, 1.0)
            ),
            "kept": ("kept", functools.partial(rows.kept_grad, out, out, lines, softmaxes, given, 1.0)),
            "slice": (
                f"slice_{suffix}",
                functools.partial(slices.slice_stats, tile[:, :8192], lines, softmaxes, running, 0, V),
            ),
        }  # fmt: skip
        for name, (entry, call) in calls.items():
            times = []
            for block, warps in itertools.product((1024, 2048, 4096, 8192), (4, 8, 16, 32)):
                if not 4 <= block // (32 * warps) <= 32:
                    continue
                try:
                    with mock.patch.dict(rows.LAUNCH[entry], {80: (block, warps)}):
                        times.append((round(timed(call, 9)[0], 4), block, warps))
                except Exception as error:
                    print(f"{name} {suffix} ({block}, {warps}): {error}", flush=True)
            found[f"{name}, {suffix}"] = sorted(times)
            print(f"{name}, {suffix}: " + "; ".join(map(str, found[f"{name}, {suffix}"][:6])), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(found, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.head_times")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--seconds", type=float, default=200.0, help="begin no case after that")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the shapes")
    parser.add_argument("--prototypes", type=Path, metavar="FILE")
    parser.add_argument("--compile", action="store_true", help="torch.compile too, at the end")
    parser.add_argument(
        "--tune", action="store_true", help="the row kernels over BLOCK_SIZE and warps instead"
    )
    arguments = parser.parse_args()
    (tune if arguments.tune else run)(arguments)


if __name__ == "__main__":
    main()
