"""An Axolotl plugin that fuses the head of the model, before adapters are put on it.

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
    """Fuses the head of every model that Axolotl builds.

    Raises:
        UnsupportedHostError: a version of Axolotl that fastalign was not tested with, or another hook.
    """

    def __init__(self) -> None:
        hosts.check_version(HOST, TESTED)
        hosts.check_parameters(HOST, "BasePlugin.post_model_build", axolotl.integrations.base, PARAMETERS)
        super().__init__()

    def post_model_build(self, cfg: Any, model: Any) -> None:
        """Fuse the head, as `fuse_head`, which refuses a model that it cannot serve exactly."""
        fuse_head(model)
