"""What all parts of the demo share: the settings, the recipe of every stage, timing, and completions of many
prompts."""

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from . import demo_report, rollout
from .demo_report import Shape
from .stages.report import PROGRESS_SECONDS

# A row holds 3.5 sentences of 36.5 tokens, so that nine hold 32; the longest sentence has 96.
ROW_TOKENS, BATCH_ROWS = 128, 9
RECIPE = {
    "batch_size": BATCH_ROWS,
    "schedule": "linear",
    "final_fraction": 0.1,
    "weight_decay": 0.05,
    "max_grad_norm": 1.0,
    "attention": "sdpa",
    "device": "cpu",
}
GENERATED = 128  # completions in a batch


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of the command line, and what tests make smaller."""

    output_dir: Path = Path("runs/demo")
    steps: int = 400
    """Optimizer steps of pre-training; SFT takes 3/8 as many, one pass over the positive sentences by default."""
    data: Path | None = None
    """A copy of the sentences in place of fetching them."""
    seed: int = 0
    threads: int = 1
    held_out: int = 1000
    prompts: int = 512
    """Prompts, of held-out sentences, that are completed before and after SFT; policies are judged by half of them."""
    new_tokens: int = 40
    """Longest completion before and after SFT."""
    sampled: int = 384
    """Prompts, of sentences to train on, whose completions by the tuned model policies learn from."""
    samples: int = 4
    """Completions of each such prompt, and of each that policies are judged by."""
    policy_tokens: int = 64
    """Longest of those completions."""
    shapes: tuple[Shape, ...] = demo_report.SHAPES
    """Shapes of the head that are measured."""

    @property
    def sft_steps(self) -> int:
        """Optimizer steps of SFT."""
        return max(1, self.steps * 3 // 8)

    @property
    def reward_steps(self) -> int:
        """Optimizer steps of the reward model: one pass over the rarer kind of sentence; from a second on
        held-out pairs suffer."""
        return max(1, self.steps // 2)

    @property
    def policy_steps(self) -> int:
        """Optimizer steps of each policy that learns from preferences."""
        return max(1, self.steps * 3 // 10)

    @property
    def ppo_steps(self) -> int:
        """Rollouts of PPO, of 64 completions each."""
        return max(1, self.steps // 16)


def shared(settings: Settings, steps: int) -> dict[str, Any]:
    """What the configurations of all stages have in common."""
    return RECIPE | {"max_steps": steps, "warmup_steps": min(20, steps), "seed": settings.seed}


def bar(*arguments: Any, **options: Any) -> tqdm:
    """A progress bar, which writes seldom where stderr is a file."""
    return tqdm(*arguments, mininterval=0.2 if sys.stderr.isatty() else PROGRESS_SECONDS, **options)


@contextmanager
def part(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Announce a part of the run and note its seconds."""
    print(f"== {name}", flush=True)
    began = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - began


def draw(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], **options: Any
) -> Iterator[tuple[Sequence[str], dict[str, torch.Tensor], rollout.Rollout]]:
    """Completions of the prompts, batch by batch: the prompts, their tokens, and what `rollout.generate` drew
    with `options`.

    The noise is that of a prompt's place in `prompts`: the same for every model.
    """
    for first in range(0, len(prompts), GENERATED):
        batch = prompts[first : first + GENERATED]
        inputs = tokenizer(list(batch), return_tensors="pt", padding=True, return_token_type_ids=False)
        drawn = rollout.generate(
            model,
            inputs["input_ids"],
            inputs["attention_mask"],
            sequence_ids=torch.arange(first, first + len(batch)),
            eos_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
            **options,
        )
        yield batch, inputs, drawn
