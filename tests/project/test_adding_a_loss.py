"""CONTRIBUTING's steps for a loss and for a head option, done on a copy of the package: all else follows."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FORMULA = '''
def made_up(c, r, beta, e):
    """(x - 1)^2 softened by s(x), a loss of nobody's."""
    x = beta * (c - r)
    s = sigmoid(x)
    d = beta * (2 * (x - 1) * s + (x - 1) * (x - 1) * s * sigmoid(-x))
    return (x - 1) * (x - 1) * s, d, -d


'''
LINE = '    "made_up": PairLoss(made_up),\n'
REFERENCE = (
    '    "made_up": lambda c, r, beta, e: (beta * (c - r) - 1) ** 2 * torch.sigmoid(beta * (c - r)),\n'
)

CHECKS = """
import os, sys
import torch
from typing import get_args
from fastalign_kernels import dpo_loss, linear_dpo_loss
from fastalign_kernels.preference import ops
from fastalign_kernels.preference.reference import dpo_loss_ref

S, T, H, V = 5, 4, 8, 11
generator = torch.Generator().manual_seed(0)
logps = list((torch.randn(4, S, generator=generator) - 9).unbind())
logps[0].requires_grad_(), logps[1].requires_grad_()

def value_and_grads(loss):
    out = loss(*logps, loss_type="made_up", beta=0.3).loss
    return out.detach(), *torch.autograd.grad(out, logps[:2])

expected = value_and_grads(dpo_loss_ref)
for a, b in zip(value_and_grads(dpo_loss), expected):
    torch.testing.assert_close(a, b)
try:
    from fastalign_kernels.preference import losses_triton
except ImportError:
    print("no triton", file=sys.stderr)
else:
    ops.KERNELS.select = lambda losses: losses_triton  # in the interpreter
    for a, b in zip(value_and_grads(dpo_loss), expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    del ops.KERNELS.select

hidden, weight = torch.randn(2 * S, T, H, generator=generator), torch.randn(V, H, generator=generator)
ids = torch.randint(0, V, (2 * S, T), generator=generator)
reference = torch.randn(2 * S, generator=generator) - 9
head = linear_dpo_loss(hidden, weight.requires_grad_(), ids, reference_logps=reference, loss_type="made_up")
pairs = dpo_loss_ref(
    head.chosen_logps, head.rejected_logps, reference[:S], reference[S:], loss_type="made_up"
)
torch.testing.assert_close(head.loss.detach(), pairs.loss)
head.loss.backward()
assert weight.grad.abs().sum() > 0

from fastalign.stages.stage_configs import DPOConfig
assert "made_up" in get_args(DPOConfig.__annotations__["loss_type"])
assert "made_up" in dpo_loss.__doc__
from bench.cases.bench_dpo_loss import CASES
assert "dpo_loss, made_up fp32" in CASES
print("served")
"""


HEAD_LOSS = '''
"""A loss on the head of nobody's: the sum over tokens of logp^2 / 2."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from ..ordered_sum import ordered_sum
from ..softmax.rows import Stat, coefficients
from . import engines
from .engine import empty_gradients, empty_stats
from .head_ops import register_head_loss
from .inputs import HeadInputs, NeedsGrad, head_inputs
from .options import HeadArguments, head_keywords, head_options


def _square(inputs: HeadInputs, needs: NeedsGrad) -> tuple[Tensor, ...]:
    def of_tokens(stats: Tensor, tokens: Tensor | slice) -> Tensor:
        grad = torch.zeros_like(stats)
        grad[Stat.LOGP] = stats[Stat.LOGP]
        return coefficients(grad, stats, inputs.vocab_size)

    stats, grads = engines.statistics_and_gradients(inputs, of_tokens, needs)
    return ordered_sum(stats[Stat.LOGP] ** 2) / 2, stats, *grads


def _fake_square(inputs, needs):
    stats = empty_stats(inputs)
    return stats.new_empty(()), stats, *empty_gradients(inputs, needs)


_head_square = register_head_loss("head_square", _square, _fake_square, losses="linear_square_loss")


@head_keywords
def linear_square_loss(
    hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None = None, **head: Unpack[HeadArguments]
) -> Tensor:
    """The sum of logp^2 / 2."""
    inputs = head_inputs(hidden, weight, ids, bias, head_options(linear_square_loss, head)).lean()
    return _head_square(inputs, inputs.needs_grad())[0]
'''
HEAD_REFERENCE = """
@head_keywords
def linear_square_loss_ref(hidden, weight, ids, bias=None, **head: Unpack[ReferenceArguments]):
    options = head_options(linear_square_loss_ref, head, REFERENCE_ARGUMENTS)
    return _stats_ref(hidden, weight, ids, bias, options)[Stat.LOGP].square().sum() / 2


