"""Host microseconds of a call of the small losses, beside the same loss in plain PyTorch.

At 10 to 1000 sequences, or a few thousand tokens, these losses are launches and Python, not arithmetic. A
call is issued without waiting for the device. The plain loss of ppo_loss is that of TRL's PPO trainer with
its metrics, those of gae and masked_whiten are TRL's functions, and the rest are our specifications.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import fastalign_kernels as kernels
from fastalign.measure import machine
from fastalign_kernels.policy.reference import value_loss_ref
from fastalign_kernels.preference import reference

from ..core.operation import EAGER, OURS, Shape
from ..methods.policy import POLICY

CALLS = 50  # of a method in a round


class Loss(NamedTuple):
    """A loss and its plain form. Both return an object with the attribute loss, or a tensor."""

    ours: Callable[[], object]
    plain: Callable[[], object]
    trained: Iterable[Tensor] = ()


def small_losses(rows: int, length: int, device: str) -> dict[str, Loss]:
    """The losses at tokens [rows, length], or at `rows` sequences, in fp32."""
    generator = torch.Generator(device).manual_seed(0)
    a, b, c, d = (torch.randn(rows, generator=generator, device=device) - 20 for _ in range(4))
    lengths = torch.full((rows,), length, device=device)
    of_pairs = {"chosen_lengths": lengths, "rejected_lengths": lengths}
    tokens = POLICY["ppo"].inputs(Shape(rows, 0, length), torch.float32, device)
    trained = [x.requires_grad_() for x in (a, b, tokens["logp"], tokens["entropy"])]
    value = (tokens["logp"], tokens["old_logp"], tokens["advantages"], tokens["mask"])
    labels, kl = torch.arange(rows, device=device) % 2 == 0, torch.tensor(0.1, device=device)

    def pair(name: str, *given: Tensor, **options: Tensor) -> Loss:
        functions = getattr(kernels, name), getattr(reference, f"{name}_ref")
        ours, plain = (partial(function, *given, **options) for function in functions)
        return Loss(ours, plain, trained)

    def of_operation(name: str) -> Loss:
        operation, gradients = POLICY[name], trained if name == "ppo" else ()
        given = operation.inputs(Shape(rows, 0, length), torch.float32, device) | (
            tokens if name == "ppo" else {}
        )
        ours, plain = (operation.methods[method](device) for method in (OURS, EAGER))
        return Loss(partial(ours, **given), partial(plain, **given), gradients)

    return {
        "ppo_loss": of_operation("ppo"),
        "value_loss": Loss(partial(kernels.value_loss, *value), partial(value_loss_ref, *value), trained),
        "dpo_loss": pair("dpo_loss", a, b, c, d),
        "simpo_loss": pair("simpo_loss", a, b, **of_pairs),
        "orpo_loss": pair("orpo_loss", a, b, **of_pairs),
        "cpo_loss": pair("cpo_loss", a, b),
        "kto_loss": pair("kto_loss", a, c, labels, kl),
        "reward_loss": pair("reward_loss", a, b),
        "gae": of_operation("gae"),
        "masked_whiten": of_operation("whiten"),
    }


def step(call: Callable[[], object], trained: Iterable[Tensor]) -> None:
    """A call, and its backward pass if something is trained."""
    out = call()
    if trained:
        loss = out["loss"] if isinstance(out, dict) else out.loss  # type: ignore[attr-defined]
        loss.backward()
        for tensor in trained:
            tensor.grad = None


def _without_gradients(call: Callable[[], object]) -> object:
    with torch.no_grad():
        return call()


def _in_one_thread(call: Callable[[], object]) -> object:
    with torch.autograd.set_multithreading_enabled(False):
        return call()


def microseconds(call: Callable[[], object], device: str) -> float:
    """Microseconds of the host for a call: the mean of CALLS calls."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    for _ in range(CALLS):
        call()
    taken = time.perf_counter() - begin
    wait()
    return taken / CALLS * 1e6


class Times(NamedTuple):
    """Microseconds of a call of a loss: the least of the interleaved rounds."""

    loss: str
    ours: float
    in_one_thread: float  # on a GPU autograd has a thread of its own for the backward pass
    without_gradients: float
    plain: float


def measure(rows: int, length: int, device: str, rounds: int) -> list[Times]:
    """The times of all losses."""
    table = []
    for name, (ours, plain, trained) in small_losses(rows, length, device).items():
        calls: tuple[Callable[[], object], ...] = (
            partial(step, ours, trained),
            partial(_in_one_thread, partial(step, ours, trained)),
            partial(_without_gradients, ours),
            partial(step, plain, trained),
        )
        for call in calls:
            call()  # compiles
        times = [[microseconds(call, device) for call in calls] for _ in range(rounds)]
        table.append(Times(name, *[min(column) for column in zip(*times)]))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.experiments.small_losses", description=__doc__)
    parser.add_argument("--rows", type=int, default=4, help="sequences or pairs (default: 4)")
    parser.add_argument("--length", type=int, default=8, help="tokens of each (default: 8)")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default: 7)")
    parser.add_argument(
        "--host-only",
        action="store_true",
        help="time the host's part of the Triton path on a CPU: nothing is launched (bench/gpu/host_only.py)",
    )
    arguments = parser.parse_args()
    if arguments.host_only:
        from ..gpu.host_only import use_host_only

        use_host_only()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    print(", ".join(f"{name}: {value}" for name, value in machine().items()))
    header = ("loss", "fastalign", "in one thread", "without gradients", "PyTorch")
    print("host microseconds, forward and backward\n| " + " | ".join(header) + " |\n|---|---|---|---|---|")
    for name, *figures in measure(arguments.rows, arguments.length, device, arguments.rounds):
        print(f"| {name} | " + " | ".join(f"{figure:.0f}" for figure in figures) + " |", flush=True)


if __name__ == "__main__":
    main()
