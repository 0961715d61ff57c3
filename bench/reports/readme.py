"""Fills the tables of README.md and docs/benchmarks.md: `python -m bench.reports.readme`; `--check` only
compares.

A table has no rows for cases that a results file lacks, as that of a GPU check of which half ran.

A table stands between `<!-- bench/results/FILE.json: KIND -->` and `<!-- end -->`. KIND is a function of
`KINDS`. To show another run, change the file's name in the page and run this.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastalign.measure import Timing

from ..core.operation import COMPILED, EAGER, OURS
from ..methods.cross_entropy import CHUNKED
from ..methods.sampling import MULTINOMIAL, TRANSFORMERS
from ..methods.steps import BACKBONE, STAGES
from ..methods.tail import SMALL

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/benchmarks.md")
BLOCK = re.compile(r"(<!-- (bench/results/\S+\.json): (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

LCE, LOGP = "linear_cross_entropy", "linear_logprobs"
LOSSES = (
    ("linear_dpo", ""),
    ("linear_kto", ""),
    ("linear_ppo", ""),
    ("ppo_loss", ""),
    (LCE, ", tail"),
    ("linear_dpo", ", tail"),
)
METHODS = {  # columns of the head's table, and the names of each in the rows of operations
    "fastalign": (OURS,),
    "torch.compile": (COMPILED,),
    "`F.linear_cross_entropy`, 512 a chunk": (CHUNKED,),
    "PyTorch": (EAGER,),
    "Liger Scaled CE": ("Liger fused linear Scaled CE",),
    "TRL": ("TRL ChunkedLogProbFunction", "TRL selective_log_softmax_and_entropy"),
}

TOP_P = "sample fp32, top_p 0.9 at T 0.7"
PEERS = {  # columns of the summary, and how the names of their rows begin
    "fastalign": (OURS,),
    "PyTorch": (EAGER, TRANSFORMERS),
    "torch.compile": (COMPILED,),
    "`F.linear_cross_entropy`, 512 a chunk": (CHUNKED,),
    "TRL": ("TRL ",),
    "Liger": ("Liger",),
}


def summary(results: Mapping[str, Any]) -> str:
    """Milliseconds and peak MiB of the losses from hidden states and of the sampler; the best of a row in
    bold."""
    cases = {case["name"]: case for case in results["cases"]}
    dtype = "fp32" if results["machine_info"]["gpu"] == "none" else "bf16"
    labels = {
        f"{LCE} {dtype}": f"`{LCE}`",
        f"{LOGP} {dtype}": f"`{LOGP}`",
        f"linear_dpo {dtype}": "`linear_dpo_loss` and its reference pass",
        f"linear_kto {dtype}": "`linear_kto_loss` and its reference pass",
        f"linear_ppo {dtype}": "`linear_ppo_loss`",
        TOP_P: "`sample`, top-p 0.9, against transformers",
    }
    first = f"ms (peak MiB beyond inputs); {dtype}; {_where(results, f'{LCE} {dtype}', '').rstrip('; ')}"
    lines = [_row([first, *PEERS]), _row(["---"] * (1 + len(PEERS)))]
    for name, label in labels.items():
        if name not in cases:
            continue
        shape = ", ".join(f"{letter} {size}" for letter, size in cases[name]["shape"].items() if size)
        times = [_first(cases[name], rows, _milliseconds) for rows in PEERS.values()]
        peaks = [_first(cases[name], rows, _peak) for rows in PEERS.values()]
        cells = [
            "–" if time is None else f"{_best(time, times)} ({_best(peak, peaks)})"
            for time, peak in zip(times, peaks, strict=True)
        ]
        lines.append(_row([f"{label}; {shape}", *cells]))
    return "\n".join(lines) + "\n"


def _first(
    case: Mapping[str, Any],
    beginnings: tuple[str, ...],
    value: Callable[[Mapping[str, Any], str], float | None],
) -> float | None:
    """The value of the first row that was measured and whose name begins so."""
    names = [name for name in case["rows"] if name.startswith(beginnings)]
    return next((found for name in names if (found := _value(case, name, value)) is not None), None)


def _best(value: float | None, row: list[float | None]) -> str:
    """The value in digits that one can read, in bold if no other of its row is smaller."""
    if value is None:
        return "–"
    digits = f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
    return f"**{digits}**" if value == min(other for other in row if other is not None) else digits


def head(results: Mapping[str, Any]) -> str:
    """Times, peaks and errors of the head's operations, a column for each method; the best are bold."""
    cases = {case["name"]: case for case in results["cases"]}
    dtype = "fp32" if results["machine_info"]["gpu"] == "none" else "bf16"
    plain, logp = f"{LCE} {dtype}", f"{LOGP} {dtype}"
    rows: list[tuple[str, str, Callable[[Mapping[str, Any], str], float | None], str]] = [
        (f"`{LCE}`, times 3 GEMMs", plain, _times_ceiling, ".2f"),
        ("its peak MiB beyond inputs", plain, _peak, ",.0f"),
        ("its largest gradient error", plain, _gradient_error, ".1e"),
        ("… bf16, times PyTorch", f"{LCE} bf16", _times_eager, ".2f"),
        ("… bf16, error of the loss", f"{LCE} bf16", _loss_error, ".0e"),
        ("… frozen head, times 2 GEMMs", f"{plain}, frozen head", _times_ceiling, ".2f"),
        ("… no gradients, times 1 GEMM", f"{plain}, no gradients", _times_ceiling, ".2f"),
        (f"`{LOGP}`, times 4 GEMMs", logp, _times_ceiling, ".2f"),
        ("its peak MiB beyond inputs", logp, _peak, ",.0f"),
        ("… frozen head, times 2 GEMMs", f"{logp}, frozen head", _times_ceiling, ".2f"),
        ("… no gradients, times 1 GEMM", f"{logp}, no gradients", _times_ceiling, ".2f"),
        (
            "`token_stats` fp32, times one read (TRL: two of four outputs)",
            "token_stats fp32",
            _times_ceiling,
            ".2f",
        ),
    ]
    first = f"{dtype}, forward and backward unless said; {_where(results, plain)}"
    lines = [_row([first, *METHODS]), _row(["---"] * (1 + len(METHODS)))]
    for label, name, value, form in rows:
        if name not in cases:
            continue
        if cases[name]["shape"]["N"] != cases[plain]["shape"]["N"] and label.startswith("…"):
            label += f"; N {cases[name]['shape']['N']}"
        values = [
            next((v for method in names if (v := _value(cases[name], method, value)) is not None), None)
            for names in METHODS.values()
        ]
        best = min((v for v in values if v is not None), default=None)
        if best is None:
            continue
        lines.append(
            _row(
                [
                    label,
                    *(
                        "–" if v is None else f"**{v:{form}}**" if v == best else f"{v:{form}}"
                        for v in values
                    ),
                ]
            )
        )
    return "\n".join(lines) + "\n"


