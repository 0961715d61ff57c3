"""Top-K distillation from hidden states, without the logits in memory.

    hidden [N, H], weight [V, H], a teacher's ids and log-probabilities [N, K]  ->  loss

The gradient of a reduced loss is computed in forward, while the logits exist: 1 + dX + dW GEMMs of 2 N H V
flops (outcome_chunks.py). With reduction="none" and in fp16 the upstream gradients of the tokens come first,
and the logits are recomputed: 2 + dX + dW. outcomes.py has the K + 1 outcomes and the divergences.
"""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from .. import checks
from ..logits import check_loss_tensors, loss_scale, nan_without_tokens, reduced
from ..softmax.rows import accumulator_dtype
from .distillation_ops import head_distillation, head_divergences
from .inputs import head_inputs, local_tensors
from .options import HeadArguments, check_no_screen, check_no_tail, head_keywords, head_options
from .outcomes import DIVERGENCES, check_teacher, first_outcome
from .sharded_agreement import OfLoss


@head_keywords
def linear_distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_ids: Tensor,
    teacher_logp: Tensor,
    bias: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    num_items: float | Tensor | None = None,
    **head: Unpack[HeadArguments],
) -> Tensor:
    """Divergence of a teacher's K ids and the student's softmax, in nats, without the logits in memory.

    All ids but the K are one more outcome, the tail, of mass 1 - sum of the K: for the teacher q and for the
    student p. "forward_kl" is KL(q | p), "reverse_kl" KL(p | q), and "jsd" is (KL(q | m) + KL(p | m)) / 2
    with m = (p + q) / 2. In reverse_kl q's tail is at least 2^-23, fp32's eps (fp64's for fp64 teacher_logp),
    because rounding hides a smaller one. An id to which the teacher gives no mass makes reverse_kl infinite.

    Args:
        hidden, weight, bias: [..., H], [V, H], [V]: the student's.
        teacher_ids: [..., K] int64 or int32, different ids in [0, V). ignore_index is padding, which is no
            outcome; a token of padding alone is ignored.
        teacher_logp: [..., K], the teacher's log-probabilities in nats under its whole softmax; any float
            dtype, without gradient. A mass above 1, by rounding, is divided out; above 1.05 it is refused.
        reduction, token_weights, num_items: as in `linear_cross_entropy`.
        **head: `HeadArguments` documents these keywords; tail_eps is refused, gradients are exact.

    Returns:
        A scalar, or [...] with reduction="none": fp32, fp64 for fp64. NaN where there is nothing to average.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range, or is no option's name.
    """
    options = head_options(linear_distillation_loss, head)
    checks.choice("divergence", divergence, tuple(DIVERGENCES))
    checks.choice("reduction", reduction, ("mean", "sum", "none"))
    check_no_tail(options, "linear_distillation_loss")
    check_no_screen(options, "linear_distillation_loss")
    checks.tensors(teacher_ids=teacher_ids)
    options = options._replace(loss=OfLoss(reduction))
    hidden, weight, bias, options = local_tensors(hidden, weight, bias, lambda: teacher_ids, options)
    ids = check_teacher(hidden, weight, teacher_ids, teacher_logp, options)
    first = first_outcome(ids >= 0, ids)[..., 0]
    check_loss_tensors(first, reduction, token_weights, num_items)
    marked = options._replace(ignore_index=-1)
    inputs = head_inputs(hidden, weight, first, bias, marked, ids_name="teacher_ids").lean()
    K, dtype = ids.shape[-1], accumulator_dtype(inputs.hidden.dtype)
    teacher = ids.view(-1, K), teacher_logp.detach().reshape(-1, K)
    scale = loss_scale(inputs.ids >= 0, reduction, token_weights, num_items, dtype)
    needs = inputs.needs_grad()
    if reduction == "none" or inputs.mode("scalar") == "general":
        losses = head_divergences(inputs, needs, *teacher, divergence)
        return reduced(losses, scale, reduction, num_items, first.shape)
    total, *_ = head_distillation(inputs, needs, *teacher, scale, divergence)
    return nan_without_tokens(total, inputs.ids.numel(), reduction, num_items)
