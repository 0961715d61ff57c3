"""Write the tables of docs/tail.md and docs/screen.md, and the plot of the first: `python -m
bench.experiments.tail_tables`.

They come from the results files of tail_training.py that the pages name. To show another run, change the
file's name in the page and run this again.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..reports import readme
from .tail_training import SCREENED

PAGE = readme.ROOT / "docs" / "tail.md"
PLOT = PAGE.with_name("tail_training.png")
LINES = {  # the line of each mode; exact lies below, because 2^-14 hides it
    "exact": {"color": "0.7", "linewidth": 5},
    "2^-14": {"color": "C0", "linewidth": 1.5},
    "2^-12": {"color": "C2", "linewidth": 1.5},
    "2^-12 dropped": {"color": "C3", "linewidth": 1.5, "linestyle": "--"},
}


def _settings(results: Mapping[str, Any]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Setting -> mode -> its runs, by seed. The results file names the mode "way"."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for one_run in results["runs"]:
        found.setdefault(one_run["setting"], {}).setdefault(one_run["way"], []).append(one_run)
    return found


def _final(one_run: Mapping[str, Any]) -> float:
    return one_run["held_out"][-1][1]


def training(results: Mapping[str, Any]) -> str:
    """Final held-out NLLs of each seed, the differences of their means from exact's, and the columns kept."""
    names = list(LINES)
    lines = [_row(["held-out NLL, nats a token, of each seed", *names]), _row(["---"] * (1 + len(names)))]
    for setting, modes in _settings(results).items():
        if not set(names) <= set(modes):
            continue
        exact = [_final(one_run) for one_run in modes["exact"]]
        lines.append(
            _row(
                [
                    f"{setting}, {modes['exact'][0]['held_out'][-1][0]} steps",
                    *(_each(modes[name]) for name in names),
                ]
            )
        )
        differences = [
            statistics.fmean(map(_final, modes[name])) - statistics.fmean(exact) for name in names[1:]
        ]
        spread = f"spread {max(exact) - min(exact):.4f}"
        lines.append(
            _row(["… mean less exact's", spread, *(f"{difference:+z.4f}" for difference in differences)])
        )
        lines.append(
            _row(["… columns kept, first and last steps", "–", *(_shares(modes[name]) for name in names[1:])])
        )
    return "\n".join(lines) + "\n"


def _each(runs: list[dict[str, Any]]) -> str:
    return ", ".join(f"{_final(one_run):.4f}" for one_run in runs)


def _shares(runs: list[dict[str, Any]]) -> str:
    return ", ".join(
        f"{statistics.fmean(one_run['kept_share'][end][1] for one_run in runs):.1%}" for end in (0, -1)
    )


def meter(results: Mapping[str, Any]) -> str:
    """`tail_report` of three models for each tail_eps."""
    head = [
        "model",
        "V",
        "tail_eps",
        "columns kept, f",
        "GEMMs, 1 + 2 f",
        "mass dropped",
        "error of dX",
        "error of dW",
    ]
    lines = [_row(head), _row(["---"] * len(head))]
    for report in results["reports"]:
        share = report["kept_share"]
        errors = (f"{report[name]:.2%}" for name in ("dropped_mass", "hidden_error", "weight_error"))
        lines.append(
            _row(
                [
                    report["model"],
                    f"{report['vocabulary']}",
                    f"2^{report['power']}",
                    f"{share:.1%}",
                    f"{1 + 2 * share:.2f}",
                    *errors,
                ]
            )
        )
    return "\n".join(lines) + "\n"


def screened(results: Mapping[str, Any]) -> str:
    """Final held-out losses of each seed with exact and with screened logits."""
    head = [
        "held-out loss of each seed",
        *SCREENED,
        "exact's spread",
        "means' difference",
        "largest of a seed",
    ]
    lines = [_row(head), _row(["---"] * len(head))]
    for setting, modes in _settings(results).items():
        if set(modes) != set(SCREENED):
            continue
        exact, other = ([_final(one_run) for one_run in modes[name]] for name in SCREENED)
        apart = [b - a for a, b in zip(exact, other, strict=True)]
        cells = [f"{setting}, {modes['exact'][0]['held_out'][-1][0]} steps", *map(_each, modes.values())]
        cells += [f"{max(exact) - min(exact):.4f}", f"{statistics.fmean(apart):+z.5f}"]
        lines.append(_row([*cells, f"{max(map(abs, apart)):.5f}"]))
    return "\n".join(lines) + "\n"


SCREEN_PAGE = PAGE.with_name("screen.md")
SCREEN_KINDS = {"screened": screened}
KINDS = {function.__name__: function for function in (training, meter)}


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def plot(results: Mapping[str, Any], path: Path) -> None:
    """One column for each setting: held-out NLL above, share of columns kept below, a line for each seed.

    Needs matplotlib.
    """
    from matplotlib.figure import Figure

    settings = {setting: modes for setting, modes in _settings(results).items() if set(LINES) <= set(modes)}
    figure = Figure(figsize=(3.8 * len(settings), 6.4), layout="constrained")
    axes = figure.subplots(2, len(settings), squeeze=False, sharex="col")
    for column, (setting, modes) in enumerate(settings.items()):
        above, below = axes[0][column], axes[1][column]
        for name, style in LINES.items():
            for number, one_run in enumerate(modes[name]):
                label = None if number else name
                above.plot(*_points(one_run, "held_out"), **style, label=label)
                if one_run["kept_share"]:
                    below.plot(*_points(one_run, "kept_share"), **style, label=label)
        above.set(title=setting, ylabel="held-out NLL, nats a token")
        below.set(xlabel="optimizer step", ylabel="share of columns kept", ylim=(0, 1.05))
        for axis in (above, below):
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=58)  # at 64, four columns make 158 kB


def _points(one_run: Mapping[str, Any], curve: str) -> Iterator[tuple[float, ...]]:
    """The steps and the values of a curve."""
    return zip(*one_run[curve], strict=True)


def main() -> None:
    text = PAGE.read_text()
    PAGE.write_text(readme.filled(text, kinds=KINDS))
    SCREEN_PAGE.write_text(readme.filled(SCREEN_PAGE.read_text(), kinds=SCREEN_KINDS))
    ((_, file, *_),) = {found[:2] for found in readme.BLOCK.findall(text) if found[2] == training.__name__}
    plot(json.loads((readme.ROOT / file).read_text()), PLOT)


if __name__ == "__main__":
    main()
