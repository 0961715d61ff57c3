"""The kernels in the layout of the Hugging Face Hub: a copy that loads beside the installed package."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fastalign
from fastalign_kernels.namespace import NAMESPACE

ROOT = Path(__file__).parents[2]


def module_from(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


hub: Any = module_from("fastalign_ci_hub", ROOT / ".ci" / "hub.py")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    hub.build(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(built: Path) -> Any:
    """The copy, loaded as `kernels` loads it: by its id, from the variant's __init__.py."""
    variant = built / "build" / "torch-cpu"
    return module_from(metadata(variant)["id"], variant / "__init__.py")


def metadata(variant: Path) -> dict[str, Any]:
    return json.loads((variant / "metadata.json").read_text())


def test_each_variant_has_the_package_and_an_id_of_its_own(built: Path) -> None:
    variants = sorted((built / "build").iterdir())
    assert [variant.name for variant in variants] == ["torch-cpu", "torch-cuda"]
    described = [metadata(variant) for variant in variants]
    assert [one["backend"]["type"] for one in described] == ["cpu", "cuda"]
    assert len({one["id"] for one in described}) == 2
    package = {file.relative_to(hub.PACKAGE).as_posix() for file in hub.PACKAGE.rglob("*.py")}
    assert all(set(one["digest"]["files"]) == package for one in described)


def test_another_build_of_the_same_files_has_the_same_id(built: Path, tmp_path: Path) -> None:
    again = hub.build(tmp_path)
    assert [metadata(path) for path in again] == [
        metadata(built / "build" / name) for name in ("torch-cpu", "torch-cuda")
    ]
    with pytest.raises(SystemExit, match="^folder: got .* expected a new folder"):
        hub.build(tmp_path)


def test_changed_files_have_another_id() -> None:
    one = hub.digest_of({"a.py": b"1"}, "torch-cpu", native=False)
    assert one == hub.digest_of({"a.py": b"1"}, "torch-cpu", native=False)
    assert one != hub.digest_of({"a.py": b"2"}, "torch-cpu", native=False)
    assert one != hub.digest_of({"a.py": b"1"}, "torch-cuda", native=False)


def ops_of(namespace: str) -> set[str]:
    schemas = torch._C._jit_get_all_schemas()
    return {one.name.partition("::")[2] for one in schemas if one.name.startswith(f"{namespace}::")}


def test_its_ops_are_in_a_namespace_of_their_own(loaded: Any) -> None:
    namespace = sys.modules[f"{loaded.__name__}.namespace"].NAMESPACE
    assert namespace == loaded.__name__.removeprefix("_") != NAMESPACE
    assert "head_loss" in ops_of(namespace) <= ops_of(NAMESPACE)


def test_a_loss_is_the_installed_ones_also_compiled(loaded: Any) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 8, requires_grad=True), torch.randn(53, 8, requires_grad=True)
    ids = torch.randint(53, (7,))

    def run(function: Any) -> tuple[torch.Tensor, ...]:
        loss = function(hidden, weight, ids)
        return loss, *torch.autograd.grad(loss, (hidden, weight))

    expected = run(fastalign.linear_cross_entropy)
    torch.testing.assert_close(run(loaded.linear_cross_entropy), expected)
    compiled = torch.compile(loaded.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), expected)


def test_kernels_loads_it(built: Path) -> None:
    kernels = pytest.importorskip("kernels.load", reason="Hugging Face's kernels is not installed")
    copy = kernels.get_local_kernel(built)
    assert copy.__name__ == metadata(built / "build" / "torch-cpu")["id"]
    logits, ids = torch.randn(5, 53), torch.randint(53, (5,))
    torch.testing.assert_close(copy.cross_entropy(logits, ids), fastalign.cross_entropy(logits, ids))


def test_no_other_file_names_the_namespace() -> None:
    for file in hub.PACKAGE.rglob("*.py"):
        if file.name != "namespace.py":
            source = file.read_text()
            assert "torch.ops.fastalign" not in source and '"fastalign::' not in source, file
    for file in (ROOT / "csrc").rglob("*.c*"):
        assert "TORCH_LIBRARY_IMPL(fastalign" not in file.read_text(), file
