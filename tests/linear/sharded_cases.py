"""Calls of every function of the head, on a whole weight or on the rows of one rank, and plain PyTorch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign_kernels import (
    linear_cross_entropy,
    linear_cross_entropy_stats,
    linear_distillation_loss,
    linear_dpo_loss,
    linear_kto_loss,
    linear_logprobs,
    linear_ppo_loss,
    linear_token_stats,
)
from fastalign_kernels.linear import reference
from fastalign_kernels.linear.token_outputs import linear_token_outputs
from fastalign_kernels.policy.reference import ppo_loss_ref
from fastalign_kernels.preference.reference import dpo_loss_ref, kto_loss_ref

N, H, V, K = 36, 19, 123, 5
ROWS = 4  # sequences of 9 tokens; pairs (0, 2) and (1, 3)
CAPPED: dict[str, Any] = {"softcap": 5.0, "logit_scale": 0.7, "temperature": 1.3}
TIGHT = 0.004  # MiB: 4 tokens of fp64 logits at V = 123


class Data(NamedTuple):
    """Everything that a case reads, of one dtype; the weights are whole or one rank's rows."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor  # [V]
    reference_hidden: Tensor  # [N, H]
    reference_weight: Tensor  # [V, H]
    ids: Tensor  # [N]
    values: Tensor  # [4, N]: token weights, old log-probabilities, advantages, reference log-probabilities
    teacher: Tensor  # [N, K] log-probabilities
    teacher_ids: Tensor  # [N, K]
    kept: tuple[Tensor, Tensor]
    lora_a: Tensor  # [2, H]
    lora_b: Tensor  # [V, 2]

    @classmethod
    def drawn(cls, dtype: torch.dtype) -> Data:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        weight, ids = normal(V, H), torch.randint(V, (N,), generator=generator)
        hidden = 0.3 * normal(N, H)
        hidden[: N // 2] += weight[ids[: N // 2]] / 4  # peaked
        ids[3::7] = -100
        values = normal(4, N)
        values[1], values[3] = values[1] / 4 - 4, values[3] / 4 - 4
        order = torch.stack([torch.randperm(V, generator=generator) for _ in range(N)])
        teacher_ids = order[:, :K].masked_fill((ids < 0)[:, None], -100)
        teacher_ids[1, 0] = teacher_ids[2, 1] = -100
        teacher = torch.randn(N, V, generator=generator).log_softmax(-1).gather(1, order[:, :K])
        sets = [
            torch.unique(torch.cat([order[n, : 3 + n % 9], ids[n : n + 1]])) if ids[n] >= 0 else ids[:0]
            for n in range(N)
        ]
        offsets = torch.tensor([0, *(len(x) for x in sets)]).cumsum(0)
        bias, reference_hidden, reference_weight = normal(V), normal(N, H) / 2, normal(V, H)
        kept = offsets, torch.cat(sets)
        return cls(
            hidden, weight, bias, reference_hidden, reference_weight, ids, values.float(), teacher,
            teacher_ids, kept, normal(2, H), normal(V, 2),
        )  # fmt: skip

    def of_rows(self, rows: slice) -> Data:
        """With the rows of one rank."""
        return self._replace(
            weight=self.weight[rows].clone(),
            bias=self.bias[rows].clone(),
            reference_weight=self.reference_weight[rows].clone(),
            lora_b=self.lora_b[rows].clone(),
        )

    def trained(self, names: Sequence[str]) -> Data:
        return self._replace(
            **{name: getattr(self, name).detach().clone().requires_grad_() for name in names}
        )


Call = Callable[..., Any]  # (data, **head options) -> a tensor, or a tuple of tensors


class Case(NamedTuple):
    """A call, the same in plain PyTorch (None: ours on a whole weight), and its options."""

    ours: Call
    plain: Call | None
    options: dict[str, Any]
    trained: tuple[str, ...] = ("hidden", "weight", "bias")


# Each call has the head's options as keywords; `tensors` takes the head's own tensors first.


def tensors(data: Data) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return data.hidden, data.weight, data.ids, data.bias


def cross_entropy(function: Call) -> Call:
    def call(data: Data, *, weighted: bool = False, **options: Any) -> Tensor:
        weights = data.values[0].abs() if weighted else None
        return function(*tensors(data), token_weights=weights, **options)

    return call


def of_tokens(function: Call) -> Call:
    return lambda data, **options: function(*tensors(data), **options)


def logprobs(data: Data, **options: Any) -> Tensor:
    return linear_logprobs(*tensors(data), **options)


def plain_logprobs(data: Data, **options: Any) -> Tensor:
    return reference.linear_token_stats_ref(*tensors(data), **options).logp


def outputs(data: Data, **options: Any) -> Any:
    return linear_token_outputs(
        *tensors(data), entropy=True, log_sum_sq_probs=True, mean_logit=True, top1=True, **options
    )


def ppo(data: Data, *, kept: bool = False, **options: Any) -> Any:
    _, old_logp, advantages, reference_logp = data.values
    mask = torch.arange(N) % 5 != 1
    return linear_ppo_loss(
        data.hidden, data.weight, data.ids, old_logp, advantages, mask, data.bias,
        reference_logp=reference_logp, kept=data.kept if kept else None, entropy_coefficient=0.2,
        kl_coefficient=0.3, **options,
    )  # fmt: skip


def plain_ppo(data: Data, *, kept: bool = False, **options: Any) -> Any:
    _, old_logp, advantages, reference_logp = data.values
    mask = (torch.arange(N) % 5 != 1) & (data.ids >= 0)
    if kept:
        logp, entropy = reference.linear_kept_stats_ref(*tensors(data), kept=data.kept, **options)
    else:
        found = reference.linear_token_stats_ref(*tensors(data), **options)
        assert found.entropy is not None
        logp, entropy = found.logp, found.entropy
    return ppo_loss_ref(
        logp, old_logp, advantages, mask, entropy=entropy, reference_logp=reference_logp,
        entropy_coefficient=0.2, kl_coefficient=0.3,
    )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    return x.view(ROWS, N // ROWS, *x.shape[1:])


def dpo(data: Data, **options: Any) -> Any:
    return linear_dpo_loss(
        _rows(data.hidden), data.weight, _rows(data.ids), data.bias,
        reference_hidden=_rows(data.reference_hidden), reference_weight=data.reference_weight, **options,
    )[::3]  # fmt: skip


def _sums(data: Data, **options: Any) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the rows, of the policy and of the reference."""
    policy = plain_logprobs(data, **options).view(ROWS, -1).sum(1)
    of_reference = data._replace(
        hidden=data.reference_hidden, weight=data.reference_weight, bias=torch.zeros_like(data.bias)
    )
    return policy, plain_logprobs(of_reference, **options).view(ROWS, -1).sum(1)


def plain_dpo(data: Data, *, loss_type: str = "sigmoid", **options: Any) -> tuple[Tensor, Tensor]:
    policy, known = _sums(data, **options)
    tokens = (data.ids >= 0).view(ROWS, -1).sum(1)
    lengths: dict[str, Any] = {}
    if loss_type == "ipo":
        lengths = {"chosen_lengths": tokens[:2], "rejected_lengths": tokens[2:]}
    loss = dpo_loss_ref(policy[:2], policy[2:], known[:2], known[2:], loss_type=loss_type, **lengths).loss
    return loss, policy[:2].detach()


def _desirable() -> tuple[Tensor, Tensor]:
    return torch.tensor([True, False, False, True]), torch.tensor(0.4)


def kto(data: Data, **options: Any) -> Any:
    return linear_kto_loss(
        _rows(data.hidden), data.weight, _rows(data.ids), *_desirable(), data.bias,
        reference_hidden=_rows(data.reference_hidden), reference_weight=data.reference_weight, **options,
    )[::2]  # fmt: skip


def plain_kto(data: Data, **options: Any) -> tuple[Tensor, Tensor]:
    policy, known = _sums(data, **options)
    return kto_loss_ref(policy, known, *_desirable()).loss, policy.detach()


def distillation(function: Call) -> Call:
    return lambda data, **options: function(
        data.hidden, data.weight, data.teacher_ids, data.teacher, data.bias, **options
    )


def kept_logprobs(data: Data, **options: Any) -> Tensor:
    return linear_logprobs(*tensors(data), kept=data.kept, **options)


def plain_kept_logprobs(data: Data, **options: Any) -> Tensor:
    return reference.linear_kept_stats_ref(*tensors(data), kept=data.kept, **options)[0]


def with_lora(call: Call) -> Call:
    return lambda data, **options: call(data, lora=(data.lora_a, data.lora_b, 0.5), **options)


def merged(call: Call) -> Call:
    """Plain PyTorch's: of a weight that has the adapter in it."""
    return lambda data, **options: call(
        data._replace(weight=data.weight + 0.5 * data.lora_b @ data.lora_a), **options
    )


CE = cross_entropy(linear_cross_entropy), cross_entropy(reference.linear_cross_entropy_ref)
STATS = of_tokens(linear_token_stats), of_tokens(reference.linear_token_stats_ref)
DISTILLATION = distillation(linear_distillation_loss), distillation(reference.linear_distillation_loss_ref)
ALL = {"label_smoothing": 0.1, "z_loss": 0.01, "weighted": True, "num_items": 7.0, **CAPPED}
HIDDEN, WEIGHT = ("hidden",), ("weight", "bias")
LORA = ("hidden", "lora_a", "lora_b")

CASES: dict[str, Case] = {
    "cross-entropy": Case(*CE, {}),
    "cross-entropy, all options": Case(*CE, ALL),
    "cross-entropy, sum": Case(*CE, {"reduction": "sum", "label_smoothing": 0.3}),
    "cross-entropy, none": Case(*CE, {"reduction": "none", "label_smoothing": 0.2, "softcap": 5.0}),
    "cross-entropy, frozen head": Case(*CE, ALL, HIDDEN),
    "cross-entropy, frozen hidden": Case(*CE, ALL, WEIGHT),
    "cross-entropy, no gradient": Case(*CE, ALL, ()),
    "cross-entropy, stats": Case(of_tokens(linear_cross_entropy_stats), None, {"label_smoothing": 0.1}),
    "logprobs": Case(logprobs, plain_logprobs, CAPPED),
    "logprobs, frozen head": Case(logprobs, plain_logprobs, {"temperature": 0.7}, HIDDEN),
    "logprobs, no gradient": Case(logprobs, plain_logprobs, {}, ()),
    "logprobs, negative scale": Case(logprobs, plain_logprobs, {"logit_scale": -0.4}),
    "stats": Case(*STATS, {}),
    "stats, all options": Case(*STATS, CAPPED),
    "stats, frozen head": Case(*STATS, CAPPED, HIDDEN),
    "outputs": Case(outputs, None, {"temperature": 0.7}),
    "outputs, softcap": Case(outputs, None, CAPPED),
    "ppo": Case(ppo, plain_ppo, {"temperature": 1.3}),
    "ppo, frozen head": Case(ppo, plain_ppo, {}, HIDDEN),
    "ppo, kept sets": Case(lambda d, **k: ppo(d, kept=True, **k), lambda d, **k: plain_ppo(d, kept=True, **k),
                           CAPPED),
    "dpo": Case(dpo, plain_dpo, {}),
    "dpo, ipo": Case(dpo, plain_dpo, {"loss_type": "ipo", "softcap": 5.0}),
    "dpo, frozen head": Case(dpo, plain_dpo, {}, HIDDEN),
    "kto": Case(kto, plain_kto, {}),
    "kto, frozen head": Case(kto, plain_kto, CAPPED, HIDDEN),
    "distillation": Case(*DISTILLATION, {}),
    "distillation, reverse": Case(*DISTILLATION, {"divergence": "reverse_kl", **CAPPED}),
    "distillation, jsd": Case(*DISTILLATION, {"divergence": "jsd", "temperature": 0.7, "reduction": "sum"}),
    "distillation, none": Case(*DISTILLATION, {"reduction": "none", "softcap": 5.0}),
    "logprobs, kept sets": Case(kept_logprobs, plain_kept_logprobs, CAPPED),
    "cross-entropy, lora": Case(with_lora(CE[0]), merged(CE[1]), ALL, LORA),
    "logprobs, lora": Case(with_lora(logprobs), merged(plain_logprobs), {}, LORA),
    "logprobs, lora and weight": Case(
        with_lora(logprobs), merged(plain_logprobs), CAPPED, ("hidden", "weight", "bias", "lora_a", "lora_b")
    ),
    "logprobs, kept sets, lora": Case(with_lora(kept_logprobs), merged(plain_kept_logprobs), {}, LORA),
    "logprobs, kept sets, frozen head": Case(kept_logprobs, plain_kept_logprobs, {}, HIDDEN),
}  # fmt: skip


class Result(NamedTuple):
    outputs: list[Tensor]
    gradients: list[Tensor]  # of those that are trained


def run(case: Case, data: Data, *, plain: bool = False, **more: Any) -> Result:
    """The outputs and the gradients of a sum of all outputs, each times some numbers."""
    data = data.trained(case.trained)
    call = case.plain if plain and case.plain is not None else case.ours
    found = call(data, **case.options, **more)
    outputs = [x for x in (found if isinstance(found, tuple) else (found,)) if x is not None]
    total = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        if output.requires_grad:
            upstream = torch.linspace(-1, 2, max(2, output.numel()), dtype=output.dtype)[: output.numel()]
            total = total + (output * upstream.view(output.shape)).sum().double()
    trained = [getattr(data, name) for name in case.trained]
    gradients = torch.autograd.grad(total, trained) if trained else ()
    return Result([x.detach() for x in outputs], list(gradients))