def sampling(results: Mapping[str, Any]) -> str:
    """Ours against transformers' warpers, or against softmax and multinomial if there is no filter."""
    cases = [
        case
        for case in results["cases"]
        if case["name"].startswith("sample ") and case["rows"].get(OURS, {}).get("seconds")
    ]
    if not cases:
        return "Not measured.\n"
    head = [
        _where(results, cases[0]["name"], "N"),
        "fastalign, ms",
        "transformers' warpers, softmax, multinomial, ms",
        "times faster",
        "times one read",
    ]
    lines = [_row(head), _row(["---"] * len(head))]
    for case in cases:
        peer = TRANSFORMERS if TRANSFORMERS in case["rows"] else MULTINOMIAL
        ours, theirs, read = (
            Timing.of(case["rows"][row]["seconds"]) for row in (OURS, peer, case["ceilings"][0])
        )
        label = (
            case["name"].removeprefix("sample fp32, ")
            + f", V {case['shape']['V']}"
            + (" (no warper)" if peer == MULTINOMIAL else "")
        )
        cells = [
            f"**{1e3 * ours.median:.2f}**",
            f"{1e3 * theirs.median:.0f}",
            f"{theirs.over(ours):.0f}",
            f"{ours.over(read):.2f}",
        ]
        lines.append(_row([label, *cells]))
    return "\n".join(lines) + "\n"


def steps(results: Mapping[str, Any]) -> str:
    """Whole training steps: seconds, and peaks if they were measured."""
    cases = {case["name"]: case for case in results["cases"]}
    dtype = "fp32" if results["machine_info"]["gpu"] == "none" else "bf16"
    head = [
        f"s (peak MiB); {dtype}; {_where(results, f'{STAGES[0]} step {dtype}')}",
        "fastalign",
        "PyTorch",
        BACKBONE,
    ]
    lines = [_row(head), _row(["---"] * len(head))]
    for stage in STAGES:
        if f"{stage} step {dtype}" not in cases:
            continue
        rows = cases[f"{stage} step {dtype}"]["rows"]
        cells = []
        for name in (OURS, EAGER, BACKBONE):
            peak, seconds = rows[name]["peak_mib"], rows[name]["seconds"]
            cells.append(
                ("–" if not seconds else f"{Timing.of(seconds).median:.2f}")
                + ("" if peak is None else f" ({peak:,.0f})")
            )
        lines.append(_row([stage, *cells]))
    return "\n".join(lines) + "\n"


