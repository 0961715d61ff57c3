"""Every GPU kernel compiles for every architecture without spilling: `python -m bench.gpu.aot --few`, in a
process without the interpreter. Without --few it compiles each variant for each architecture."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastalign_kernels import native

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def known_architectures() -> set[int]:
    """Those that the nvcc at hand compiles the sampler for; none without nvcc."""
    from bench.gpu.aot import ARCHITECTURES, build_rules

    nvcc = build_rules()["find_nvcc"]()
    if nvcc is None:
        return set()
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    return {sm for sm in ARCHITECTURES if f"sm_{sm}" in known.split()}


def sampler_is_built() -> bool:
    """Whether the native library has the sampler for all architectures and is newer than its sources: nvcc
    takes half a minute for it."""
    from bench.gpu.aot import sampling_rows

    folders = (ROOT / "csrc" / "sampling", ROOT / "csrc" / "common")
    sources = [ROOT / "setup.py", *(path for folder in folders for path in folder.iterdir())]
    library, known = native.LIBRARY, known_architectures()
    if not known or not library.exists():
        return False
    built = library.stat().st_mtime > max(path.stat().st_mtime for path in sources)
    return built and {row.sm for row in sampling_rows(library)} == known


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Rows of the table, all fit, and what was printed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    file = tmp_path_factory.mktemp("aot") / "aot.json"
    library = ["--library", str(native.LIBRARY)] if sampler_is_built() else []
    run = subprocess.run(
        [sys.executable, "-m", "bench.gpu.aot", "--few", *library, "--json", str(file)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(file.read_text()), run.stdout


KERNELS = (
    *("row_stats", "row_grad", "row_loss", "column_sums", "column_grad", "pairs", "unpaired", "scores"),
    *("policy", "value", "gae", "moments", "merge", "whiten"),
    *("tile_rows", "kept_rows", "slice_stats", "scale"),
    *("kept_ids", "mean_scale", "coefficients"),
)


@pytest.mark.parametrize("kernel", [f"{name}_kernel" for name in KERNELS])
def test_triton_kernels_compile_for_every_architecture_without_spills(kernel, table):
    rows = [row for row in table[0] if row["kernel"] == kernel]
    assert {row["sm"] for row in rows} == {80, 90, 100, 120, 942}
    assert all(row["spills"] == 0 and 0 < row["registers"] <= 255 for row in rows)
    assert all(row["binary_bytes"] > 1000 for row in rows)
    assert f"{kernel:>18} gfx942" in table[1] and "binary_bytes" in table[1].splitlines()[0]


def test_the_epilogue_engine_compiles_without_spills(table):
    rows = [row for row in table[0] if row["kernel"] == "forward_kernel" or row["variant"] == "epilogue"]
    assert {(row["sm"], row["variant"]) for row in rows if row["kernel"] == "forward_kernel"} == {
        *((90, f"{kind} {size}") for kind in ("lean", "full") for size in ("small", "large")),
        *((90, variant) for variant in ("not kept small", "full softcap")),
        (100, "full small"),
    }
    names = {"forward", "gather", "merge", "dlogits", "scatter"}
    assert {row["kernel"] for row in rows} == {f"{name}_kernel" for name in names}
    assert all(row["spills"] == 0 and 0 < row["registers"] <= 255 for row in rows)
    assert all(row["shared_bytes"] <= 227 * 1024 for row in rows)


def test_the_sampler_compiles_for_every_architecture_without_spills(table):
    kernels = ("summarise_kernel", "count_kernel", "collect_kernel")
    # no variant: the tail has a collect_kernel too, in Triton
    rows = [row for row in table[0] if row["kernel"] in kernels and not row["variant"]]
    architectures = known_architectures()
    if not architectures:
        assert not rows and "nvcc is not found" in table[1]
        pytest.skip("nvcc is not found ($CUDA_HOME, PATH)")
    assert sorted((row["kernel"], row["sm"], row["dtype"]) for row in rows) == sorted(
        (kernel, sm, dtype)
        for kernel in kernels
        for sm in architectures
        for dtype in ("fp32", "bf16", "fp16")
    )
    assert all(row["spills"] == 0 and 0 < row["registers"] <= 255 for row in rows)
    assert all(
        0 < row["shared_bytes"] <= 49152 for row in rows
    )  # what a block may declare statically, on every architecture
    assert all(row["binary_bytes"] > 10_000 for row in rows)


def test_few_compilations_have_each_variant_and_each_architecture_of_a_kernel():
    from bench.gpu.aot import all_jobs, few_jobs, kernel_of

    jobs = all_jobs()
    few = few_jobs(jobs)
    assert len(few) == len(set(map(id, few))) < len(jobs) / 2

    def architectures(chosen):
        return {(kernel_of(job), job.args[1]) for job in chosen}

    def variants(chosen):
        return {(job.args[0], *job.args[2:]) for job in chosen}

    assert architectures(few) == architectures(jobs) and variants(few) == variants(jobs)


def test_a_spill_and_too_much_shared_memory_do_not_fit():
    from bench.gpu.aot import Row

    fine = Row("kernel", 120, "fp32", "", registers=80, spills=0, shared_bytes=99 * 1024)
    assert fine.fits
    assert not Row(**{**vars(fine), "spills": 8}).fits
    assert not Row(**{**vars(fine), "shared_bytes": 99 * 1024 + 1}).fits
    assert (
        Row(**{**vars(fine), "sm": 942, "shared_bytes": 64 * 1024}).fits
        and not Row(**{**vars(fine), "sm": 942}).fits
    )


def test_every_triton_kernel_is_in_the_table():
    """A kernel added to a *_triton.py without a line in bench/gpu/aot*.py fails here."""
    package = ROOT / "kernels" / "fastalign_kernels"
    paths = [path.relative_to(package) for path in package.glob("*/**/*_triton.py")]
    names = [".".join(path.with_suffix("").parts) for path in paths]
    modules = [importlib.import_module(f"fastalign_kernels.{name}") for name in names]
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    source = "".join(path.read_text() for path in (ROOT / "bench" / "gpu").glob("aot*.py"))
    assert kernels and all(f'"{name}"' in source for name in kernels)


def test_the_tails_engine_compiles_for_nvidias_architectures_without_spills(table):
    rows = [row for row in table[0] if row["variant"].startswith("tail")]
    names = {"columns", "rank", "place", "list", "collect", "thin", "hidden", "weight", "bias"}
    assert {(row["kernel"], row["sm"]) for row in rows} == {
        (f"{name}_kernel", sm) for name in names for sm in (80, 90, 100, 120)
    }
    assert all(row["spills"] == 0 and 0 < row["registers"] <= 255 for row in rows)
