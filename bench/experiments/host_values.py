"""Tables of Liger's and torch's losses: their value and ours in fp32, and the formula's in fp64.

    TRITON_INTERPRET=1 python -m bench.experiments.host_values liger
    python -m bench.experiments.host_values torch

Liger's cross-entropy has kernels for GPUs alone. Without a GPU, Triton's interpreter runs them. A loss of
reduction="none" is shown as its sum. "off" is the largest error of a gradient (hidden, weight, bias) over its
largest entry.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import liger_cross_entropy_cases as cross_entropy_cases
from . import liger_distillation_cases as distillation_cases
from .liger_cases import call, cases, expected_loss, tensors


class Row(NamedTuple):
    """A line of a table: losses, and the gradients of the same inputs under each."""

    call: str
    option: str
    theirs: tuple[Tensor, tuple[Tensor, ...]] | None  # None: it does not run here
    ours: tuple[Tensor, tuple[Tensor, ...]]
    fp64: tuple[Tensor, tuple[Tensor, ...]]

    def line(self) -> str:
        """A row of Markdown: three losses, and the largest error of a gradient of theirs and of ours."""
        exact_loss, exact_grads = self.fp64
        losses, errors = [], []
        for score in (self.theirs, self.ours):
            if score is None:
                losses.append("does not run")
                errors.append("")
                continue
            loss, grads = score
            losses.append(f"{float(loss.detach().sum()):.7f}")
            pairs = zip(grads, exact_grads, strict=True)
            largest = [float((grad - exact).abs().max() / exact.abs().max()) for grad, exact in pairs]
            errors.append(f"{max(largest):.0e}")
        losses.append(f"{float(exact_loss.detach().sum()):.7f}")
        return f"| {' | '.join([f'`{self.call}`', self.option, *losses, *errors])} |"


def scored(loss: Tensor, inputs: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    return loss, torch.autograd.grad(loss.sum(), inputs)


def doubled(given: dict[str, Any]) -> dict[str, Any]:
    """A copy of the arguments in fp64, whose gradients are asked for as before."""
    return {
        name: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for name, x in given.items()
    }


def settings(options: dict[str, Any]) -> str:
    """Options as a caller writes them."""
    return ", ".join(
        f"{name}=LinearCrossEntropyOptions()" if name == "options" else f"{name}={_shown(value)}"
        for name, value in options.items()
    )


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return "[…]" if value.dim() else f"{value.item():g}"


def liger_rows() -> Iterator[Row]:
    """Fused linear cross-entropy, then the chunked losses."""
    from liger_kernel import chunked_loss, transformers
    from triton.runtime.errors import InterpreterError

    import fastalign.integrations.liger as ours

    name = "LigerFusedLinearCrossEntropyLoss"
    of_head = ("lin_weight", "_input", "bias")
    for dtype in (torch.float32, torch.bfloat16):
        for options in cross_entropy_cases.OPTIONS.values() if dtype == torch.float32 else ({},):
            given = cross_entropy_cases.head(dtype, tokens=7 if dtype == torch.float32 else 512)
            wide = doubled(given)
            logits = wide["_input"] @ wide["lin_weight"].T + wide["bias"]
            exact = cross_entropy_cases.cross_entropy_formula(logits, wide["target"], **options)["loss"]
            options = {k: x.float() if isinstance(x, Tensor) else x for k, x in options.items()}
            inputs = [given[x] for x in of_head]
            theirs: tuple[Tensor, tuple[Tensor, ...]] | None = None
            with contextlib.suppress(InterpreterError):  # its softcap needs a GPU's tanh
                theirs = scored(getattr(transformers, name)(**options)(*given.values()), inputs)
            mine = scored(getattr(ours, name)(**options)(*given.values()), inputs)
            option = settings(options) if dtype == torch.float32 else "bf16, 512 tokens"
            yield Row(name, option, theirs, mine, scored(exact, [wide[x] for x in of_head]))

    of_head = ("weight", "hidden", "bias")
    for loss, options, extra in cases():
        name, given = f"LigerFusedLinear{loss}Loss", tensors(torch.float32)
        wide = doubled(given)
        pair = [getattr(package, name)(**options, compiled=False) for package in (chunked_loss, ours)]
        scores = [scored(call(module, given, **extra)[0], [given[x] for x in of_head]) for module in pair]
        exact = expected_loss(loss, wide, options, extra)
        yield Row(
            name,
            settings({**options, **extra}),
            scores[0],
            scores[1],
            scored(exact, [wide[x] for x in of_head]),
        )

    name, of_head = "LigerFusedLinearJSDLoss", ("h", "w", "b")
    for options in distillation_cases.OPTIONS:
        given = distillation_cases.heads(torch.float32)
        wide = doubled(given)
        pair = [getattr(package, name)(**options, compiled=False) for package in (chunked_loss, ours)]
        scores = [scored(distillation_cases.call(x, given), [given[k] for k in of_head]) for x in pair]
        exact = distillation_cases.expected_loss(wide, options)
        exact_score = scored(exact, [wide[x] for x in of_head])
        yield Row(name, settings(options), scores[0], scores[1], exact_score)


def torch_rows() -> Iterator[Row]:
    """linear_cross_entropy with indices and with probabilities, over K dimensions."""
    from fastalign.integrations.torch import linear_cross_entropy

    theirs: Any = F.linear_cross_entropy
    N, H, C = 64, 16, 97
    class_weights = torch.rand(C, generator=torch.Generator().manual_seed(1))
    options: list[tuple[str, dict[str, Any]]] = [
        ("[N], [C, H]", {}),
        ("[N], [C, H]", {"options": torch.nn.LinearCrossEntropyOptions()}),
        ("[N], [C, H]", {"weight": class_weights}),
        ("[N], [C, H]", {"weight": class_weights, "label_smoothing": 0.1}),
        ("[N], [C, H]", {"reduction": "none", "label_smoothing": 0.1}),
        ("[N], [C, H]", {"ignore_index": 3, "reduction": "sum"}),
        ("[N, 4], [C, 4, H]", {"weight": class_weights}),
        ("probabilities [N, C]", {"label_smoothing": 0.1}),
        ("probabilities [N, C, 4]", {"weight": class_weights}),
        ("bf16, [N], [C, H]", {}),
        ("bf16, [N], [C, H]", {"options": torch.nn.LinearCrossEntropyOptions()}),
    ]
    for shape, given in options:
        torch.manual_seed(0)
        places = (4,) if "4" in shape else ()
        dtype = torch.bfloat16 if "bf16" in shape else torch.float32
        hidden = torch.randn(N, H).to(dtype).requires_grad_()
        weight = torch.randn(C, *places, H).to(dtype).requires_grad_()
        target = torch.randint(C, (N, *places))
        if "probabilities" in shape:
            target = torch.randn(N, C, *places).softmax(1)
        scores = [
            scored(function(hidden, weight, target, **given), [hidden, weight])
            for function in (theirs, linear_cross_entropy)
        ]
        wide = doubled({"hidden": hidden, "weight": weight, "target": target})
        plain: dict[str, Any] = {
            name: x.double() if isinstance(x, Tensor) else x for name, x in given.items()
        }
        plain.pop("options", None)
        exact = F.cross_entropy(
            torch.tensordot(wide["hidden"], wide["weight"], dims=([-1], [-1])), wide["target"], **plain
        )
        exact_score = scored(exact, [wide["hidden"], wide["weight"]])
        yield Row(shape, settings(given), scores[0], scores[1], exact_score)


def main() -> None:
    """Print one host's table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("host", choices=("liger", "torch"))
    host = parser.parse_args().host
    print(f"| call | options | {host} | fastalign | fp64 | {host} off | fastalign off |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in liger_rows() if host == "liger" else torch_rows():
        print(row.line(), flush=True)


if __name__ == "__main__":
    main()
