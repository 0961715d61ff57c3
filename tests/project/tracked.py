"""The files that git tracks."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def tracked(*patterns: str) -> list[str]:
    """The sorted paths, relative to ROOT, of the tracked files that match git's patterns."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout", allow_module_level=True)
    command = ["git", "ls-files", *patterns]
    return sorted(
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    )
