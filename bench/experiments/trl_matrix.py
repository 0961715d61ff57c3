"""The support matrix of `fastalign.integrations.trl`: a row trains with TRL's function and with ours.

The model is a random Llama of 2 layers in fp32 (Gemma 2 where a softcap is named), 10 steps. A cell
is the largest relative difference of a number that the two trainings logged. The last column is the largest
absolute difference of rewards, margins, KL, accuracy and RL's loss, which are 0 to rounding in the first
steps. The run ends with an error if fastalign was not called as often as TRL's function was.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, NamedTuple

from peft import LoraConfig

from fastalign.causal_lm import fuse_head

from .trl_runs import largest_difference, train

SCORING = ("SFT", "DPO", "KTO", "GRPO", "RLOO")
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
LORA_HEAD_SAVED = LoraConfig(
    r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
)
EVALUATION = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}


class Case(NamedTuple):
    """A row of the matrix: the trainers that have the option, and the arguments of `train`."""

    option: str
    trainers: tuple[str, ...]
    arguments: dict[str, Any]


CASES = (
    Case("defaults", SCORING, {}),
    Case("LoRA", SCORING, {"lora": LORA}),
    Case("LoRA, lm_head in modules_to_save", ("SFT", "DPO"), {"lora": LORA_HEAD_SAVED}),
    Case("gradient accumulation", SCORING, {"gradient_accumulation_steps": 2}),
    Case("gradient checkpointing", SCORING, {"gradient_checkpointing": True}),
    Case("evaluation", SCORING, EVALUATION),
    Case("packing", ("SFT",), {"packing": True, "packing_strategy": "wrapped", "max_length": 16}),
    Case("softcap of 1.5 (Gemma 2)", SCORING, {"config": {"final_logit_softcapping": 1.5, "head_dim": 8}}),
    Case("a model that fuse_head fused", SCORING, {"prepare": fuse_head}),
    Case("loss_type='dft'", ("SFT",), {"loss_type": "dft"}),
    Case("use_weighting (WPO)", ("DPO",), {"use_weighting": True}),
    Case("loss_type=['sigmoid', 'sft']", ("DPO",), {"loss_type": ["sigmoid", "sft"]}),
    Case("loss_type='dr_grpo'", ("GRPO",), {"loss_type": "dr_grpo"}),
    Case("top_entropy_quantile=0.5", ("GRPO",), {"top_entropy_quantile": 0.5}),
    Case("cast_lm_head_to_fp32", ("GRPO",), {"cast_lm_head_to_fp32": True}),
    Case("temperature=0.7", ("GRPO", "RLOO"), {"temperature": 0.7}),
    Case("bf16 autocast", SCORING, {"bf16": True}),
)


def main() -> None:
    """Print the matrix as a table of Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--only", default="", help="rows whose option contains this")
    arguments = parser.parse_args()
    print(f"| option | {' | '.join(SCORING)} | near 0 |\n| --- |{' --- |' * (len(SCORING) + 1)}")
    for case in CASES:
        if arguments.only not in case.option:
            continue
        relative, absolute = dict.fromkeys(SCORING, ""), 0.0
        for trainer in case.trainers:
            without, patched = (
                train(trainer, patched=patched, steps=arguments.steps, **case.arguments)
                for patched in (False, True)
            )
            if not patched.fastalign_calls == without.trl_calls > 0 == patched.trl_calls:
                raise RuntimeError(
                    f"{trainer}, {case.option}: got {patched}, expected {without.trl_calls} calls"
                )
            difference = largest_difference(patched, without)
            print(trainer, difference, file=sys.stderr, flush=True)
            relative[trainer] = f"{difference.relative:.1e}"
            absolute = max(absolute, difference.absolute)
        print(f"| {' | '.join([case.option, *relative.values(), f'{absolute:.1e}'])} |", flush=True)


if __name__ == "__main__":
    main()