def losses(results: Mapping[str, Any]) -> str:
    """Times of sequence and policy losses and of tail_eps, times PyTorch's; the best are bold."""
    dtype = "fp32" if results["machine_info"]["gpu"] == "none" else "bf16"
    columns: dict[str, Callable[[str], bool]] = {
        "fastalign": lambda name: name == OURS,
        "with `tail_eps=2**-14`": lambda name: name == SMALL,
        "torch.compile": lambda name: name == COMPILED,
        "Liger": lambda name: name.startswith("Liger"),
    }
    where = _where(results, f"linear_dpo {dtype}", "").rstrip("; ")
    head = [f"forward and backward, times PyTorch; {dtype}; {where}", *columns]
    lines = [_row(head), _row(["---"] * len(head))]
    for case in results["cases"]:
        if (
            case["name"] not in (f"{name} {dtype}{of}" for name, of in LOSSES)
            or not case["rows"].get(OURS, {}).get("seconds")
            or not case["rows"].get(EAGER, {}).get("seconds")
        ):
            continue
        values = [
            next(
                (v for n in case["rows"] if shows(n) and (v := _value(case, n, _times_eager)) is not None),
                None,
            )
            for shows in columns.values()
        ]
        best = min(v for v in values if v is not None)
        shape = case["shape"]
        label = f"`{case['name'].split()[0]}`" + ("; SmolLM2's softmax" if "tail" in case["name"] else "")
        label += f"; N {shape['N'] * (1 if shape['H'] else shape['V'])}" + (
            f", V {shape['V']}" if shape["H"] else ""
        )
        lines.append(
            _row(
                [label, *("–" if v is None else f"**{v:.2f}**" if v == best else f"{v:.2f}" for v in values)]
            )
        )
    return "\n".join(lines) + "\n"


KINDS = {function.__name__: function for function in (summary, head, losses, sampling, steps)}


def _where(results: Mapping[str, Any], name: str, letters: str = "NHV") -> str:
    """The device, and the shape of a case if it was measured."""
    info = results["machine_info"]
    shape: Mapping[str, int] = next((case["shape"] for case in results["cases"] if case["name"] == name), {})
    device = info["gpu"] if info["gpu"] != "none" else f"{info['cpu']}, {info['threads']} threads"
    return f"{device}; " + ", ".join(
        f"{letter} {size}" for letter, size in shape.items() if size and letter in letters
    )


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _value(
    case: Mapping[str, Any], name: str, value: Callable[[Mapping[str, Any], str], float | None]
) -> float | None:
    row = case["rows"].get(name)
    return value(case, name) if row and row["seconds"] else None


def _over(case: Mapping[str, Any], name: str, other: str) -> float:
    return Timing.of(case["rows"][name]["seconds"]).over(Timing.of(case["rows"][other]["seconds"]))


def _milliseconds(case: Mapping[str, Any], name: str) -> float:
    return 1e3 * Timing.of(case["rows"][name]["seconds"]).median


def _times_ceiling(case: Mapping[str, Any], name: str) -> float | None:
    return _over(case, name, case["ceilings"][0]) if case["ceilings"] else None


def _times_eager(case: Mapping[str, Any], name: str) -> float:
    return _over(case, name, EAGER)


def _peak(case: Mapping[str, Any], name: str) -> float | None:
    return case["rows"][name]["peak_mib"]


def _gradient_error(case: Mapping[str, Any], name: str) -> float | None:
    errors = case["rows"][name]["errors"].items()
    return max((error["relative"] for kind, error in errors if kind.startswith("d ")), default=None)


def _loss_error(case: Mapping[str, Any], name: str) -> float | None:
    errors = case["rows"][name]["errors"]
    return errors["loss"]["relative"] if "loss" in errors else None


def filled(
    text: str, folder: Path = ROOT, kinds: Mapping[str, Callable[[Mapping[str, Any]], str]] = KINDS
) -> str:
    """A page's text with all tables rewritten; docs/tail.md has `kinds` of its own.

    Raises:
        ValueError: a table of an unknown kind.
    """

    def table(found: re.Match[str]) -> str:
        begin, file, kind, end = found.groups()
        if kind not in kinds:
            raise ValueError(f"table: got {kind!r}, expected one of {', '.join(kinds)}")
        return begin + kinds[kind](json.loads((folder / file).read_text())) + end

    return BLOCK.sub(table, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.reports.readme",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="change nothing; exit status 1 if a table differs from its results file",
    )
    given = parser.parse_args(argv)
    status = 0
    for name in PAGES:
        page = ROOT / name
        text = page.read_text()
        made = filled(text)
        if not given.check:
            page.write_text(made)
        elif made == text:
            print(f"{name}: in sync")
        else:
            print(f"{name}: its tables differ from their results files; run python -m bench.reports.readme")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
