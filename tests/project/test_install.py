"""Building the package: what it needs is said, and nothing is left out without being asked for."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of the checkout's tracked files: building in place would leave build/ in it."""
    copy = tmp_path / "sources"
    parts = [
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "MANIFEST.in",
        "fastalign",
        "kernels",
        "csrc",
    ]
    listed = subprocess.run(
        ["git", "ls-files", "-z", *parts], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.split("\0")[:-1]:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    return copy


def setup_py(
    sources: Path, *arguments: str, isolated: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run setup.py; `isolated` as in pip's build isolation: setuptools is there, torch is not."""
    command = [sys.executable, *(["-S"] if isolated else []), "setup.py", *arguments]
    if isolated:
        found = importlib.util.find_spec("setuptools")
        assert found is not None and found.origin is not None
        site, folder = Path(found.origin).parents[1], sources.parent / "isolated"
        folder.mkdir()
        for part in (site / "_distutils_hack", *site.glob("setuptools*")):
            (folder / part.name).symlink_to(part)
        environment["PYTHONPATH"] = str(folder)
    return subprocess.run(
        command, cwd=sources, env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_without_torch_the_build_fails_and_names_the_way_out(sources: Path) -> None:
    """pip hides what a build prints unless it fails, so a build that only warned left no native library and
    nobody knew why."""
    run = setup_py(sources, "build_ext", isolated=True)
    assert run.returncode != 0
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert (
        "torch is not importable" in line and "--no-build-isolation" in line and "FASTALIGN_NATIVE=0" in line
    )
    assert "Traceback" not in run.stderr


def test_without_a_compiler_the_build_fails_and_names_the_way_out(sources: Path) -> None:
    run = setup_py(sources, "build_ext", CXX="", PATH="/nowhere")
    assert run.returncode != 0
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert "no C++ compiler" in line and "FASTALIGN_NATIVE=0" in line


def test_an_installation_without_the_library_is_asked_for(sources: Path) -> None:
    pytest.importorskip("wheel", reason="building a wheel needs the package wheel")
    run = setup_py(sources, "--quiet", "bdist_wheel", FASTALIGN_NATIVE="0")
    assert run.returncode == 0, run.stderr
    (wheel,) = (sources / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "fastalign_kernels/native.py" in names and not any(name.endswith(".so") for name in names)
    refused = setup_py(sources, "--version", FASTALIGN_NATIVE="no")
    assert refused.returncode != 0 and "FASTALIGN_NATIVE: got 'no', expected 1" in refused.stderr


def test_the_metadata_names_where_the_project_lives(sources: Path) -> None:
    run = setup_py(
        sources, "--quiet", "egg_info", isolated=True
    )  # metadata needs no torch: pip asks for it before it builds
    assert run.returncode == 0, run.stderr
    (metadata,) = sources.glob("*.egg-info/PKG-INFO")
    labels = {
        line.split()[1] for line in metadata.read_text().splitlines() if line.startswith("Project-URL:")
    }
    assert {"Repository,", "Changelog,", "Issues,"} <= labels
