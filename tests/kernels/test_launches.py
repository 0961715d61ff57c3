"""How many kernels a call of the small losses launches on a GPU, counted on a CPU: Triton's in its
interpreter, and the operations of torch that are neither views nor allocations."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastalign_kernels as kernels
from fastalign_kernels import autograd, checks

pytest.importorskip("triton", reason="triton is not installed")
if torch.cuda.is_available():
    pytest.skip("the interpreter is used where there is no GPU", allow_module_level=True)
from triton.runtime import interpreter  # noqa: E402

FAMILIES = {
    "policy.ops": "policy.losses_triton",
    "policy.advantages": "policy.advantages_triton",
    "preference.ops": "preference.losses_triton",
}
WITHOUT_KERNEL = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::detach")


class Launches(TorchDispatchMode):
    """Names of what a GPU would launch."""

    def __init__(self):
        super().__init__()
        self.names = []
        self.inside_kernel = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        counts = not func.is_view and name not in WITHOUT_KERNEL and not name.startswith("fastalign::")
        if counts and not self.inside_kernel:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch):
    """Counts, with every family on Triton's kernels and no value read, as on a GPU."""
    for family, triton in FAMILIES.items():
        owner, module = (importlib.import_module(f"fastalign_kernels.{name}") for name in (family, triton))
        monkeypatch.setattr(owner.KERNELS, "select", lambda _, module=module: module)
    monkeypatch.setattr(checks, "readable", lambda *_: False)
    monkeypatch.setattr(autograd, "_scale", torch._foreach_mul_)
    for module in (autograd, importlib.import_module("fastalign_kernels.policy.advantages")):
        monkeypatch.setattr(module, "must_see_the_op", lambda _: False)  # the counter must see into the ops
    counter, launch = Launches(), interpreter.GridExecutor.__call__

    def counted(executor, *args, **kwargs):
        counter.names.append(executor.fn.__name__)
        counter.inside_kernel = True
        try:
            return launch(executor, *args, **kwargs)
        finally:
            counter.inside_kernel = False

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    return counter


def vectors(count, shape, trained, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator) - 5 for _ in range(count)]
    return [x.requires_grad_(i < trained) for i, x in enumerate(drawn)]


def policy_call(name, **options):
    x, entropy, old, advantages, reference = vectors(5, (2, 8), 2)
    mask = torch.ones(2, 8, dtype=torch.bool)
    if name == "value_loss":
        return lambda: kernels.value_loss(x, old, advantages, mask, **options)
    if options.pop("full", False):
        options |= {"entropy": entropy, "entropy_coefficient": 0.1}
        options |= {"reference_logp": reference, "kl_coefficient": 0.1}
    return lambda: kernels.ppo_loss(x, old, advantages, mask, **options)


def pair_call(name, trained=2, pairs=6, **options):
    a, b, c, d = vectors(4, (pairs,), trained)
    n = {"chosen_lengths": torch.arange(pairs), "rejected_lengths": torch.arange(pairs)}
    desirable, kl = torch.arange(pairs) > 2, torch.tensor(0.1)
    calls = {
        "dpo_loss": lambda: kernels.dpo_loss(a, b, c, d, **options),
        "simpo_loss": lambda: kernels.simpo_loss(a, b, **n),
        "orpo_loss": lambda: kernels.orpo_loss(a, b, **n),
        "cpo_loss": lambda: kernels.cpo_loss(a, b),
        "kto_loss": lambda: kernels.kto_loss(a, c, desirable, kl),
        "reward_loss": lambda: kernels.reward_loss(a, b),
    }
    return calls[name]


# (forward, backward); autograd fills the upstream gradient with ones, the first of every backward pass.
COUNTS = {
    "ppo_loss": (policy_call("ppo_loss"), 2, 2),
    "ppo_loss, all terms": (policy_call("ppo_loss", full=True), 2, 2),
    "ppo_loss, a number as normalizer": (policy_call("ppo_loss", normalizer=7.0), 2, 2),
    "ppo_loss, a tensor as normalizer": (policy_call("ppo_loss", normalizer=torch.tensor(7)), 2, 2),
    "ppo_loss, sequence_mean": (policy_call("ppo_loss", aggregation="sequence_mean"), 3, 2),
    "value_loss": (policy_call("value_loss"), 2, 2),
    "dpo_loss": (pair_call("dpo_loss"), 1, 3),
    "dpo_loss, sum": (pair_call("dpo_loss", reduction="sum"), 1, 2),
    "simpo_loss": (pair_call("simpo_loss"), 1, 3),
    "orpo_loss": (pair_call("orpo_loss"), 1, 3),
    "cpo_loss": (pair_call("cpo_loss"), 1, 3),
    "kto_loss": (pair_call("kto_loss", trained=1), 1, 3),
    "reward_loss": (pair_call("reward_loss"), 1, 3),
    "reward_loss of 4096 pairs": (pair_call("reward_loss", pairs=4096), 1, 3),
    "dpo_loss of 4096 pairs": (pair_call("dpo_loss", pairs=4096), 1, 3),
}


@pytest.mark.parametrize("case", COUNTS)
def test_a_small_loss_launches_few_kernels(launches, case):
    call, forward, backward = COUNTS[case]
    with launches:
        loss = call().loss
        assert len(launches.names) == forward, launches.names
        launches.names.clear()
        loss.backward()
    assert len(launches.names) == backward, launches.names
    assert launches.names[0] == "aten::ones_like"


@pytest.mark.parametrize("name, count", [("gae", 1), ("masked_whiten", 3)])
def test_advantages_launch_few_kernels(launches, name, count):
    x, values = vectors(2, (2, 8), 0)
    mask = torch.ones(2, 8, dtype=torch.bool)
    with launches:
        kernels.gae(x, values, mask) if name == "gae" else kernels.masked_whiten(x, mask)
    assert len(launches.names) == count, launches.names
