"""A whole training step of each stage, with fastalign's loss and with plain PyTorch's.

A step is forward, loss, backward, clipping and AdamW. Both methods get the same packed batch of 8 ragged
sequences and the same randomly initialised Llama of SmolLM2-135M's widths, so a ratio shows the effect of the
loss and not of packing. The learning rate is 0: AdamW does all its work, and each round starts from the same
weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.operation import EAGER, OURS, Forward, Operation, Shape, Tensors, here, module

STAGES = ("pretrain", "sft", "reward", "dpo", "kto")
WEIGHTS = (4, 4, 3, 3, 2, 2, 1, 1)  # relative lengths of the 8 sequences
BETA = 0.1
LARGEST_NORM = 1.0
BACKBONE = "the step without head and loss"  # the hidden states are summed instead


def step_inputs(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """ids [N]; sizes: H and V; like: an empty tensor of the model's dtype."""
    for package in ("transformers", "datasets", "peft", "pydantic"):  # the extra `train`
        module(package, package)
    ids = torch.randint(2, shape.V, (shape.N,), generator=torch.Generator().manual_seed(0))
    return {
        "ids": ids.to(device),
        "sizes": torch.tensor([shape.H, shape.V]),
        "like": torch.empty(0, dtype=dtype, device=device),
    }


