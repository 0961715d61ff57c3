"""Time, peak memory and error of a function, as bench and the demo report them.

`machine` describes the machine that they were measured on.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._version import __version__

_CLEAR_REFS = Path("/proc/self/clear_refs")
# Read between the calls of a cold clock: more than twice the last cache of most processors. It takes 6 ms.
_OTHER_MIB = 256
_QUEUED = 100  # writes of twice the L2 cache of an H200: 3 ms. Its host took up to 2.9 for a call of a head
_ROWS_AT_ONCE = 1024  # rows of a result that are compared at once in fp64: the copies stay small


class Timing(NamedTuple):
    """Seconds of each round, with their median, minimum and maximum."""

    median: float
    minimum: float
    maximum: float
    seconds: tuple[float, ...]

    @staticmethod
    def of(seconds: list[float]) -> Timing:
        return Timing(statistics.median(seconds), min(seconds), max(seconds), tuple(seconds))

    def over(self, other: Timing) -> float:
        """This time as a multiple of another of the same `interleaved` call: the median over the rounds.

        A round's functions run one after another. So what slows the machine for a while slows both sides of
        a ratio.
        """
        return statistics.median(
            numerator / denominator
            for numerator, denominator in zip(self.seconds, other.seconds, strict=True)
        )


class Error(NamedTuple):
    """Largest |result - reference| of a tensor, absolute and as a multiple of the largest |reference|.

    It is NaN if a result has NaN.
    """

    absolute: float
    relative: float


class PeakMemoryUnavailable(RuntimeError):
    """This system does not report a process's peak memory since a given moment. Linux and CUDA do."""


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    *,
    cold: bool = False,
    queued: bool = False,
) -> dict[str, Timing]:
    """Time functions in rounds A B C A B C ..., after `warmup` such rounds that do not count; in seconds.

    A function's time includes what it allocates, but not freeing its result. On a GPU, events measure the
    time from when the device starts the function's work until it ends, and the L2 cache is overwritten
    before each call. With `cold`, a CPU's caches are filled with other data before each call, and the C
    library gives freed memory back. With `queued`, a GPU first works for three milliseconds, so that the host
    can launch a short call's kernels before the device gets to them: the time is then the device's alone.

    Raises:
        ValueError: rounds below 1, or warmup below 0.
    """
    if rounds < 1:
        raise ValueError(f"rounds: got {rounds}, expected a number from 1 on")
    if warmup < 0:
        raise ValueError(f"warmup: got {warmup}, expected a number from 0 on")
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    clock = (
        _gpu_clock(queued=queued) if torch.cuda.is_initialized() else _cold_clock() if cold else _host_clock
    )
    for number in range(warmup + rounds):
        for name, function in functions.items():
            elapsed = clock(function)
            if number >= warmup:
                seconds[name].append(elapsed)
    return {name: Timing.of(rounds_of) for name, rounds_of in seconds.items()}


