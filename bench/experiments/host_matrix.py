"""The support matrix of the hosts beside TRL: a row trains with the host's functions and with fastalign's.

    python -m bench.experiments.host_matrix --only verl

The model is a random Llama of 2 layers in fp32. A host that is not installed is named and left out. "calls"
is how often the host called fastalign; transformers' Trainer has no patch that counts. The last column is the
largest difference of a number that the two trainings logged, over its value or over 0.1 if it is smaller.
trl_matrix is the same for TRL.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from . import host_runs, host_steps
from .host_runs import ATTENTION, Logs, run


class Case(NamedTuple):
    """A row: the host's module in fastalign.integrations, and how to train."""

    host: str
    trainer: str
    option: str
    train: Callable[..., Logs]
    options: dict[str, Any]


EVALUATION = {"eval_strategy": "steps", "eval_steps": 5}
TRAINER_OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "LoRA": {"lora": ATTENTION},
    "gradient accumulation": {"gradient_accumulation_steps": 2},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "evaluation": EVALUATION,
    "bf16 autocast": {"bf16": True},
}
OPENRLHF_OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "LoRA": {"lora": ATTENTION},
    "temperature=0.7": {"temperature": 0.7},
}
ENGINE_OPTIONS: dict[str, dict[str, Any]] = {
    "backend torch": {},
    "backend triton": {"backend": "triton"},
    "backend torch, padded": {"padded": True},
    "LoRA": {"lora": ATTENTION},
    "rollout weights": {"weighted": True},
    **{f"rollout weights, {mode}": {"weighted": True, "mode": mode} for mode in ("seq-mean-token-sum-norm",)},
    **{f"loss {loss}": {"loss": loss} for loss in ("gspo", "cispo", "geo_mean", "bypass_mode")},
}
STEP_OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "packing": {"packed": True},
    "LoRA, also on lm_head": {"lora": (*ATTENTION, "lm_head")},
    "dual_clip=3": {"dual_clip": 3.0},
    "sequence level": {"token_level_loss": False},
    "gspo": {"policy_loss_type": "gspo"},
    "is_correction_level='token'": {"is_correction_level": "token"},
}
AXOLOTL_OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "LoRA": {"lora": ATTENTION},
    "new tokens": {"new_tokens": 4},
    "new tokens, LoRA, lm_head in modules_to_save": {"new_tokens": 4, "lora": ATTENTION},
}
MODES = ("token-sum", "seq-mean-token-sum", "seq-mean-token-mean")
CASES = (
    *[
        Case("transformers", f"Trainer, {how}", name, host_runs.transformers_trainer, {"how": how, **options})
        for how in ("fuse_head", "loss_function")
        for name, options in TRAINER_OPTIONS.items()
    ],
    Case("verl", "policy loss on torch", "defaults", host_runs.verl, {}),
    Case("verl", "policy loss on triton", "defaults", host_runs.verl, {"backend": "triton"}),
    Case("verl", "policy loss on torch", "LoRA", host_runs.verl, {"lora": ATTENTION}),
    *[Case("verl", "policy loss on torch", mode, host_runs.verl, {"mode": mode}) for mode in MODES],
    *[
        Case("openrlhf", trainer, name, host_runs.openrlhf, {"trainer": trainer, **options})
        for trainer in ("SFT", "DPO", "PPO")
        for name, options in OPENRLHF_OPTIONS.items()
    ],
    Case("llamafactory", "v1 SFT", "defaults", host_runs.llamafactory, {}),
    Case("llamafactory", "v1 SFT", "LoRA", host_runs.llamafactory, {"lora": ATTENTION}),
    *[
        Case(host, trainer, "LoRA, also on lm_head", train, {**options, "lora": (*ATTENTION, "lm_head")})
        for host, trainer, train, options in (
            ("transformers", "Trainer, fuse_head", host_runs.transformers_trainer, {"how": "fuse_head"}),
            ("openrlhf", "SFT", host_runs.openrlhf, {"trainer": "SFT"}),
            ("llamafactory", "v1 SFT", host_runs.llamafactory, {}),
        )
    ],
    Case("llamafactory", "v1 SFT", "gradient accumulation", host_runs.llamafactory, {"accumulation": 2}),
    *[Case("verl", "FSDP engine", name, host_steps.verl_engine, how) for name, how in ENGINE_OPTIONS.items()],
    *[
        Case("openrlhf", "PPO training_step", name, host_steps.openrlhf_step, options)
        for name, options in STEP_OPTIONS.items()
    ],
    *[
        Case("axolotl", "ModelLoader, trainer", name, host_runs.axolotl, options)
        for name, options in AXOLOTL_OPTIONS.items()
    ],
)


@contextmanager
def patches(host: str) -> Any:
    """Apply all patches of a host; yields its head's handle, or True for a host without one."""
    if host == "transformers":
        yield True
        return
    if host == "axolotl":
        os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
        importlib.import_module("axolotl.loaders.model")
        importlib.import_module("fastalign.integrations.axolotl")
        yield True
        return
    integration = importlib.import_module(f"fastalign.integrations.{host}")
    with ExitStack() as undo:
        undo.callback(integration.unpatch)
        with host_steps.stubs():
            handle = integration.patch()
        if host == "verl":
            integration.patch_policy_loss()
        yield handle


def largest_difference(ours: Logs, theirs: Logs) -> float:
    assert len(ours) == len(theirs) > 0
    return max(
        abs(value - other[name]) / max(abs(other[name]), 0.1)
        for mine, other in zip(ours, theirs, strict=True)
        for name, value in mine.items()
    )


def line(case: Case, steps: int) -> str:
    """A row of the table."""
    theirs, _ = run(case.train, steps, None, **case.options)
    ours, handle = run(case.train, steps, lambda: patches(case.host), **case.options)
    calls = getattr(handle, "calls", "")
    if calls == 0:
        raise RuntimeError(f"{case.host}, {case.trainer}, {case.option}: got 0 calls, expected some")
    cells = [case.host, case.trainer, case.option, str(calls), f"{largest_difference(ours, theirs):.0e}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the matrix as a table of Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--only", default="", help="hosts whose name contains this")
    arguments = parser.parse_args()
    print("| host | trainer | option | calls | largest difference |\n| --- | --- | --- | --- | --- |")
    missing: dict[str, str] = {}
    for case in CASES:
        if arguments.only not in case.host or case.host in missing:
            continue
        try:
            with patches(case.host):
                pass
        except ImportError as reason:
            missing[case.host] = str(reason).partition("\n")[0]
            continue
        print(line(case, arguments.steps), flush=True)
    for host, why in missing.items():
        print(f"\n{host}: not run here: {why}")


if __name__ == "__main__":
    main()
