"""The host times of the small losses: every loss has both rows, and they are the same loss."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.experiments.small_losses import measure, small_losses

ROOT = Path(__file__).parents[2]


def test_each_loss_equals_its_plain_form():
    for name, (ours, plain, _) in small_losses(4, 8, "cpu").items():
        found, expected = ours(), plain()
        if isinstance(found, dict):
            assert found.keys() == expected.keys(), name
            pairs = [(found[key], expected[key]) for key in found]
        else:
            pairs = list(zip(found, expected, strict=True))
        for ours_value, plain_value in pairs:
            torch.testing.assert_close(ours_value, plain_value, msg=lambda text, name=name: f"{name}: {text}")


def test_a_round_times_every_loss(monkeypatch):
    monkeypatch.setattr("bench.experiments.small_losses.CALLS", 1)
    table = measure(4, 8, "cpu", rounds=1)
    assert len(table) == 10 and all(figure > 0 for _, *figures in table for figure in figures)


def test_the_host_only_driver_compiles_and_counts_launches():
    """In a process of its own: a driver stays for good."""
    pytest.importorskip("triton", reason="triton is not installed")
    script = """
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import fastalign_kernels as kernels
from bench.gpu.host_only import use_host_only
driver = use_host_only()
values, mask = torch.zeros(2, 8), torch.ones(2, 8, dtype=torch.bool)
for _ in range(2):
    kernels.gae(values, values, mask)
print(driver.launches)
"""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    found = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["2"], "the first launch compiles, the second uses what it compiled"
