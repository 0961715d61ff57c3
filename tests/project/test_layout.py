"""Guards of the layout: `kernels/` stays no package, imports flow one way, the wheel holds what it should."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import fastalign

ROOT = Path(__file__).parents[2]


def test_kernels_is_not_a_package():
    """transformers probes for Hugging Face's package `kernels`; a kernels/__init__.py would shadow it for who
    runs from the root."""
    assert not list((ROOT / "kernels").glob("*.py"))


def git(*arguments: str) -> list[str]:
    """The lines that git prints about this checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    command = ["git", "-c", "core.quotePath=false", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def test_no_tracked_file_is_ignored():
    """git would leave a new file beside it out of a commit, and ruff skips it."""
    assert git("ls-files", "--cached", "--ignored", "--exclude-standard") == []


def test_git_tracks_the_init_of_each_package_of_the_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    tracked = {*git("ls-files")}
    folders = [
        settings["package-dir"].get(name.split(".")[0], name.split(".")[0]) for name in settings["packages"]
    ]
    for folder, name in zip(folders, settings["packages"]):
        path = "/".join([folder, *name.split(".")[1:], "__init__.py"])
        assert path in tracked, path


def imported(path: Path) -> set[str]:
    """Top-level modules imported anywhere in a file; relative imports count as the package itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_imports_flow_one_way():
    """tests, bench -> fastalign -> fastalign_kernels -> torch, triton."""
    for path in (ROOT / "kernels" / "fastalign_kernels").rglob("*.py"):
        assert imported(path) - set(sys.stdlib_module_names) <= {"torch", "triton"}, path
    for path in (ROOT / "fastalign").rglob("*.py"):
        assert not imported(path) & {"tests", "bench"}, path


def imports_within(package: str) -> dict[str, set[str]]:
    """The modules of a package, each with those that it imports relatively, when it is loaded or later."""
    paths = {}
    for path in (ROOT / package).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found: dict[str, set[str]] = {module: set() for module in paths}
    for module, path in paths.items():
        above = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                source = ".".join(above[: len(above) - node.level + 1] + [node.module or ""]).rstrip(".")
                names = {f"{source}.{alias.name}" for alias in node.names}
                found[module] |= {name if name in paths else source for name in names} - {module}
    return found


def test_settings_and_results_of_the_demo_import_no_other_file_of_it():
    imports = imports_within("fastalign")
    for module in ("settings", "results"):
        assert not [name for name in imports[f"fastalign.demo.{module}"] if name.startswith("fastalign.demo")]


def test_importing_fastalign_imports_neither_transformers_nor_triton_kernels():
    code = (
        "import sys, fastalign; "
        "print([m for m in ('transformers', 'datasets', 'fastalign_kernels.softmax.rows_triton') "
        "if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_public_names_are_the_kernels_own():
    import fastalign_kernels

    for name in fastalign_kernels.__all__:
        assert getattr(fastalign, name) is getattr(fastalign_kernels, name) and name in fastalign.__all__


def in_a_fresh_interpreter(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_a_module_without_torch_loads_none():
    assert (
        in_a_fresh_interpreter("import sys; from fastalign import cli; print('torch' in sys.modules)")
        == "False"
    )


def test_importing_fastalign_imports_no_torch_until_a_name_is_used():
    """And no compiler until one is used."""
    used = "fastalign.linear_cross_entropy; print('torch' in sys.modules, 'torch._dynamo' in sys.modules)"
    assert in_a_fresh_interpreter(
        f"import sys, fastalign; print('torch' in sys.modules); {used}"
    ).split() == ["False", "True", "False"]


@pytest.mark.parametrize(
    "module",
    ["nn", "rollout", "causal_lm", "data", "measure", "actor_critic", "classifier", "stages", "integrations"],
)
def test_a_module_needs_no_import_of_its_own(module):
    assert getattr(fastalign, module).__name__ == f"fastalign.{module}"


def test_modules_load_when_they_are_first_used():
    code = (
        "import fastalign; print(fastalign.nn.CrossEntropyLoss.__name__, fastalign.rollout.generate.__name__)"
    )
    assert in_a_fresh_interpreter(code) == "CrossEntropyLoss generate"


def test_a_star_import_gives_the_public_names_and_dir_lists_them():
    names = in_a_fresh_interpreter("from fastalign import *; print(*dir())").split()
    assert {*fastalign.__all__} <= {*names} and {*fastalign.__all__, "nn", "rollout"} <= {*dir(fastalign)}


def test_an_absent_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'fastalign' has no attribute 'cross_entropi'"):
        fastalign.cross_entropi  # noqa: B018


def test_a_compiled_function_may_be_the_first_to_use_a_name():
    code = """
import fastalign, torch
loss = lambda logits, targets: fastalign.cross_entropy(logits, targets)
compiled = torch.compile(loss, fullgraph=True, backend="eager")
print(float(compiled(torch.zeros(2, 4), torch.tensor([0, 1]))) > 0)
"""
    assert in_a_fresh_interpreter(code) == "True"


COMPILER = """#!/bin/sh
while [ $# -gt 1 ]; do
    if [ "$1" = -o ]; then echo compiled >"$2"; fi
    shift
done
"""


def test_the_wheel_holds_both_packages_and_no_top_level_kernels(tmp_path):
    """Built by pip as a user builds it, with a compiler that writes one word.

    Compiling csrc/ takes minutes, and `make setup` has done it.
    """
    pytest.importorskip("wheel", reason="building a wheel needs the package wheel")
    sources = tmp_path / "source"  # a copy: building in place would leave build/ in the checkout
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", f"file://{ROOT}", str(sources)], check=True)
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    without_nvcc = {name: value for name, value in os.environ.items() if name != "CUDA_HOME"}
    environment = without_nvcc | {"PATH": "/usr/bin:/bin", "CXX": str(compiler)}
    options = ["--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path / "out")]
    command = [sys.executable, "-m", "pip", "wheel", *options, "."]
    subprocess.run(command, cwd=sources, check=True, capture_output=True, env=environment)
    (wheel,) = (tmp_path / "out").glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    packages = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert packages == {"fastalign", "fastalign_kernels"}
    tracked = git("ls-tree", "-r", "--name-only", "HEAD", "fastalign", "kernels")
    code = {name.removeprefix("kernels/") for name in tracked if name.endswith((".py", "/py.typed"))}
    assert code <= {*names}
    assert archive.read("fastalign_kernels/_native.so") == b"compiled\n"
    assert wheel.name.split("-")[2:4] == ["py3", "none"], "the native library uses no Python ABI"


def test_no_machine_paths_in_the_project():
    tracked = git("ls-files")
    home, parent = str(Path.home()), str(ROOT.parent)
    for name in tracked:
        text = (ROOT / name).read_text(errors="ignore") if (ROOT / name).is_file() else ""
        assert parent + "/" not in text and home + "/" not in text, name
        if name.startswith("bench/results/"):  # what other machines wrote
            assert not re.search(r"(?<![\w.-])/(opt|work|home|root|tmp|usr|mnt)/", text), name
