"""Put the faults of faults.py into the code, one at a time; for each, the tests that must fail.

    make mutations                      all of them, in 15 minutes or more on two cores
    python .ci/mutations.py 3 17        these two
    python .ci/mutations.py --check     whether each line is still there, in a second

A fault is put into a copy of the tree in a temporary folder, and its tests run there. The exit status is 1 if
a fault is missed. It is 2, and nothing runs, if a line does not occur exactly once in its file. csrc/ is left
out: each fault there would need a build. Run `make test` first: a test that fails anyway catches everything.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from faults import KERNELS, MUTATIONS, Mutation

ROOT = Path(__file__).parents[1]


def copy_tree(folder: Path) -> None:
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in [*filter(None, names), KERNELS + "_native.so"]:
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def run_tests(folder: Path, tests: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), str(folder / "kernels")])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "--no-header",
        "-p",
        "no:cacheprovider",
        *tests.split(),
    ]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def find_stale(number: int, mutation: Mutation) -> list[str]:
    """Why a mutation no longer fits the tree: its file, its line or its tests are gone."""
    at, path = f"mutation {number}, {mutation.file}", ROOT / mutation.file
    if not path.exists():
        return [f"{at}: no such file"]
    found = path.read_text(encoding="utf-8").count(mutation.before)
    stale = [] if found == 1 else [f"{at}: got {found} times, expected once: {mutation.before}"]
    tests = [word for word in mutation.tests.split() if word.startswith("tests/")]
    return stale + [f"{at}: no test {test}" for test in tests if not (ROOT / test).exists()]


def try_mutation(folder: Path, mutation: Mutation) -> str:
    """caught, or why not."""
    path = folder / mutation.file
    source = path.read_text(encoding="utf-8")
    path.write_text(source.replace(mutation.before, mutation.after), encoding="utf-8")
    try:
        run = run_tests(folder, mutation.tests)
    finally:
        path.write_text(source, encoding="utf-8")
    if run.returncode == 1:  # tests ran and failed
        failed = next((line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
        return f"caught by {failed.split(' - ')[0].removeprefix('FAILED ')}"
    if run.returncode == 0:
        return "MISSED"
    return f"MISSED: pytest ended with status {run.returncode}: {run.stdout[-300:]}"


def main() -> int:
    words = sys.argv[1:]
    numbers = [int(word) for word in words if word != "--check"] or list(range(1, len(MUTATIONS) + 1))
    stale = [line for number in numbers for line in find_stale(number, MUTATIONS[number - 1])]
    for line in stale:
        print(f"STALE {line}")
    if stale:
        print(f"{len(stale)} lines of .ci/faults.py do not fit the tree: nothing was run", flush=True)
        return 2
    if "--check" in words:
        print(f"all {len(numbers)} mutations fit the tree")
        return 0
    missed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_tree(folder)
        for number in numbers:
            mutation = MUTATIONS[number - 1]
            began = time.perf_counter()
            verdict = try_mutation(folder, mutation)
            missed += verdict.startswith("MISSED")
            print(f"{number:2} {mutation.file}: {mutation.after}")
            print(f"   {verdict} ({time.perf_counter() - began:.0f} s)", flush=True)
    print(f"{len(numbers) - missed} of {len(numbers)} faults caught")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
