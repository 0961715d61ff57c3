"""The settings of the demo, and what the configurations of all stages share."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

# A row holds 3.5 sentences of 36.5 tokens, so nine rows hold 32. The longest sentence has 96 tokens.
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


class Shape(NamedTuple):
    """A head: N tokens, hidden size H, vocabulary V."""

    N: int
    H: int
    V: int

    def __str__(self) -> str:
        return f"N {self.N}, H {self.H}, V {self.V}"


SHAPES = (Shape(1152, 128, 2048), Shape(2048, 576, 49152))  # a step of the demo; the head of SmolLM2-135M


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of the command line, and values that tests make smaller."""

    output_dir: Path = Path("runs/demo")
    steps: int = 400
    """Optimizer steps of pre-training. SFT takes 3/8 as many: by default one pass over the positive
    sentences."""
    data: Path | None = None
    """A copy of the sentences, to be used instead of fetching them."""
    seed: int = 0
    threads: int = 1
    held_out: int = 1000
    prompts: int = 512
    """Prompts of held-out sentences, completed before and after SFT. Half of them judge the policies."""
    new_tokens: int = 40
    """Longest completion before and after SFT."""
    sampled: int = 384
    """Prompts of training sentences. Policies learn from the tuned model's completions of them."""
    samples: int = 4
    """Completions of each such prompt, and of each prompt that judges policies."""
    policy_tokens: int = 64
    """Longest of those completions."""
    shapes: tuple[Shape, ...] = SHAPES
    """Shapes of the head that are measured."""

    @property
    def sft_steps(self) -> int:
        """Optimizer steps of SFT."""
        return max(1, self.steps * 3 // 8)

    @property
    def reward_steps(self) -> int:
        """Optimizer steps of the reward model: one pass over the rarer kind of sentence.

        A second pass makes held-out pairs worse.
        """
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
