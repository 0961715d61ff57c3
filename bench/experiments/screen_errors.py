"""A screen's errors while a model trains: `python -m bench.experiments.screen_errors`.

The last layer and the head of SmolLM2-135M are trained with a screen and a tail on English text, two windows
of 128 tokens a step. Between steps `screen_report` compares log-probabilities and gradients with exact ones,
on windows that no step takes. The table is that of docs/screen.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastalign import screen_report
from fastalign.causal_lm import fuse_head

from ..core import smollm2
from .tail_smollm2 import LEARNING_RATE, ROWS, WINDOW, states_of, top_of

HELD_OUT = 8  # windows
TAIL_EPS = 2**-14


def row(top: Any, states: Tensor, ids: Tensor, step: int) -> str:
    """The table's row of a step."""
    with torch.no_grad():
        hidden = top.model(inputs_embeds=states, use_cache=False).last_hidden_state[:, :-1]
    weight, targets = top.lm_head.weight.detach(), ids[:, 1:]
    plain = screen_report(hidden.flatten(0, 1), weight, targets.flatten())
    tailed = screen_report(hidden.flatten(0, 1), weight, targets.flatten(), tail_eps=TAIL_EPS)
    cells = [f"{step}", f"{plain.logp_error:.1e}", f"{plain.largest_logp_error:.1e}"]
    cells += [f"{error:.3%}" for error in (plain.hidden_error, plain.weight_error)]
    cells += [f"{error:.3%}" for error in (tailed.hidden_error, tailed.weight_error)]
    return " | ".join([*cells, f"{plain.exact_columns:.0f}", f"{plain.exact_tokens:.2f}"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--every", type=int, default=8)
    given = parser.parse_args(arguments)
    model, windows = smollm2.load()
    ids = windows.view(-1, WINDOW)[: ROWS * given.steps + HELD_OUT]
    states = states_of(model, ids)
    top = fuse_head(top_of(model), tail_eps=TAIL_EPS, screen=True)
    trained = [weight for weight in top.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    names = ["step", "logp, nats rms", "largest", "dX", "dW", "dX, tail", "dW, tail"]
    names += ["exact logits", "exact tokens"]
    print("|", " | ".join(names), "|")
    print("|", " | ".join(["---"] * len(names)), "|")
    for step in range(given.steps + 1):
        if step % given.every == 0:
            print("|", row(top, states[-HELD_OUT:], ids[-HELD_OUT:], step), "|", flush=True)
        if step == given.steps:
            break
        part = slice(ROWS * step, ROWS * (step + 1))
        loss = top(inputs_embeds=states[part], labels=ids[part], use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
