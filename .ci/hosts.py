"""Runs tests beside other versions of the packages around fastalign than those of requirements.lock.

`newest`: the newest that the index has, laid over this environment for the run. `oldest`: the floors of
pyproject.toml, in an environment of their own. Further arguments go to pytest; without any, the tests marked
`hosts` run.
"""

import json
import os
import subprocess
import sys
import tempfile
import tomllib
import venv
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST = ROOT / ".venv-oldest"
# If they conflict, pip takes older versions of the last ones first.
PACKAGES = ("transformers", "datasets", "peft", "tokenizers")
MARKED = ["-m", "hosts"]


def newest(arguments: list[str]) -> int:
    """Exit status of pytest; 0 without a run where the index has nothing newer."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    report = subprocess.run(
        [*pip, "--dry-run", "--report", "-", "--upgrade", *PACKAGES], check=True, stdout=subprocess.PIPE
    ).stdout
    changed = {
        item["metadata"]["name"]: item["metadata"]["version"] for item in json.loads(report)["install"]
    }
    for package in dict.fromkeys((*PACKAGES, *changed)):
        locked = installed(package)
        print(f"{package}: {changed.get(package, locked)}, in this environment {locked}", flush=True)
    if not changed:
        print("The newest versions are the locked ones, which `make test` uses: nothing more to run.")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        # Without dependencies: pip's report names those that the environment lacks.
        subprocess.run(
            [
                *pip,
                "--no-deps",
                "--target",
                folder,
                *(f"{name}=={number}" for name, number in changed.items()),
            ],
            check=True,
        )
        return pytest(sys.executable, arguments, [folder])


def installed(package: str) -> str:
    """The version of a package in this environment, or "none"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def oldest(arguments: list[str]) -> int:
    """Exit status of pytest. The environment stays for the next run; it holds no fastalign, which runs from
    the tree."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["train"], *extras["demo"]]  # some test files import the demo
    floors = [line.replace(">=", "==") for line in needed if not line.startswith("fastalign")]
    python = str(OLDEST / "bin" / "python")
    if not OLDEST.exists():
        venv.create(OLDEST, with_pip=True)
    tools = ["pytest>=9", "pytest-benchmark", "pytest-timeout", "setuptools", "wheel"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *floors, *tools], check=True)
    print(
        subprocess.run([python, "-m", "pip", "freeze"], check=True, stdout=subprocess.PIPE, text=True).stdout,
        flush=True,
    )
    return pytest(python, arguments, [str(ROOT), str(ROOT / "kernels")])


def pytest(python: str, arguments: list[str], first: list[str]) -> int:
    """Exit status of pytest, which imports from the folders `first` before others."""
    path = os.pathsep.join([*first, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [python, "-m", "pytest", *(arguments or MARKED)], cwd=ROOT, env=os.environ | {"PYTHONPATH": path}
    ).returncode


if __name__ == "__main__":
    sys.exit({"newest": newest, "oldest": oldest}[sys.argv[1]](sys.argv[2:]))
