"""The benchmark's cases at a tiny shape."""

import importlib
import importlib.util
from collections.abc import Iterator

from bench.cases.case import Case, Target
from bench.core.operation import Shape
from bench.methods import ceilings

TINY = Shape(48, 32, 333)


FILES = (
    "linear_cross_entropy",
    "linear_logprobs",
    "linear_distillation",
    "linear_lora",
    "linear_preference",
    "linear_ppo",
    "token_stats",
    "cross_entropy",
    "ppo_loss",
    "gae",
    "whiten",
    "reward",
    "dpo_loss",
    "steps",
    "tail",
    "screen",
)


INSTALLED = {
    package: importlib.util.find_spec(package) is not None
    for package in ("pytest_benchmark", "liger_kernel", "trl", "transformers")
}


def cases() -> Iterator[tuple[str, Case]]:
    for file in FILES:
        yield from importlib.import_module(f"bench.cases.bench_{file}").CASES.items()


CASES = dict(cases())


def tiny_case(*targets: Target, memory: bool = False) -> Case:
    return Case(
        "cross_entropy", "fp32", ("logits",), {"copy": ceilings.read_read_write}, targets, TINY, memory
    )
