"""`python -m bench roofline [RESULTS.json]`: predicted time and memory of each operation.

Without a file it predicts H100, A100 and B200 at the shapes of real heads. With a file it predicts the file's
cases on those GPUs and on the file's machine, next to what was measured there. The rates of that machine are
what its bare GEMMs and bare read reached.

The count: 2 N H V flops for each GEMM, and the bytes of the passes between GEMMs, each input read once and
each output written once. GEMMs and passes run one after another, so their times add up. A GEMM takes the
longer of multiplying and of moving its operands.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from fastalign_kernels import native
from fastalign_kernels.linear.gpu.plan import GpuCall, gpu_workspace_mib
from fastalign_kernels.linear.gpu.work import RATES, Rates, gpu_work
from fastalign_kernels.linear.plan import TileCall, capacity, default_workspace_mib, plan_head

from ..core.operation import OURS, Shape
from ..core.shapes import GPU_TOKENS, HEADS
from ..methods.preference import PAIRS, ROWS
from ..methods.steps import Layers

SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}
MEMORY_MIB = 81920.0  # of a GPU here: 80 GiB
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Machine(NamedTuple):
    """Flops a second in bf16 and fp32 (dense), bytes a second, and the shares assumed reachable."""

    name: str
    low_flops: float
    fp32_flops: float
    bytes: float
    gemm_share: float
    byte_share: float
    kind: str = "cuda"
    architecture: int = 0  # compute capability; 0: one that runs what every GPU can

    @property
    def rates(self) -> Rates | None:
        """What the package knows of this architecture."""
        return RATES.get(self.architecture) if self.kind == "cuda" else None

    def rate(self, dtype: str) -> float:
        return (self.fp32_flops if dtype == "fp32" else self.low_flops) * self.gemm_share


# Peaks: NVIDIA's data sheets of H100 SXM, A100 80GB SXM and DGX B200; bf16 dense, fp32 without TF32. Shares:
# an H100 was measured at 728 TFLOP/s in the bare GEMMs of a head (huggingface/trl#7244) and at 3.0 TB/s in
# cross-entropy (quack's README); assumed of all three.
GPUS = (
    Machine("H100", 989e12, 67e12, 3.35e12, 0.708, 0.9, architecture=90),
    Machine("A100", 312e12, 19.5e12, 2.039e12, 0.708, 0.9, architecture=80),
    Machine("B200", 2250e12, 75e12, 8.0e12, 0.708, 0.9, architecture=100),
)


class Work(NamedTuple):
    """An operation's GEMMs as (times, M, N, K), bytes of the passes, and bytes held beyond the inputs."""

    gemms: tuple[tuple[float, int, int, int], ...]
    pass_bytes: float
    held_bytes: float
    launches: int = 0  # of a head on a GPU
    epilogue_logits: float = 0.0  # whose GEMM also computes their statistics (linear/gpu/work.py)


class Prediction(NamedTuple):
    """Predicted seconds of GEMMs and passes, and MiB beyond the inputs."""

    gemms: float
    passes: float
    mib: float

    @property
    def seconds(self) -> float:
        return self.gemms + self.passes


def predict(work: Work, machine: Machine, dtype: str) -> Prediction:
    rate, bandwidth = machine.rate(dtype), machine.bytes * machine.byte_share
    seconds = sum(
        times * max(2 * m * n * k / rate, (m * k + k * n + m * n) * SIZES[dtype] / bandwidth)
        for times, m, n, k in work.gemms
    )
    passes = work.pass_bytes / bandwidth
    if machine.rates is not None:
        seconds += work.epilogue_logits * machine.rates.epilogue
        passes += work.launches * machine.rates.launch
    return Prediction(seconds, passes, work.held_bytes / 2**20)


def count(
    operation: str, dtype: str, trained: Sequence[str], shape: Shape, kind: str, architecture: int = 0
) -> Work | None:
    """The work of our row on that kind of device; None for a filtered draw: its bytes depend on logits."""
    head = partial(_head, dtype, shape, kind, architecture=architecture)
    base = operation.partition(",")[0]
    if base.endswith(" step"):
        return _step(base.removesuffix(" step"), dtype, shape, kind, architecture)
    if base in ("linear_cross_entropy", "linear_logprobs"):
        upstream = "scalar" if base == "linear_cross_entropy" else "logp"
        return head("hidden" in trained, "weight" in trained, upstream)
    if base in ("linear_dpo", "linear_kto"):  # the reference's pass, which saves nothing, and the policy's
        units = PAIRS if base == "linear_dpo" else ROWS
        reference = head(False, False, "scalar")
        policy = _sequences_head(dtype, shape, kind, units, architecture)
        return _both(reference, policy)
    size, logits = SIZES[dtype], shape.N * shape.V
    if base == "token_stats":
        return Work((), size * logits, 28 * shape.N)
    if base == "cross_entropy":
        return Work((), 3 * size * logits, size * logits)
    if base == "reward":
        return Work((), 4 * size * shape.N, 2 * size * shape.N)
    if base == "dpo_loss":  # four log-probabilities of a pair, two gradients
        return Work((), 6 * size * shape.N, 2 * size * shape.N)
    # N sequences of V tokens with a mask of one byte. PPO: four inputs, two gradients, and these times the
    # upstream gradient. GAE and whitening: inputs and outputs.
    if base == "ppo":
        return Work((), (10 * size + 1) * logits, 4 * size * logits)
    if base == "gae":
        return Work((), (4 * size + 1) * logits, 2 * size * logits)
    if base == "whiten":
        return Work((), (3 * size + 2) * logits, size * logits)
    if operation == "sample":
        return Work((), size * logits, 40 * shape.N)
    return None


