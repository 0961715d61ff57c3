"""An Axolotl plugin that fuses the head of the model that Axolotl loaded.

    plugins:
      - fastalign.integrations.axolotl.FastalignPlugin

Axolotl loads it by this name. It only logs an error if the plugin cannot be imported, and trains without.
"""

from typing import Any

import axolotl.integrations.base
from axolotl.integrations.base import BasePlugin

from fastalign.causal_lm import fuse_head

from . import hosts

HOST = "axolotl"
TESTED = ("0.19",)
PARAMETERS = ("self", "cfg", "model")


class FastalignPlugin(BasePlugin):
    """Fuses the head of every model that Axolotl loads, after adapters and new tokens.

    Raises:
        UnsupportedHostError: a version of Axolotl that fastalign was not tested with, or another hook.
    """

    def __init__(self) -> None:
        hosts.check_version(HOST, TESTED)
        hosts.check_parameters(HOST, "BasePlugin.post_model_load", axolotl.integrations.base, PARAMETERS)
        super().__init__()

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """Fuse the head, as `fuse_head`, which refuses a model that it cannot serve exactly.

        Ranks other than 0 may hold no weights yet (`cpu_ram_efficient_loading`). Rank 0 verifies for them.
        """
        has_weights = not any(parameter.is_meta for parameter in model.parameters())
        fuse_head(model, verify=has_weights)
