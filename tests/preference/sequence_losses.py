"""Every loss of sequences with options and inputs, and what a test compares."""

from __future__ import annotations

import torch

from fastalign_kernels.preference.formulas import DPO_LOSS_TYPES, PAIR_LOSSES
from fastalign_kernels.preference.losses import (
    cpo_loss,
    dpo_loss,
    orpo_loss,
    simpo_loss,
)
from fastalign_kernels.preference.reference import (
    cpo_loss_ref,
    dpo_loss_ref,
    orpo_loss_ref,
    simpo_loss_ref,
)

SMOOTHING = {"sigmoid": 0.2, "robust": 0.2, "exo_pair": 0.1, "sigmoid_norm": 0.3}


S = 7


def lengths(device="cpu", shape=(S,)):
    n = torch.randint(1, 9, (2, *shape), generator=torch.Generator().manual_seed(3)).to(device)
    return {"chosen_lengths": n[0], "rejected_lengths": n[1]}


def options_of(loss_type, device="cpu", shape=(S,)):
    """Options that exercise all of a DPO loss."""
    by_length = lengths(device, shape) if PAIR_LOSSES[loss_type].lengths != "refused" else {}
    return {
        "loss_type": loss_type,
        "label_smoothing": SMOOTHING.get(loss_type, 0.0),
        "beta": 0.7,
        **by_length,
    }


# name -> (loss, specification, number of differentiable inputs, number of inputs, options)
PAIRS = {name: (dpo_loss, dpo_loss_ref, 2, 4, options_of(name)) for name in DPO_LOSS_TYPES} | {
    "sigmoid without smoothing": (dpo_loss, dpo_loss_ref, 2, 4, {}),
    "ipo of sums": (dpo_loss, dpo_loss_ref, 2, 4, {"loss_type": "ipo", "beta": 0.3}),
    "simpo": (simpo_loss, simpo_loss_ref, 2, 2, lengths()),
    "simpo with nll": (
        simpo_loss,
        simpo_loss_ref,
        2,
        2,
        {"alpha": 0.3, "label_smoothing": 0.1, "beta": 1.3, **lengths()},
    ),
    "orpo": (orpo_loss, orpo_loss_ref, 2, 2, {"beta": 0.4, "alpha": 0.8, **lengths()}),
    "cpo": (cpo_loss, cpo_loss_ref, 2, 2, {"label_smoothing": 0.1}),
    "cpo per token": (
        cpo_loss,
        cpo_loss_ref,
        2,
        2,
        {"alpha": 0.6, "chosen_lengths": lengths()["chosen_lengths"]},
    ),
}


KTO = {
    "kto": {"desirable_weight": 1.3, "undesirable_weight": 0.6, "beta": 0.4},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired", "undesirable_weight": 2.0},
}


def logps(count, dtype=torch.float64, shape=(S,), scale=4.0, seed=0, device="cpu", trained=2):
    """Sums of log-probs, the policy's and the references' close together, the first `trained` with a
    gradient."""
    generator = torch.Generator().manual_seed(seed)
    both = -5 * scale + scale * torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    tensors = [
        (both[i % 2] + noise[i] * scale / 4).clamp(max=-1e-2).to(dtype).to(device) for i in range(count)
    ]
    return [x.requires_grad_() if i < trained else x for i, x in enumerate(tensors)]


def labelled(dtype=torch.float64, device="cpu", seed=0):
    policy, reference = logps(2, dtype, seed=seed, device=device, trained=1)
    desirable = torch.tensor([True, False, False, True, True, False, True], device=device)
    return policy, reference, desirable, torch.tensor(0.3, dtype=dtype, device=device)


def moved(options, device):
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }
