"""Kills runs of every stage and resumes them; at the end each must equal, bit for bit, a run that was not
killed.

    make soak                      200 kills, about five minutes
    make soak SOAK_KILLS=2000      more of them
    python -m tests.hammer.soak --kills 50 --seed 7 --only ppo

About a quarter of the kills come at a random time. The others are aimed at a moment of windows.py, which are
found by running once and listing them. A run is killed up to three times before it may finish. The seed
chooses stages and moments; a kill at a random time depends on the machine too.

Each run is a fork of this process, which has imported torch and transformers: a kill costs a second, not ten.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from fastalign.stages.config import TrainConfig
from tests.hammer.runs import Kind, differences, kinds, prepare
from tests.hammer.windows import AIMED, REWRITE, Moments

# Windows of few kinds of runs. Two of three aims there go to them, or 60 kills would hit them once or never.
RARE = ("reference", "between rollout and update")
LONGEST = 180.0  # seconds after which a run counts as hanging


class Whole(NamedTuple):
    """An uninterrupted run: its configuration, how long it took, its moments by name."""

    config: TrainConfig
    seconds: float
    moments: Counter[str]


class Aim(NamedTuple):
    """Where a run is to be killed: after so many seconds, or at a moment."""

    name: str
    after: float | None = None
    matches: Callable[[str], bool] | None = None
    number: int = 0
    torn: bool = False


def fork(work: Callable[[], None], log: Path, *, after: float | None = None) -> tuple[int, float]:
    """Run `work` in a child whose output goes to `log`; its exit status (-9 when killed) and seconds. Killed
    `after` so many."""
    began = time.perf_counter()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            number = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(number, 1)
            os.dup2(number, 2)
            work()
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    limit = began + (LONGEST if after is None else after)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), time.perf_counter() - began
        if time.perf_counter() > limit:
            os.kill(child, signal.SIGKILL)
            if after is None:
                os.waitpid(child, 0)
                return -signal.SIGALRM, time.perf_counter() - began
        time.sleep(0.005)


def train(kind: Kind, config: TrainConfig, aim: Aim, listed: Path | None = None) -> None:
    """What a child does: one run, killed where `aim` says; its moments go to the file `listed`."""
    torch.set_num_threads(1)
    moments = Moments(config.output_dir, aim.matches, aim.number, torn=aim.torn)
    moments.watch()
    kind.stage.run(config)
    if listed is not None:
        listed.write_text(json.dumps(moments.seen))


def run_whole(name: str, kind: Kind, folder: Path) -> Whole:
    """Run a kind without a kill, to have what the others are compared with."""
    config = kind.configure(output_dir=str(folder / "whole"))
    listed, log = folder / "moments.json", folder / "whole.log"
    folder.mkdir()
    status, seconds = fork(lambda: train(kind, config, Aim("none"), listed), log)
    if status:
        raise RuntimeError(
            f"{name}: a run without a kill ended with status {status}:\n{log.read_text()[-3000:]}"
        )
    return Whole(config, seconds, Counter(json.loads(listed.read_text())))


def aim_at(window: str, whole: Whole, generator: random.Random, *, late: bool = False) -> Aim:
    """A moment of a window, of its second half where `late`."""
    starts = AIMED[window]
    count = sum(count for moment, count in whole.moments.items() if moment.startswith(starts))
    number = generator.randint(count // 2 + 1 if late else 1, count)
    return Aim(
        window, matches=lambda moment: moment.startswith(starts), number=number, torn=generator.random() < 0.5
    )


def choose_aims(whole: Whole, generator: random.Random) -> list[Aim]:
    """Up to three random times and moments of random windows, for one run and its resumes."""
    there = [
        window
        for window, starts in AIMED.items()
        if any(moment.startswith(starts) for moment in whole.moments)
    ]
    aims: list[Aim] = []
    for number in range(generator.randint(1, 3)):
        # A run that was killed later than that has its reference, and does not write it again.
        windows = [window for window in there if window != "reference" or number == 0]
        rare = [window for window in windows if window in RARE]
        if rare and generator.random() < 2 / 3:
            aims.append(aim_at(generator.choice(rare), whole, generator))
            continue
        window = generator.choice(windows)
        if generator.random() < 0.5:
            aims.append(Aim("random time", after=generator.uniform(0, whole.seconds)))
            continue
        if (
            window == REWRITE
        ):  # of lines that only a run has that was killed before, late enough to have a checkpoint
            aims.append(aim_at("line of metrics.jsonl", whole, generator, late=True))
        aims.append(aim_at(window, whole, generator))
    return aims


def kill_and_resume(
    name: str, kind: Kind, whole: Whole, folder: Path, generator: random.Random
) -> tuple[Counter[str], list[str]]:
    """One run through up to three kills to its end: its kills by window, and what is wrong."""
    output_dir = folder / "killed"
    log = folder / "killed.log"
    shutil.rmtree(output_dir, ignore_errors=True)
    log.unlink(missing_ok=True)
    kills: Counter[str] = Counter()
    config = kind.configure(output_dir=str(output_dir))
    story = []
    for aim in [*choose_aims(whole, generator), Aim("none")]:
        status, _ = fork(partial(train, kind, config, aim), log, after=aim.after)
        story.append(f"{aim.name} {aim.after or aim.number}{' torn' if aim.torn else ''}: {status}")
        if status == -signal.SIGKILL:
            kills[aim.name] += 1
        elif status:
            told = log.read_text()[-3000:]
            return kills, [f"{name}: after {'; '.join(story)}: ended with status {status}\n{told}"]
        else:
            break
        config = replace(config, resume=True)
    return kills, [
        f"{name}: after {'; '.join(story)}: {wrong}" for wrong in differences(whole.config, config)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None, help="default: drawn, and printed")
    parser.add_argument("--only", default="", help="kinds of runs whose name begins so, such as ppo")
    arguments = parser.parse_args()
    seed = random.randrange(2**32) if arguments.seed is None else arguments.seed
    print(f"soak: {arguments.kills} kills, --seed {seed}", flush=True)
    generator = random.Random(seed)
    kills: Counter[str] = Counter()
    by_kind: Counter[str] = Counter()
    found: list[str] = []
    resumed = 0
    with tempfile.TemporaryDirectory(prefix="fastalign-soak-") as temporary:
        folder = Path(temporary)
        status, _ = fork(lambda: prepare(folder / "data"), folder / "prepare.log")
        if status:
            raise RuntimeError((folder / "prepare.log").read_text())
        chosen = {
            name: kind for name, kind in kinds(folder / "data").items() if name.startswith(arguments.only)
        }
        whole = {
            name: run_whole(name, kind, folder / name.replace(", ", "-")) for name, kind in chosen.items()
        }
        for name, run in whole.items():
            print(f"  {name}: {run.seconds:.1f} s, {run.moments.total()} moments", flush=True)
        while kills.total() < arguments.kills:
            name = list(chosen)[resumed % len(chosen)]
            new, wrong = kill_and_resume(
                name, chosen[name], whole[name], folder / name.replace(", ", "-"), generator
            )
            kills += new
            by_kind[name] += new.total()
            found += wrong
            resumed += 1
            for line in wrong:
                print(f"FOUND {line}", flush=True)
    for counts in (kills, by_kind):
        print("  " + ", ".join(f"{name} {count}" for name, count in counts.most_common()))
    print(f"soak: {kills.total()} kills in {resumed} runs, {len(found)} findings (--seed {seed})")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
