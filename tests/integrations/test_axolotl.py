"""The Axolotl plugin: in the installed Axolotl, or in a base class with the hooks of its published one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest

from fastalign.causal_lm import UnsupportedModelError
from fastalign.integrations import hosts
from tests.models.tiny_models import VOCAB, batch, llama

# What the plugin uses of axolotl/integrations/base.py: release 0.19.0, and commit 002a637.
PUBLISHED = {"post_model_load": ("self", "cfg", "model")}


class BasePlugin:
    def __init__(self) -> None: ...

    def post_model_build(self, cfg: Any, model: Any) -> None: ...

    def post_model_load(self, cfg: Any, model: Any) -> None: ...


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.setattr(hosts, "version", lambda name: "0.19.0")
    if find_spec("axolotl") is None:
        for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["axolotl"].integrations = sys.modules["axolotl.integrations"]  # type: ignore[attr-defined]
        base: Any = sys.modules["axolotl.integrations.base"]
        sys.modules["axolotl.integrations"].base, base.BasePlugin = base, BasePlugin  # type: ignore[attr-defined]
    yield importlib.import_module("fastalign.integrations.axolotl")
    sys.modules.pop("fastalign.integrations.axolotl")


def test_the_plugin_fuses_the_model_that_axolotl_loaded(plugin: Any) -> None:
    model, (inputs, labels) = llama(), batch()
    plugin.FastalignPlugin().post_model_load({}, model)
    assert model(**inputs, labels=labels).logits is None


def test_new_tokens_do_not_lose_the_fused_head(plugin: Any) -> None:
    """Axolotl makes a new lm_head for them between the hooks post_model_build and post_model_load."""
    model, (inputs, labels) = llama(), batch()
    hooks = plugin.FastalignPlugin()
    hooks.post_model_build({}, model)
    model.resize_token_embeddings(VOCAB + 3)
    hooks.post_model_load({}, model)
    assert model(**inputs, labels=labels).logits is None


def test_ranks_without_weights_fuse_without_verifying(plugin: Any) -> None:
    model = llama().to("meta")
    plugin.FastalignPlugin().post_model_load({}, model)
    assert model.forward.__func__.__name__.startswith("_fastalign")


def test_the_hook_is_the_published_one(plugin: Any) -> None:
    assert PUBLISHED == {"post_model_load": plugin.PARAMETERS}


def test_another_hook_is_refused(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = sys.modules["axolotl.integrations.base"].BasePlugin
    monkeypatch.setattr(base, "post_model_load", lambda self, model: None)
    with pytest.raises(
        hosts.UnsupportedHostError, match="^axolotl: got axolotl.integrations.base.BasePlugin"
    ):
        plugin.FastalignPlugin()


def test_another_version_is_refused(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "version", lambda name: "0.20.0")
    with pytest.raises(hosts.UnsupportedHostError, match=r"^axolotl: got version 0\.20\.0, expected 0\.19"):
        plugin.FastalignPlugin()


def test_a_model_that_cannot_be_served_is_refused(plugin: Any) -> None:
    model = llama()
    model.forward = model.forward
    with pytest.raises(UnsupportedModelError):
        plugin.FastalignPlugin().post_model_load({}, model)


def test_axolotl_finds_the_plugin_by_its_name() -> None:
    base = pytest.importorskip("axolotl.integrations.base", reason="axolotl is not installed")
    manager = base.PluginManager.get_instance()
    manager.register("fastalign.integrations.axolotl.FastalignPlugin")
    model, (inputs, labels) = llama(), batch()
    manager.post_model_load(base.DictDefault({"plugins": [*manager.plugins]}), model)
    assert model(**inputs, labels=labels).logits is None
