"""The support matrix of docs/integrations.md: a short training with the host's functions and with ours."""

from __future__ import annotations

import pytest

from bench.experiments.host_matrix import CASES, Case, line, patches

SHORT = {"Trainer, fuse_head": ("LoRA, also on lm_head",), "Trainer, loss_function": ("evaluation",)}
ROWS = [case for case in CASES if case.host != "transformers" or case.option in SHORT[case.trainer]]


@pytest.mark.parametrize("case", ROWS, ids=lambda case: f"{case.host}-{case.trainer}-{case.option}")
def test_a_training_logs_the_hosts_numbers(case: Case) -> None:
    try:
        with patches(case.host):
            pass
    except ImportError as reason:
        pytest.skip(str(reason).partition("\n")[0])
    assert float(line(case, steps=2).split("|")[-2]) < 1e-5
