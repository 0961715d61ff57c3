"""A valid call of every public function, for tests that walk all of them."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastalign_kernels
from fastalign_kernels import native

FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(fastalign_kernels, name)
    for name in fastalign_kernels.__all__
    if inspect.isfunction(getattr(fastalign_kernels, name))
    and name not in ("kept_share", "screen_counts")  # which take no argument
    and (name != "screen_report" or native.has_int8_gemm())
}
REPORTS = {"tail_report", "screen_report"}  # which measure values


def call_of(
    name: str, *, rows: int = 4, length: int = 3, hidden_size: int = 5, vocab_size: int = 7
) -> dict[str, Any]:
    """Keyword arguments of a call of FUNCTIONS[name], all its tensors among them where they may be given
    together."""
    if name == "linear_dpo_loss":  # pairs
        rows *= 2
    generator = torch.Generator().manual_seed(0)

    def floats(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def ids(*shape: int) -> Tensor:
        return torch.randint(vocab_size, shape, generator=generator)

    def lengths() -> Tensor:
        return torch.arange(1, rows + 1)

    tokens = (rows, length)
    mask = torch.ones(tokens, dtype=torch.bool)
    head = {
        "hidden": floats(*tokens, hidden_size),
        "weight": floats(vocab_size, hidden_size),
        "bias": floats(vocab_size),
    }
    cross_entropy = {
        "targets": ids(*tokens),
        "token_weights": floats(*tokens).exp(),
        "num_items": torch.tensor(3.0),
    }
    policy: dict[str, Any] = {
        "old_logp": floats(*tokens),
        "advantages": floats(*tokens),
        "mask": mask,
        "reference_logp": floats(*tokens),
    }
    policy |= {"normalizer": torch.tensor(5.0), "kl_coefficient": 0.1}
    pairs = {"policy_chosen_logps": -floats(rows).exp(), "policy_rejected_logps": -floats(rows).exp()}
    references = {"reference_chosen_logps": floats(rows), "reference_rejected_logps": floats(rows)}
    both_lengths = {"chosen_lengths": lengths(), "rejected_lengths": lengths()}
    packed = {
        "values": floats(rows * length),
        "cu_seqlens": torch.arange(0, rows * length + 1, max(length, 1)),
    }
    words = -(-vocab_size // 32)
    drawing: dict[str, Any] = {
        "top_p": 0.9,
        "sequence_ids": torch.arange(rows),
        "positions": torch.arange(rows),
    }
    drawing |= {
        "repetition_penalty": torch.full((rows,), 1.5),
        "seen": torch.ones(rows, words, dtype=torch.int32),
    }
    drawing |= {
        "allowed": torch.full((rows, words), -1, dtype=torch.int32),
        "finished": torch.arange(rows) == 1,
    }
    unpaired = {
        "desirable": torch.arange(rows) % 2 == 0,
        "kl": torch.tensor(0.1),
        "reference_logps": floats(rows),
    }
    calls: dict[str, dict[str, Any]] = {
        "cross_entropy": {"logits": floats(*tokens, vocab_size), **cross_entropy},
        "token_logprobs": {"logits": floats(*tokens, vocab_size), "ids": ids(*tokens)},
        "token_stats": {"logits": floats(*tokens, vocab_size), "ids": ids(*tokens)},
        "sum_by_sequence": packed,
        "linear_cross_entropy": {**head, **cross_entropy},
        "linear_cross_entropy_stats": {**head, **cross_entropy},
        "linear_logprobs": {**head, "ids": ids(*tokens)},
        "linear_token_stats": {**head, "ids": ids(*tokens)},
        "linear_ppo_loss": {**head, "ids": ids(*tokens), **policy},
        "linear_dpo_loss": {**head, "ids": ids(*tokens), "reference_logps": floats(rows)},
        "linear_kto_loss": {**head, "ids": ids(*tokens), **unpaired},
        "screen_report": {**head, "targets": ids(*tokens)},
        "tail_report": {**head, "targets": ids(*tokens), "tail_eps": 1e-3},
        "plan_head": {"n_tokens": 4, "hidden_size": 5, "vocab_size": 7},
        "dpo_loss": {**pairs, **references, "loss_type": "sigmoid_norm", **both_lengths},
        "simpo_loss": {**pairs, **both_lengths},
        "orpo_loss": {**pairs, **both_lengths},
        "cpo_loss": {**pairs, "chosen_lengths": lengths()},
        "kto_loss": {"policy_logps": floats(rows), **unpaired},
        "kto_kl": {"policy_mismatched_logps": floats(rows), "reference_mismatched_logps": floats(rows)},
        "reward_loss": {
            "chosen_scores": floats(rows),
            "rejected_scores": floats(rows),
            "margin": floats(rows),
        },
        "ppo_loss": {"logp": floats(*tokens), "entropy": floats(*tokens), **policy},
        "value_loss": {
            "values": floats(*tokens),
            "old_values": floats(*tokens),
            "returns": floats(*tokens),
            "mask": mask,
            "normalizer": torch.tensor(5.0),
        },
        "gae": {
            "rewards": floats(*tokens),
            "values": floats(*tokens),
            "mask": mask,
            "bootstrap": floats(rows),
        },
        "masked_whiten": {"x": floats(*tokens), "mask": mask},
        "sample": {"logits": floats(rows, vocab_size), "seed": 1, **drawing},
    }
    teacher = floats(*tokens, vocab_size).log_softmax(-1).topk(min(3, vocab_size))
    calls["linear_distillation_loss"] = {
        **head,
        "teacher_ids": teacher.indices,
        "teacher_logp": teacher.values,
        "token_weights": cross_entropy["token_weights"],
        "num_items": torch.tensor(3.0),
    }
    return calls[name]


def tensors_of(result: Any) -> list[Any]:
    """The fields of a result, in their order."""
    return list(result) if isinstance(result, tuple) else [result]
