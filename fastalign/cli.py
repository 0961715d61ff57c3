"""The command `fastalign`: the training stages, the demo, and `env`, which says what runs natively here."""

import argparse
import importlib
import os
import platform
from collections.abc import Sequence

from ._version import __version__
from .faults import Parser, reporting

COMMANDS = {
    "tokenizer": ("fastalign.stages.tokenizer", "train a byte-level BPE tokenizer on plain text"),
    "pretrain": ("fastalign.stages.pretrain", "train a causal LM on plain text"),
    "sft": ("fastalign.stages.sft", "fine-tune a causal LM on conversations or prompts with completions"),
    "reward": ("fastalign.stages.reward", "train a reward model on pairs of completions"),
    "dpo": ("fastalign.stages.dpo", "align a causal LM with pairs of completions, by DPO and its kin"),
    "kto": ("fastalign.stages.kto", "align a causal LM with completions judged good or bad, by KTO"),
    "ppo": ("fastalign.stages.ppo", "align a causal LM with scores of its own completions, by PPO"),
    "grpo": ("fastalign.stages.grpo", "align a causal LM with scores of groups of its completions, by GRPO"),
    "merge": ("fastalign.stages.merge", "write a model with its LoRA adapters merged in"),
    "demo": (
        "fastalign.demo.command",
        "pre-training, SFT, reward model, DPO, KTO, PPO and GRPO on real text at toy scale, with a report",
    ),
    "env": ("fastalign.cli", "versions, devices, what is native, what falls back and why"),
}
PACKAGES = ("fastalign", "torch", "triton", "transformers", "datasets", "peft", "flash-attn", "liger-kernel")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. `fastalign COMMAND --help` lists its arguments.

    Without a command, lists the commands and ends with status 0.
    """
    commands = "\n".join(f"  {name:<10} {help_line}" for name, (_, help_line) in COMMANDS.items())
    parser = Parser(
        prog="fastalign",
        description="Every stage of LLM training that turns logits into a loss, cheap in memory and time.",
        epilog=f"commands:\n{commands}\n\nfastalign COMMAND --help shows a command's own arguments.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastalign {__version__}")
    parser.add_argument("command", nargs="?", metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
    given = parser.parse_args(argv)
    if given.command is None:
        parser.print_help()
        return
    if given.command not in COMMANDS:
        parser.error(_unknown(given.command))
    module, help_line = COMMANDS[given.command]
    if given.command == "env":
        Parser(prog="fastalign env", description=help_line).parse_args(given.arguments)
    with reporting(f"fastalign {given.command}"):
        if given.command == "env":
            print(environment())
        elif module.startswith("fastalign.stages."):
            from .stages.command import run_stage

            # The stage is imported after its arguments were read: torch and transformers take seconds to
            # import, and --help does without.
            run_stage(
                given.command, lambda config: importlib.import_module(module).run(config), given.arguments
            )
        else:
            importlib.import_module(module).main(given.arguments)


def _unknown(command: str) -> str:
    import difflib

    close = difflib.get_close_matches(command, COMMANDS, n=3)
    known = " or ".join(close) if close else f"one of {', '.join(COMMANDS)}"
    return f"command: got {command!r}, expected {known}"


def environment() -> str:
    """Versions, device, threads, and a line for each part of fastalign: native or fallback, and why."""
    import torch

    from fastalign_kernels import native

    from .versions import newer_than_tested

    versions = [(package, _version(package)) for package in PACKAGES]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = [
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("threads", f"{torch.get_num_threads()} of {cores} cores"),
        ("cuda", torch.version.cuda or "this torch is built without it"),
    ]
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        name = f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory >> 20} MiB"
        machine.append((f"cuda:{number}", name))
    if torch.version.cuda and not torch.cuda.is_available():
        machine.append(("device", "no CUDA device is visible: everything runs on the CPU"))
    parts = [(name, f"{state} ({reason})" if reason else state) for name, state, reason in native.status()]
    rows = [*versions, *machine, *parts, *(("note", line) for line in newer_than_tested())]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
