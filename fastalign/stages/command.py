"""The command line of a stage: read its configuration from files and arguments, then run it."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from ..faults import reporting
from .config import parse
from .models.hub_names import check_names
from .stage_configs import CONFIGS


def run_stage(name: str, run: Callable[[Any], object], argv: Sequence[str] | None = None) -> None:
    """Run `fastalign NAME --config FILE key=value …`: `run` gets the configuration.

    `fastalign.faults` says how it ends if it fails.
    """
    prog = f"fastalign {name}"
    config = parse(CONFIGS[name], argv, prog=prog)
    with reporting(prog):
        check_names(config)
        # If torch is missing, this says so. transformers would print another line.
        importlib.import_module("torch")
        run(config)
