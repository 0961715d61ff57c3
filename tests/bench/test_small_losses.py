"""The host times of the small losses: every loss has both rows, and they are the same loss."""

import torch

from bench.experiments.small_losses import measure, small_losses


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