"""
HEAD_CHECKS = """
import inspect
import torch
from fastalign_kernels import linear_square_loss
from fastalign_kernels.linear.reference import linear_square_loss_ref

generator = torch.Generator().manual_seed(0)
hidden, weight = (torch.randn(*s, generator=generator, dtype=torch.double) for s in ((6, 8), (11, 8)))
given = (hidden.requires_grad_(), weight.requires_grad_(), torch.tensor([0, 3, -100, 10, 4, 4]))

def value_and_grads(loss):
    out = loss(*given, softcap=5.0, temperature=0.7)
    return out.detach(), *torch.autograd.grad(out, given[:2])

for a, b in zip(value_and_grads(linear_square_loss), value_and_grads(linear_square_loss_ref)):
    torch.testing.assert_close(a, b)
assert "workspace_mib" in inspect.signature(linear_square_loss).parameters
print("served")
"""

OPTION_CHECKS = """
import inspect
import fastalign_kernels
from fastalign import nn
from tests.kernels.public_calls import FUNCTIONS, call_of

modules = (nn.LinearCrossEntropyLoss, nn.LinearDPOLoss, nn.LinearKTOLoss, nn.LinearPPOLoss)
calls = [(f, call_of(name)) for name, f in FUNCTIONS.items() if name.startswith("linear_")]
for call, given in [*calls, *((module, {}) for module in modules)]:
    assert inspect.signature(call).parameters["made_up"].default == 0.5
    call(**given, made_up=0.25)
    try:
        call(**given, made_up=2.0)
    except ValueError as error:
        assert str(error).startswith("made_up: got 2.0"), error
    else:
        raise AssertionError(call)
print("served")
"""


def insert(path: Path, before: str, text: str) -> None:
    source = path.read_text()
    assert source.count(before) == 1
    path.write_text(source.replace(before, text + before))


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of fastalign_kernels."""
    return Path(
        shutil.copytree(
            ROOT / "kernels" / "fastalign_kernels",
            tmp_path / "fastalign_kernels",
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    )


def check(package: Path, code: str) -> str:
    """What the code prints to stderr, run with this copy; it prints "served" at its end."""
    paths = os.pathsep.join([str(package.parent), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=package.parent
    )
    assert run.returncode == 0 and "served" in run.stdout, run.stderr
    return run.stderr


def test_a_formula_a_line_of_the_table_and_a_reference_are_enough(package: Path) -> None:
    insert(package / "preference" / "formulas.py", "class PairLoss(NamedTuple):", FORMULA.lstrip())
    insert(package / "preference" / "formulas.py", '    "odds_ratio": PairLoss(odds_ratio),', LINE)
    insert(package / "preference" / "reference.py", '    "sigmoid_norm": lambda', REFERENCE)
    if "no triton" in check(package, CHECKS):
        pytest.skip("triton is not installed; all but its kernel was checked")


def test_a_loss_on_the_head_is_a_file_its_reference_and_a_line(package: Path) -> None:
    (package / "linear" / "square.py").write_text(HEAD_LOSS.lstrip())
    reference = package / "linear" / "reference.py"
    insert(reference, "@head_keywords\ndef linear_token_stats_ref(", HEAD_REFERENCE.lstrip())
    reference.write_text(reference.read_text().replace("import row_stats_ref", "import Stat, row_stats_ref"))
    insert(
        package / "__init__.py",
        "from .linear.tail_columns",
        "from .linear.square import linear_square_loss as linear_square_loss\n",
    )
    check(package, HEAD_CHECKS)


def test_a_head_option_is_its_type_its_default_and_its_check(package: Path) -> None:
    options = package / "linear" / "options.py"
    insert(options, "    tail_eps: float | None\n    workspace_mib: float | None\n", "    made_up: float\n")
    insert(options, "    ignore_index: int = -100\n", "    made_up: float = 0.5\n")
    insert(
        options,
        "        ignore_index=checks.ignore_index(",
        '        made_up=checks.unit_interval("made_up", options.made_up),\n',
    )
    check(package, OPTION_CHECKS)
