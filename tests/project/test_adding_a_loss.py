"""CONTRIBUTING's steps for a loss of pairs, done on a copy of the package: all else serves the loss."""

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
print("served")
"""


def insert(path: Path, before: str, text: str) -> None:
    source = path.read_text()
    assert source.count(before) == 1
    path.write_text(source.replace(before, text + before))


def test_a_formula_a_line_of_the_table_and_a_reference_are_enough(tmp_path: Path) -> None:
    package = shutil.copytree(
        ROOT / "kernels" / "fastalign_kernels",
        tmp_path / "fastalign_kernels",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    insert(package / "preference" / "formulas.py", "class PairLoss(NamedTuple):", FORMULA.lstrip())
    insert(package / "preference" / "formulas.py", '    "odds_ratio": PairLoss(odds_ratio),', LINE)
    insert(package / "preference" / "reference.py", '    "sigmoid_norm": lambda', REFERENCE)
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", CHECKS], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0 and "served" in run.stdout, run.stderr
    if "no triton" in run.stderr:
        pytest.skip("triton is not installed; all but its kernel was checked")
