"""PPO with a screen and a tail beside exact PPO: `python -m bench.experiments.screened_ppo`.

The stage `ppo` trains LoRA adapters of SmolLM2-135M, whose completions of English text are scored by their
share of vowels. Runs of one seed have the same prompts, noise and steps. The model is small and the steps are
few, so that all runs take a quarter of an hour on one core. The table is that of docs/screen.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from fastalign.stages import ppo

from ..core import smollm2

PROMPT_TOKENS = 12
MODES: dict[str, dict[str, Any]] = {"exact": {}, "screen, 2^-14": {"screen": True, "tail_eps": 2**-14}}


def vowels(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The share of vowels among the characters of each completion."""
    return [sum(text.lower().count(vowel) for vowel in "aeiou") / max(1, len(text)) for text in completions]


def prepare(folder: Path, prompts: int) -> dict[str, Any]:
    """Files of the model with its tokenizer, and of prompts from this suite's text. Raises Absent."""
    model, windows = smollm2.load()
    tokenizer = AutoTokenizer.from_pretrained(**smollm2.files())
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    starts = windows.flatten().split(PROMPT_TOKENS)[:prompts]
    rows = [json.dumps({"prompt": tokenizer.decode(ids)}) for ids in starts]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    return {"model": str(folder / "model"), "train_data": str(folder / "prompts.jsonl")}


def train(files: dict[str, Any], output: Path, *, steps: int, seed: int, **mode: Any) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    config = ppo.PPOConfig(
        **files,
        **mode,
        output_dir=str(output),
        reward=f"{vowels.__module__}:{vowels.__name__}",
        value="shared",
        reference="none",
        kl_coef=0.0,
        lora_rank=8,
        learning_rate=1e-3,
        batch_size=8,
        max_new_tokens=16,
        max_prompt_length=PROMPT_TOKENS + 4,
        max_steps=steps,
        seed=seed,
    )
    ppo.run(config)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Scores before the first update and in the last quarter, and what the screen counted."""
    steps = [line for line in lines if "objective/scores" in line]
    last = steps[-max(1, len(steps) // 4) :]
    found = {
        "first": steps[0]["objective/scores"],
        "last": statistics.fmean(line["objective/scores"] for line in last),
        "entropy": statistics.fmean(line["objective/entropy"] for line in last),
    }
    for name in ("screen/exact_tokens", "screen/exact_columns"):
        if name in steps[-1]:
            found[name] = statistics.fmean(line[name] for line in steps)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = prepare(folder, 8 * given.steps)
        for seed in range(given.seeds):
            for mode, options in MODES.items():
                lines = train(files, folder / f"{mode}-{seed}", steps=given.steps, seed=seed, **options)
                print(json.dumps({"mode": mode, "seed": seed, **summary(lines)}), flush=True)


if __name__ == "__main__":
    main()
