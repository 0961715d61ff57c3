"""Patches verl when it is imported, for VERL_USE_EXTERNAL_MODULES: see `fastalign.integrations.verl`."""

from .verl import patch

patch()