class Layers(NamedTuple):
    """Layers of a Llama: SmolLM2-135M's at H 576, fewer and smaller for a smaller H."""

    number: int
    heads: int
    key_heads: int
    inner: int

    @staticmethod
    def of(H: int) -> Layers:
        return Layers(min(30, max(2, H // 19)), max(1, H // 64), max(1, H // 192), H * 8 // 3)


class Trainee(NamedTuple):
    """A model, its optimizer, and its loss on the batch."""

    model: Any
    optimizer: torch.optim.Optimizer
    loss: Callable[[], Tensor]


def _model(stage: str, H: int, V: int, dtype: torch.dtype, device: str, seed: int = 0) -> Any:
    transformers = module("transformers", "transformers")
    layers = Layers.of(H)
    config = transformers.LlamaConfig(
        hidden_size=H,
        intermediate_size=layers.inner,
        num_hidden_layers=layers.number,
        num_attention_heads=layers.heads,
        num_key_value_heads=layers.key_heads,
        vocab_size=V,
        tie_word_embeddings=True,
        pad_token_id=0,
        num_labels=1,
    )
    torch.manual_seed(seed)
    kind = transformers.LlamaForSequenceClassification if stage == "reward" else transformers.LlamaForCausalLM
    return kind(config).to(device, dtype).train()


def _sequences(ids: Tensor) -> list[Any]:
    """Ragged sequences of the tokens; the first quarter of each is its prompt."""
    from fastalign.data import Tokenized

    tokens = ids.tolist() * 2  # enough for a tiny N, whose shortest sequences are rounded up to 3 tokens
    begin, sequences = 0, []
    for weight in WEIGHTS:
        length = max(3, ids.numel() * weight // sum(WEIGHTS))
        prompt = max(1, length // 4)
        sequences.append(
            Tokenized(tokens[begin : begin + length], [False] * prompt + [True] * (length - prompt))
        )
        begin += length
    return sequences


def _batch(stage: str, ids: Tensor) -> dict[str, Any]:
    """The stage's micro-batch. Each sequence has its prompt, because plain code shares none."""
    from fastalign.data import (
        Pair,
        Tokenized,
        Unpaired,
        collate,
        collate_pairs,
        collate_unpaired,
        last_tokens,
        mismatch,
        pack,
        pack_sequences,
    )
    from fastalign.stages.runs.distributed import World

    sequences = _sequences(ids)
    packer = functools.partial(pack_sequences, pad_id=0)
    batch: dict[str, Any]
    if stage in ("pretrain", "sft"):
        if stage == "pretrain":
            sequences = [Tokenized(s.input_ids, [False] + [True] * (len(s.input_ids) - 1)) for s in sequences]
        lengths = [len(s.input_ids) for s in sequences]
        batch = collate([[sequences[n] for n in row] for row in pack(lengths, max(lengths))], pad_id=0)
    elif stage == "kto":
        rows = mismatch(
            [Unpaired(s, n % 2 == 0) for n, s in enumerate(sequences)], seed=0, step=0, max_length=len(ids)
        )
        batch = collate_unpaired(rows, packer=packer)
    else:
        pairs = [Pair(chosen, rejected) for chosen, rejected in zip(sequences[::2], sequences[1::2])]
        batch = collate_pairs(pairs, packer=packer)
        if stage == "reward":
            batch["ends"] = last_tokens(batch["both"], pad_id=0)
    return World(0, 1, ids.device).place(batch)


def _fused_loss(stage: str, model: Any, reference: Any, batch: Mapping[str, Any]) -> Callable[[], Tensor]:
    """The loss as the stage computes it."""
    from fastalign.causal_lm import fuse_head
    from fastalign.classifier import score_packed
    from fastalign.data import sequence_logps
    from fastalign.step_losses import fused_loss

    for network in [model] if reference is None else [model, reference]:
        (score_packed if stage == "reward" else fuse_head)(network)
    return fused_loss(stage, _config(stage), model, batch, functools.partial(sequence_logps, reference))


def _plain_loss(stage: str, model: Any, reference: Any, batch: Mapping[str, Any]) -> Callable[[], Tensor]:
    from fastalign.step_losses import plain_logps, plain_loss

    return plain_loss(stage, _config(stage), model, batch, functools.partial(plain_logps, reference))


def _config(stage: str) -> Any:
    from fastalign.stages import dpo, kto, reward

    paths: Any = dict.fromkeys(("model", "train_data", "output_dir"), "none")  # nothing is read or written
    if stage == "reward":
        return reward.RewardConfig(**paths)
    return (
        {"dpo": dpo.DPOConfig, "kto": kto.KTOConfig}[stage](**paths, beta=BETA)
        if stage in ("dpo", "kto")
        else None
    )


def _backbone_loss(stage: str, model: Any, reference: Any, batch: Mapping[str, Any]) -> Callable[[], Tensor]:
    """The sum of the hidden states that the stage trains on, after its passes without gradient."""
    packed = {"dpo": ["both"], "reward": ["both"], "kto": ["answered"]}.get(stage)
    arguments = dict(batch[packed[0]]["arguments"] if packed else batch)
    arguments.pop("labels")

    def hidden(network: Any, inputs: Mapping[str, Any]) -> Tensor:
        return network.model(
            input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False
        ).last_hidden_state.sum()

    def loss() -> Tensor:
        with torch.no_grad():
            if stage in ("dpo", "kto"):
                hidden(reference, batch["both"]["arguments"])
            if stage == "kto":
                hidden(model, batch["mismatched"]["arguments"])
        return hidden(model, arguments)

    return loss


LOSSES = {OURS: _fused_loss, EAGER: _plain_loss, BACKBONE: _backbone_loss}


# The methods and the ceiling of one case; each has some 2 GB of weights, gradients and moments.
@functools.lru_cache(maxsize=3)
def _trainee(
    stage: str, method: str, H: int, V: int, dtype: torch.dtype, ids: tuple[int, ...], device: str
) -> Trainee:
    batch = _batch(stage, torch.tensor(ids, device=device))
    model = _model(stage, H, V, dtype, device)
    reference = (
        _model(stage, H, V, dtype, device, seed=1).eval().requires_grad_(False)
        if stage in ("dpo", "kto")
        else None
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()  # allocates the moments, which do not belong to the memory of a step
    optimizer.zero_grad()
    return Trainee(model, optimizer, LOSSES[method](stage, model, reference, batch))


def _step(stage: str, method: str, tensors: Tensors) -> dict[str, Tensor]:
    H, V = tensors["sizes"].tolist()
    ids = tensors["ids"]
    model, optimizer, loss_fn = _trainee(
        stage, method, H, V, tensors["like"].dtype, tuple(ids.tolist()), str(ids.device)
    )
    with torch.enable_grad():
        loss = loss_fn()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
    head = model.score if stage == "reward" else model.model.embed_tokens  # the tied head of a causal LM
    results = {
        "loss": loss.detach(),
        "d head": head.weight.grad,
        "d first layer": model.model.layers[0].self_attn.q_proj.weight.grad,
    }
    optimizer.step()
    optimizer.zero_grad()
    return results


def _method(stage: str, method: str) -> Forward:
    return lambda **tensors: _step(stage, method, tensors)


def without_loss(stage: str) -> Callable[[Tensors], Callable[[], object]]:
    """The ceiling of a step: the step without head and loss."""
    return lambda tensors: functools.partial(_step, stage, BACKBONE, tensors)


STEPS = {
    f"{stage} step": Operation(
        step_inputs,
        {name: here(_method(stage, name)) for name in (OURS, EAGER)},
        (),
        whole=lambda rows, stage=stage: _method(stage, EAGER),  # type: ignore[misc]
    )
    for stage in STAGES
}