def _both(first: Work, second: Work) -> Work:
    """The work of two calls one after the other, of which the second holds more memory."""
    return Work(
        first.gemms + second.gemms,
        first.pass_bytes + second.pass_bytes,
        second.held_bytes,
        first.launches + second.launches,
        first.epilogue_logits + second.epilogue_logits,
    )


def _sequences_head(dtype: str, shape: Shape, kind: str, units: int, architecture: int) -> Work:
    """The work of a head whose loss takes whole sequences; linear/sequences.py explains its GEMMs."""
    if kind != "cpu":
        return _head(dtype, shape, kind, True, True, "logp", architecture=architecture)
    mib = default_workspace_mib("cpu", weight_grad=False)
    work = _head(dtype, shape, kind, True, True, "logp", mib)
    room, _ = capacity(TileCall(shape.V, DTYPES[dtype], kind, True, True, None, mib))
    chunks = -(-shape.N // units // room)
    (_, m, n, k), *gradients = work.gemms
    return work._replace(gemms=((2 - 1 / chunks, m, n, k), *gradients))


def _head(
    dtype: str,
    shape: Shape,
    kind: str,
    hidden_grad: bool,
    weight_grad: bool,
    upstream: str,
    workspace_mib: float | None = None,
    architecture: int = 0,
) -> Work:
    N, H, V = shape
    plan = plan_head(
        N,
        H,
        V,
        dtype=DTYPES[dtype],
        device=kind,
        hidden_grad=hidden_grad,
        weight_grad=weight_grad,
        upstream=upstream,
        workspace_mib=workspace_mib,
        architecture=architecture,
        memory_mib=MEMORY_MIB,
    )
    size = SIZES[dtype]
    dX, dW = int(hidden_grad), int(weight_grad)
    gradients = [(1.0, N, H, V)] * dX + [(1.0, V, H, N)] * dW
    if plan.engine != "token_tiles":
        mib = gpu_workspace_mib(None) if workspace_mib is None else workspace_mib
        call = GpuCall(N, H, V, DTYPES[dtype], mib, hidden_grad, weight_grad)
        work = gpu_work(plan, call)
        return Work(
            ((work.forwards, N, V, H), *gradients),
            work.pass_bytes,
            work.held_bytes + 28 * N,
            work.launches,
            work.epilogue_logits,
        )
    gemms = [(float(plan.gemms - dX - dW), N, V, H), *gradients]
    # fp32 logits are read once for the statistics; for the gradient read again and overwritten, on a GPU in
    # the inputs' dtype.
    passes = 4 + (4 + (size if kind == "cuda" else 4)) * (dX or dW)
    held = plan.workspace_bytes + 28 * N + size * N * H * dX + 4 * V * H * dW
    if dW and size < 4:
        held += size * V * H  # the gradient in the weight's dtype, made of its fp32 sum
    if kind == "cpu" and size < 4 and not native.uses_gemm():
        held += 4 * V * H  # the weight in fp32
    return Work(tuple(gemms), float(passes * N * V), float(held))


def _step(stage: str, dtype: str, shape: Shape, kind: str, architecture: int) -> Work:
    """The work of a training step: the backbone's GEMMs without attention's, the head, and AdamW.

    AdamW reads four tensors of the weights' size and writes three.
    """
    N, H, V = shape
    number, heads, key_heads, inner = Layers.of(H)
    body = number * (2 * H * H + 2 * H * (H // heads) * key_heads + 3 * H * inner)
    body_passes = 3.0  # forward, and backward two GEMMs for each of forward's
    head = partial(_head, dtype, shape, kind, architecture=architecture)
    heads_run: list[Work] = []
    if stage != "reward":
        heads_run = [head(True, True, "scalar" if stage in ("pretrain", "sft") else "logp")]
    # The reference's pass; for KTO over twice the sequences, and the policy's pass on the mismatched ones.
    if stage in ("dpo", "kto"):
        extra = 1 if stage == "dpo" else 3
        body_passes += extra
        heads_run += [head(False, False, "scalar")] * extra
    weights, size = body + V * H, SIZES[dtype]
    gemms = ((body_passes, N, body // H, H), *(gemm for head in heads_run for gemm in head.gemms))
    held = weights * size + max((head.held_bytes for head in heads_run), default=0.0)
    return Work(gemms, 7.0 * weights * size + sum(head.pass_bytes for head in heads_run), held)


def measured_machine(results: Mapping[str, Any]) -> Machine | None:
    """The machine of a results file with the rates of its bare GEMMs and bare read; None without them."""
    flops: dict[str, list[float]] = {"fp32": [], "bf16": []}
    reads = []
    for case in results["cases"]:
        N, H, V = case["shape"].values()
        rows = {
            name: statistics.median(row["seconds"]) for name, row in case["rows"].items() if row["seconds"]
        }
        gemms = [
            int(name.split()[0]) * 2 * N * H * V / seconds
            for name, seconds in rows.items()
            if " bare GEMM" in name
        ]
        if gemms and case["dtype"] in flops:
            flops[case["dtype"]].append(max(gemms))  # torch's or gemm.py's, whichever is faster
        if case["dtype"] == "fp32" and "one read (amax)" in rows:
            reads.append(4 * N * V / rows["one read (amax)"])
    if not flops["fp32"] or not reads:
        return None
    info = results["machine_info"]
    gpu = info["gpu"] != "none"
    rate = statistics.median(flops["fp32"])  # also bf16's, if none was measured
    low = statistics.median(flops["bf16"] or [rate])
    return Machine(
        info["gpu"] if gpu else info["cpu"],
        low,
        rate,
        statistics.median(reads),
        1.0,
        1.0,
        "cuda" if gpu else "cpu",
    )


def table(results: Mapping[str, Any] | None) -> str:
    """The predictions as Markdown, a row for each case."""
    local = measured_machine(results) if results else None
    machines = [*GPUS, *([local] if local else [])]
    rates = [
        (m.name, m.rate("bf16") / 1e12, m.rate("fp32") / 1e12, m.bytes * m.byte_share / 1e12)
        for m in machines
    ]
    shares = "; ".join(
        f"{name} {low:,.4g} TFLOP/s (fp32 {high:.3g}), {bandwidth:.3g} TB/s"
        for name, low, high, bandwidth in rates
    )
    names = [f"{m.name}: ms, MiB" for m in machines] + ["measured: ms, MiB"] * bool(results)
    lines = [
        f"Predicted for {shares}.",
        "",
        f"| operation | N, H, V | {' | '.join(names)} |",
        "|" + " --- |" * (len(names) + 2),
    ]
    for case in results["cases"] if results else _usual_cases():
        shape = Shape(*case["shape"].values())
        if not shape.N:
            continue  # left out on that machine
        cells = []
        for machine in machines:
            work = count(
                case["operation"], case["dtype"], case["trained"], shape, machine.kind, machine.architecture
            )
            cells.append(
                _cell(
                    *(predict(work, machine, case["dtype"]).seconds, work.held_bytes / 2**20)
                    if work
                    else (None, None)
                )
            )
        if results:
            row = case["rows"][OURS]
            cells.append(
                _cell(statistics.median(row["seconds"]) if row["seconds"] else None, row["peak_mib"])
            )
        lines.append(f"| {case['name']} | {', '.join(map(str, shape))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(seconds: float | None, mib: float | None) -> str:
    return f"{'–' if seconds is None else f'{seconds * 1e3:.3g}'}, {'–' if mib is None else f'{mib:,.0f}'}"


def _usual_cases() -> list[dict[str, Any]]:
    """The operations in bf16 at the heads of HEADS, with the tokens of a GPU's cases."""
    both = ["hidden", "weight"]
    operations = [
        ("linear_cross_entropy", both),
        ("linear_logprobs", both),
        ("linear_logprobs", ["hidden"]),
        ("linear_logprobs", []),
        ("linear_dpo", both),
        ("linear_kto", both),
        ("token_stats", []),
        ("cross_entropy", ["logits"]),
        ("sample", []),
        ("pretrain step", []),
    ]
    return [
        {
            "name": f"{operation} bf16{', ' + ' and '.join(trained) + ' trained' if trained else ''}, {head}",
            "operation": operation,
            "dtype": "bf16",
            "trained": trained,
            "shape": Shape(GPU_TOKENS, H, V)._asdict(),
        }
        for head, (H, V) in HEADS.items()
        for operation, trained in operations
        if operation != "pretrain step" or head == "SmolLM2-135M"
    ]
