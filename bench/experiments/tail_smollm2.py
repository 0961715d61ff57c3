"""Fine-tune the last layer, the norm and the head of SmolLM2-135M, for tail_training.py.

The 29 layers below are frozen. Their output is computed once, so a step costs little more than its head: a
real model's softmax over 49152 tokens trains on one core in a second a step.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastalign.causal_lm import fuse_head
from fastalign.stages.head_counts import head_counts, reset_counts
from fastalign_kernels import dpo_loss, kept_share

from ..core import smollm2
from ..core.operation import Shape

WINDOW, ROWS = 128, 2  # tokens in one context; windows in a step
HELD_OUT = 16  # windows
LEARNING_RATE = 2e-4  # falls linearly to a tenth


class Frozen(NamedTuple):
    """Windows of tokens, and the hidden states that enter the last layer."""

    model: Any
    ids: Tensor  # [W, WINDOW]
    states: Tensor  # [W, WINDOW, H]
    held_out_ids: Tensor
    held_out_states: Tensor


def prepare(train: str, held_out: str, steps: int) -> Frozen:
    """Windows for training and evaluation. Raises Absent if the model is not installed.

    There are twice as many as a run takes, so that seeds differ in the windows they train on.
    """
    model, _ = smollm2.load()
    tokenizer = AutoTokenizer.from_pretrained(**smollm2.files())

    def windows(text: str, most: int) -> Tensor:
        # A token of English has fewer than 8 characters.
        ids = torch.tensor(tokenizer(text[: 8 * WINDOW * most])["input_ids"])
        return ids[: min(most, ids.numel() // WINDOW) * WINDOW].view(-1, WINDOW)

    ids, held = windows(train, 2 * ROWS * steps), windows(held_out, HELD_OUT)
    return Frozen(model, ids, states_of(model, ids), held, states_of(model, held))


def states_of(model: Any, ids: Tensor) -> Tensor:
    """The hidden states that enter the last layer."""
    with torch.no_grad():
        parts = [model.model(part, output_hidden_states=True).hidden_states[-2] for part in ids.split(8)]
    return torch.cat(parts)


def text_head(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the head's weight and the next tokens of the untouched model on this suite's English
    text."""
    model, _ = smollm2.load()
    inputs = smollm2.head_inputs(
        Shape(tokens, model.config.hidden_size, model.config.vocab_size), torch.float32, "cpu"
    )
    return inputs["hidden"], inputs["weight"], inputs["ids"]


def top_of(model: Any) -> Any:
    """The last layer, the norm and the head as a causal LM that takes hidden states as embeddings."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.tie_word_embeddings = 1, False
    top = AutoModelForCausalLM.from_config(config)
    top.model.layers[0].load_state_dict(model.model.layers[-1].state_dict())
    top.model.norm.load_state_dict(model.model.norm.state_dict())
    top.lm_head.load_state_dict(model.lm_head.state_dict())
    top.model.embed_tokens.requires_grad_(False)
    return top


def tune(
    frozen: Frozen, tail_eps: float | None, seed: int, steps: int, screen: bool | None = None
) -> dict[str, Any]:
    """Fine-tune on the windows once; the curves, with the names of a stage's metrics.jsonl."""
    top = fuse_head(top_of(frozen.model), tail_eps=tail_eps, screen=screen)
    order = random.Random(seed).sample(range(len(frozen.ids)), ROWS * steps)

    def loss(rows: list[int]) -> Tensor:
        out = top(inputs_embeds=frozen.states[rows], labels=frozen.ids[rows], use_cache=False)
        loss: Tensor = out.loss
        return loss

    def evaluate() -> float:
        return top(
            inputs_embeds=frozen.held_out_states, labels=frozen.held_out_ids, use_cache=False
        ).loss.item()

    return _train(top, order, loss, evaluate)


class Pairs(NamedTuple):
    """Windows and, as rejected completions, their first halves with the second halves of other windows."""

    model: Any
    ids: Tensor  # [P, 2, WINDOW], chosen before rejected
    states: Tensor  # [P, 2, WINDOW, H]
    held_out: int  # of the P, the last ones


def prepare_pairs(frozen: Frozen) -> Pairs:
    ids, states = (
        torch.cat([*parts])
        for parts in ((frozen.ids, frozen.held_out_ids), (frozen.states, frozen.held_out_states))
    )
    rejected = torch.cat([ids[:, : WINDOW // 2], ids.roll(1, 0)[:, WINDOW // 2 :]], 1)
    both = torch.stack([states, states_of(frozen.model, rejected)], 1)
    return Pairs(frozen.model, torch.stack([ids, rejected], 1), both, len(frozen.held_out_ids))


def tune_pairs(
    pairs: Pairs, tail_eps: float | None, seed: int, steps: int, screen: bool | None = None
) -> dict[str, Any]:
    """Train DPO on the pairs once. The reference is the untrained model, whose head runs in the same way."""
    top = fuse_head(top_of(pairs.model), tail_eps=tail_eps, screen=screen)
    labels = pairs.ids.clone()
    labels[..., : WINDOW // 2] = -100
    last = len(pairs.ids)
    trained = range(last - pairs.held_out)
    order = random.Random(seed).sample(trained, ROWS * steps)

    def logps(rows: list[int]) -> Tensor:
        """Log-probabilities of both completions of each pair, [rows, 2]."""
        states, targets = (x[rows].flatten(0, 1) for x in (pairs.states, labels))
        out = top(inputs_embeds=states, labels=targets, use_cache=False, token_stats=True)
        found: Tensor = out.logp.sum(-1).view(-1, 2)
        return found

    held_out = list(range(last - pairs.held_out, last))
    with torch.no_grad():
        reference = torch.zeros(last, 2)
        for part in torch.tensor(order + held_out).split(8):
            reference[part] = logps(part.tolist())

    def loss(rows: list[int]) -> Tensor:
        return dpo_loss(*logps(rows).unbind(1), *reference[rows].unbind(1)).loss

    return _train(top, order, loss, lambda: loss(held_out).item())


def _train(
    top: Any, order: list[int], loss_of: Callable[[list[int]], Tensor], evaluate: Callable[[], float]
) -> dict[str, Any]:
    """Train on ROWS of `order` a step."""
    evaluate = torch.no_grad()(evaluate)
    optimizer = torch.optim.AdamW(
        [w for w in top.parameters() if w.requires_grad], lr=LEARNING_RATE, weight_decay=0.0, fused=True
    )
    steps = len(order) // ROWS
    curves: dict[str, Any] = {"loss": [], "held_out": [(0, evaluate())], "kept_share": []}
    seconds = []
    reset_counts()
    for step in range(steps):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - 0.9 * step / steps)
        loss = loss_of(order[ROWS * step : ROWS * (step + 1)])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
        curves["loss"].append((step + 1, loss.item()))
        if (share := kept_share()) is not None:
            curves["kept_share"].append((step + 1, share))
        if step + 1 in (steps // 2, steps):
            curves["held_out"].append((step + 1, evaluate()))
    counts = {name: value for name, value in head_counts().items() if name.startswith("screen/")}
    return {**curves, **counts, "median_step_seconds": statistics.median(seconds)}