def _host_clock(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    result = function()
    elapsed = time.perf_counter() - begin
    del result
    return elapsed


def _cold_clock() -> Callable[[Callable[[], object]], float]:
    """A clock whose calls find their inputs in memory, not in a cache, and get fresh memory for results.

    Inputs as large as the last cache are cached or not by chance. Reads of 37 MiB, with 32 MiB of cache
    that other guests of the machine share, took 0.46 to 0.94 ms from run to run, and 0.76 to 0.85 ms from
    memory. The clock reads other data: data that it wrote would be written back during the call.

    glibc maps a large tensor afresh, and its first touches take longer than most kernels, unless earlier
    calls left a hole in the heap. log_softmax of 192 MiB took 70 ms in one run, 13 in another, and 64 in a
    process of its own.
    """
    lines = torch.ones(_OTHER_MIB * 2**20 // 4)

    def clock(function: Callable[[], object]) -> float:
        _trim_heap()
        lines.sum()
        return _host_clock(function)

    return clock


def _gpu_clock(*, queued: bool) -> Callable[[Callable[[], object]], float]:
    """A clock that overwrites twice the L2 cache before each call.

    A training step does not find its inputs in the L2 either. queued: it is overwritten _QUEUED times.
    """
    passes = _QUEUED if queued else 1
    lines = torch.empty(
        2 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size,
        dtype=torch.uint8,
        device="cuda",
    )

    def clock(function: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        for _ in range(passes):
            lines.zero_()
        begin.record()
        result = function()
        end.record()
        torch.cuda.synchronize()
        del result
        return begin.elapsed_time(end) / 1e3

    return clock


def largest_error(results: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Error]:
    """Largest elementwise |result - reference| of each result, in fp64.

    The reference may have more names than the results.

    Raises:
        ValueError: a result is not in the reference, has another shape, or has no elements.
    """
    return {name: _error(name, result, reference.get(name)) for name, result in results.items()}


def _error(name: str, result: Tensor, reference: Tensor | None) -> Error:
    if reference is None:
        raise ValueError(f"results: got {name!r}, expected names that the reference has")
    if result.shape != reference.shape:
        raise ValueError(
            f"results: got {name!r} of shape {list(result.shape)}, expected {list(reference.shape)}"
        )
    if result.numel() == 0:
        raise ValueError(
            f"results: got {name!r} of shape {list(result.shape)}, expected at least one element"
        )
    absolute = scale = torch.zeros((), dtype=torch.float64, device=result.device)
    results, truths = (
        torch.atleast_1d(tensor.detach()).split(_ROWS_AT_ONCE) for tensor in (result, reference)
    )
    for result_part, reference_part in zip(results, truths):
        reference_part = reference_part.double()
        # torch.maximum keeps NaN
        absolute = torch.maximum(absolute, (result_part.double() - reference_part).abs().amax())
        scale = torch.maximum(scale, reference_part.abs().amax())
    if scale == 0:
        return Error(absolute.item(), 0.0 if absolute == 0 else float("inf"))
    return Error(absolute.item(), (absolute / scale).item())


def peak_memory(
    target: str, arguments: Mapping[str, Any], *, warmup: Mapping[str, Any] | None = None, device: str = "cpu"
) -> float:
    """Peak memory of a call in MiB, beyond what was held before it.

    It counts the call's results and temporaries, not its inputs. As `peak_memories`, for one call.
    """
    return peak_memories(target, [arguments], warmup=warmup, device=device)[0]


def peak_memories(
    target: str,
    calls: Sequence[Mapping[str, Any]],
    *,
    warmup: Mapping[str, Any] | None = None,
    device: str = "cpu",
) -> list[float]:
    """Peak memory in MiB of calls, one after another, each beyond what was held before it.

    Args:
        target: "module:function". function(**arguments) makes the inputs and returns the call to measure,
            which takes no argument.
        calls: the arguments of each call. They must be JSON, because the calls run in a process of their
            own. Loading torch and transformers there takes 4 s, so several calls should share one process.
        warmup: arguments of a first call that does not count, so that libraries are loaded and threads
            started. Use small ones, or the same for a target that compiles at its first call.
        device: "cpu" measures resident memory of a fresh process (Linux: VmHWM, reset through
            /proc/self/clear_refs), with as many threads as torch has here. "cuda" measures
            torch.cuda.max_memory_allocated in this process.

    Raises:
        PeakMemoryUnavailable: device is "cpu" and there is no /proc/self/clear_refs, as on macOS and
            Windows.
        RuntimeError: the call failed in its process. The message ends with that process's last lines.
    """
    if torch.device(device).type == "cuda":
        return [_peak_cuda(target, arguments, warmup) for arguments in calls]
    if not _CLEAR_REFS.exists():
        raise PeakMemoryUnavailable(
            f"peak memory: got {platform.system()} without {_CLEAR_REFS}, expected Linux or a GPU"
        )
    request = {
        "target": target,
        "calls": [dict(arguments) for arguments in calls],
        "warmup": warmup and dict(warmup),
        "threads": torch.get_num_threads(),
    }
    child = subprocess.run(
        [sys.executable, "-c", "from fastalign.measure import _serve; _serve()"],
        input=json.dumps(request),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    if child.returncode:
        raise RuntimeError(
            f"target: got a failure of {target} in a process of its own, expected a result:\n"
            + "\n".join(child.stderr.splitlines()[-5:])
        )
    return [float(peak) for peak in json.loads(child.stdout)]


def _serve() -> None:
    """The child process of `peak_memory`: a request on standard input, peaks in MiB on standard output."""
    answer = os.dup(1)
    os.dup2(2, 1)  # what the target prints must not mix with the answer
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    if request["warmup"] is not None:
        _prepared(request["target"], request["warmup"])()
    peaks = [_peak_here(request["target"], arguments) for arguments in request["calls"]]
    with os.fdopen(answer, "w") as stream:
        json.dump(peaks, stream)


def _peak_here(target: str, arguments: Mapping[str, Any]) -> float:
    call = _prepared(target, arguments)
    gc.collect()
    _trim_heap()  # otherwise this call could reuse freed memory without a trace
    before = _kib("VmRSS")
    _CLEAR_REFS.write_text("5")
    result = call()
    peak = _kib("VmHWM")
    del result
    return (peak - before) / 1024


def _trim_heap() -> None:
    """Give freed memory back to the system. Only glibc can do that."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _prepared(target: str, arguments: Mapping[str, Any]) -> Callable[[], object]:
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)(**arguments)


def _kib(field: str) -> int:
    """A size of /proc/self/status in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _peak_cuda(target: str, arguments: Mapping[str, Any], warmup: Mapping[str, Any] | None) -> float:
    if warmup is not None:
        _prepared(target, warmup)()
    call = _prepared(target, arguments)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del result
    return (peak - before) / 2**20


def machine() -> dict[str, str | int]:
    """What a figure depends on: processor, cores, threads, versions, GPU and driver.

    It names no host, user or path.
    """
    return {
        "cpu": _cpu_name(),
        "cpu_model": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "fastalign": __version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "driver": _query("driver_version"),
        "cuda": torch.version.cuda or "none",
        "clocks": clocks(),
    }


def clocks() -> str:
    """Clocks and power of the GPU at this moment. Nothing here sets them."""
    return _query("clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu")


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    return _of_cpu("model name") or platform.processor() or platform.machine()


def _cpu_model() -> str:
    """The generation of an x86 CPU, which its name may not tell: an "AMD EPYC" of family 25 is a Zen 3 or 4,
    one of family 26 a Zen 5 with twice the width."""
    family, model = _of_cpu("cpu family"), _of_cpu("model")
    return f"family {family}, model {model}" if family else "not known"


def _of_cpu(field: str) -> str:
    """What Linux says of the first core, or an empty string."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _query(fields: str) -> str:
    """What nvidia-smi says of the first GPU, or "none"."""
    tool = shutil.which("nvidia-smi")
    if not torch.cuda.is_available() or tool is None:
        return "none"
    seen = subprocess.run(
        [tool, f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True
    )
    line = seen.stdout.partition("\n")[0].strip() or "unknown"
    return (
        line
        if "," not in fields
        else ", ".join(f"{name} {value.strip()}" for name, value in zip(fields.split(","), line.split(",")))
    )
