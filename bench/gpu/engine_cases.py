"""The head's engines by themselves in bf16, beside bare GEMMs: what public functions ask of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from fastalign_kernels.linear.engine import Engine
from fastalign_kernels.linear.gpu.epilogue import EpilogueStatistics
from fastalign_kernels.linear.gpu.epilogue_slices import EpilogueSlices
from fastalign_kernels.linear.gpu.kept_softmax import KeptSoftmax
from fastalign_kernels.linear.gpu.plan import epilogue_serves
from fastalign_kernels.linear.gpu.vocab_slices import VocabSlices
from fastalign_kernels.linear.inputs import HeadInputs, NeedsGrad
from fastalign_kernels.linear.options import HeadOptions
from fastalign_kernels.linear.token_losses import TokenCrossEntropy
from fastalign_kernels.softmax.rows import Stat, coefficients

from ..core.operation import OURS, Absent, Shape
from ..methods.ceilings import bare_gemms
from ..methods.head import head_inputs
from .case import TINY, Call, Calls, GpuCase
from .head_cases import SHAPES

BOTH = NeedsGrad(hidden=True, weight=True)
FROZEN = NeedsGrad(hidden=True)
SLICES_MIB = 300.0
Run = Callable[[Engine, HeadInputs], object]


def _loss(inputs: HeadInputs) -> TokenCrossEntropy:
    N = inputs.ids.shape[0]
    return TokenCrossEntropy(
        inputs.hidden.new_full((N,), 1 / N, dtype=torch.float32), 0.0, 0.0, inputs.vocab_size
    )


def cross_entropy(engine: Engine, inputs: HeadInputs, *, needs: NeedsGrad = BOTH) -> object:
    return engine.statistics_and_gradients(inputs, _loss(inputs), needs)


def given_coefficients(engine: Engine, inputs: HeadInputs) -> object:
    """All statistics, and a loss that is a function of them, as PPO's."""
    loss = _loss(inputs)

    def of_tokens(stats: Tensor, tokens: Tensor | slice) -> Tensor:
        return loss(stats, tokens)

    return engine.statistics_and_gradients(inputs, of_tokens, BOTH)


def any_upstream(engine: Engine, inputs: HeadInputs) -> object:
    """Log-probabilities whose gradient comes later."""
    stats, saved = engine.statistics(inputs, BOTH)
    upstream = torch.zeros_like(stats)
    upstream[Stat.LOGP] = 1e-4
    return engine.gradients(inputs, stats, saved, coefficients(upstream, stats, inputs.vocab_size), BOTH)


def no_gradient(engine: Engine, inputs: HeadInputs) -> object:
    return engine.statistics(inputs, NeedsGrad())


# By name: the call, whether two statistics are not used, and the bare GEMMs' gradients.
RUNS: dict[str, tuple[Run, bool, NeedsGrad]] = {
    "cross-entropy": (cross_entropy, True, BOTH),
    "given coefficients": (given_coefficients, False, BOTH),
    "any upstream": (any_upstream, True, BOTH),
    "frozen": (partial(cross_entropy, needs=FROZEN), True, FROZEN),
    "no gradient": (no_gradient, True, NeedsGrad()),
}


def _make(name: str, shape: Shape, device: str) -> Calls:
    run, lean, needs = RUNS[name]
    tensors = head_inputs(shape, torch.bfloat16 if device == "cuda" else torch.float32, device)
    inputs = HeadInputs(tensors["hidden"], tensors["weight"], tensors["ids"], None, HeadOptions(lean=lean))
    small = inputs._replace(options=inputs.options._replace(workspace_mib=SLICES_MIB))
    engines: Mapping[str, tuple[Engine, HeadInputs]] = {
        "epilogue": (EpilogueStatistics(), inputs),
        "kept softmax": (KeptSoftmax(2560.0), inputs),
        f"slices in {SLICES_MIB:.0f} MiB": (VocabSlices(SLICES_MIB), small),
        f"epilogue, slices in {SLICES_MIB:.0f} MiB": (EpilogueSlices(SLICES_MIB), small),
    }
    if device == "cuda":  # in bf16
        options = inputs.options._replace(logits_dtype=torch.bfloat16)
        low = (KeptSoftmax(2560.0), inputs._replace(options=options))
        engines = {**engines, "kept softmax, bf16 logits": low}
    ours: dict[str, Call] = {}
    absent: dict[str, str] = {}
    for engine_name, (engine, given) in engines.items():
        row = f"{OURS}, {engine_name}"
        try:
            _check(engine, given, device)
        except Absent as reason:
            absent[row] = str(reason)
            continue
        ours[row] = partial(run, engine, given)
    number = 1 + needs.hidden + needs.weight
    ceiling = bare_gemms(1, hidden_grad=needs.hidden, weight_grad=needs.weight)(tensors)
    return Calls(ours, {f"{number} bare GEMM{'s' if number > 1 else ''}": ceiling}, absent=absent)


def _check(engine: Engine, inputs: HeadInputs, device: str) -> None:
    if not isinstance(engine, EpilogueStatistics):
        return
    if device != "cuda":
        raise Absent("its tiles are too large for Triton's interpreter")
    major, minor = torch.cuda.get_device_capability()
    if not epilogue_serves(inputs.gpu_call(BOTH, 2560.0, architecture=10 * major + minor)):
        raise Absent("it does not serve this GPU")


def _cases() -> Iterator[GpuCase]:
    for shape in SHAPES:
        for name in RUNS:
            title = f"engines, {name}, {shape.N} × {shape.H} × {shape.V}"
            yield GpuCase(title, shape, partial(_make, name), tiny=TINY)


CASES = tuple(_cases())
