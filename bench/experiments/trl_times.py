"""Seconds and peak memory of TRL's trainers with TRL's function and with ours, and of both functions alone.

The model is a Llama of one layer with SmolLM2's head (H 576, V 49152), in fp32. Seconds are those of the
training steps, the median of interleaved rounds. The peak is that of loading the model and training it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch

from fastalign.integrations import trl as integration
from fastalign.measure import interleaved, machine, peak_memories

from .trl_matrix import LORA, SCORING
from .trl_runs import Sizes, train

SIZES = Sizes(vocab=49152, hidden=576, layers=1, words=16)
OUTPUTS = ("log_probs", "entropy", "is_top1")  # those of TRL's SFT trainer


def training(trainer: str, patched: bool, lora: bool, steps: int) -> Callable[[], float]:
    """A call that trains and returns the seconds of the steps."""
    arguments = {"lora": LORA} if lora else {}
    return lambda: train(trainer, patched=patched, steps=steps, sizes=SIZES, **arguments).seconds


def head(patched: bool, frozen: bool, tokens: int) -> Callable[[], None]:
    """A call of the function alone, forward and backward."""
    import trl.trainer.utils as utils

    torch.manual_seed(0)
    hidden = torch.randn(tokens, SIZES.hidden, requires_grad=True)
    weight = (0.05 * torch.randn(SIZES.vocab, SIZES.hidden)).requires_grad_(not frozen)
    targets = torch.randint(SIZES.vocab, (tokens,))
    function = utils._ChunkedLogProbFunction
    if patched:
        with integration.patch():
            function = utils._ChunkedLogProbFunction
    chunk = utils._CHUNKED_LOGPROB_CHUNK_SIZE

    def call() -> None:
        hidden.grad = weight.grad = None
        logp = function.apply(hidden, weight, None, targets, 1.0, chunk, None, 1.0, OUTPUTS)[0]
        logp.sum().backward()

    return call


def row(name: str, seconds: dict[bool, float], peaks: list[float]) -> None:
    """Print a line of the table."""
    ours, theirs = seconds[True], seconds[False]
    cells = [name, f"{theirs:.2f}", f"{ours:.2f}", f"{theirs / ours:.2f}", *(f"{mib:.0f}" for mib in peaks)]
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="*", default=(96, 384), help="of the functions alone")
    parser.add_argument("--trainers", nargs="*", default=SCORING)
    arguments = parser.parse_args()
    print(machine())
    print("| what | TRL, s | fastalign, s | TRL / fastalign | TRL's peak, MiB | fastalign's, MiB |")
    print("| --- | --- | --- | --- | --- | --- |")
    here = "bench.experiments.trl_times"
    for tokens in arguments.tokens:
        for frozen in (False, True):
            calls = {f"{patched}": head(patched, frozen, tokens) for patched in (False, True)}
            timings = interleaved(calls, 2 * arguments.rounds)
            given = [{"patched": patched, "frozen": frozen, "tokens": tokens} for patched in (False, True)]
            peaks = peak_memories(f"{here}:head", given, warmup=given[0] | {"tokens": 8})
            name = f"function alone, {tokens} tokens, {'frozen' if frozen else 'trained'} head"
            row(name, {patched: timings[f"{patched}"].median for patched in (False, True)}, peaks)
    for trainer in arguments.trainers:
        for lora in (False, True):
            of_runs = [
                {"trainer": trainer, "patched": patched, "lora": lora, "steps": arguments.steps}
                for patched in (False, True)
            ]
            trainings = [training(trainer, patched, lora, arguments.steps) for patched in (False, True)]
            seconds = [[run() for run in trainings] for _ in range(arguments.rounds)]
            medians = [statistics.median(of_one) for of_one in zip(*seconds)]
            peaks = peak_memories(f"{here}:training", of_runs, warmup=of_runs[0] | {"steps": 1})
            row(f"{trainer}{', LoRA' if lora else ''}", {False: medians[0], True: medians[1]}, peaks)


if __name__ == "__main__":
    main()
