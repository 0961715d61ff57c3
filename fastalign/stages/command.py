"""The command line of a stage: read its configuration from files and arguments, then run it."""

import importlib
from collections.abc import Sequence

from ..faults import told
from .config import parse
from .hub_names import check_names
from .stage_configs import CONFIGS


def run_stage(name: str, argv: Sequence[str] | None = None) -> None:
    """Run `fastalign NAME --config FILE key=value …`.

    `fastalign.faults` says how it ends if it fails.
    """
    prog = f"fastalign {name}"
    config = parse(CONFIGS[name], argv, prog=prog)
    with told(prog):
        check_names(config)
        importlib.import_module(
            "torch"
        )  # where it is missing, that is told; transformers would print a line of its own
        # After the arguments were read: torch and transformers take seconds to import, and --help does
        # without.
        importlib.import_module(f"{__package__}.{name}").run(config)
