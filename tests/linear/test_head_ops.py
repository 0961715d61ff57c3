"""How torch sees the ops on the head, which head_ops.py derives from HeadInputs, NeedsGrad and Gradients."""

import pytest
import torch
from torch import Tensor

from fastalign_kernels.linear.engine import Gradients
from fastalign_kernels.linear.head_ops import OpCall, register_head_loss
from fastalign_kernels.linear.inputs import HEAD, HeadInputs, NeedsGrad
from fastalign_kernels.linear.options import HeadOptions

OF_THE_HEAD = (*HeadInputs._fields, "needs")
OPS = {
    "head_stats": (),
    "head_stats_saving": (),
    "head_stats_grad": ("grad", "stats", "saved"),
    "head_frozen": ("origin",),
    "head_loss": ("scale", "fills_scale_late", "label_smoothing", "z_loss"),
    "head_policy": ("old_logp", "advantages", "scale", "reference_logp", "policy_numbers"),
    "head_pairs": ("cu_seqlens", "reference", "lengths", "loss_type", "beta", "label_smoothing"),
    "head_unpaired": ("cu_seqlens", "reference", "desirable", "kl", "weights"),
    "head_distillation": ("teacher_ids", "teacher_logp", "scale", "divergence"),
    "head_divergences": ("teacher_ids", "teacher_logp", "divergence"),
    "kept_stats": ("offsets", "kept"),
    "kept_stats_grad": ("offsets", "kept", "grad", "raw"),
}


@pytest.mark.parametrize("name", OPS)
def test_an_op_takes_the_head_and_then_the_rest_of_its_body(name: str) -> None:
    schema = getattr(torch.ops.fastalign, name).default._schema
    assert tuple(argument.name for argument in schema.arguments) == (*OF_THE_HEAD, *OPS[name])


def test_one_list_says_what_gets_a_gradient() -> None:
    assert HEAD == NeedsGrad._fields == Gradients._fields and set(HEAD) < set(HeadInputs._fields)
    outputs = len(torch.ops.fastalign.head_pairs.default._schema.returns)
    assert outputs == 2 + len(HEAD) == len(torch.ops.fastalign.head_stats_grad.default._schema.returns) + 2


def test_a_call_survives_the_op() -> None:
    inputs = HeadInputs(torch.ones(2, 3), torch.ones(5, 3), torch.zeros(2).long(), None, HeadOptions(0.5))
    call = OpCall(inputs, NeedsGrad(weight=True), ("rest", 1.5))
    assert OpCall.of(call.arguments()) == call


def test_a_name_of_the_head_is_refused_in_the_rest() -> None:
    def body(inputs: HeadInputs, needs: NeedsGrad, options: float) -> tuple[Tensor, ...]:
        raise AssertionError

    with pytest.raises(TypeError, match="body: got parameters {'options'}, expected other names"):
        register_head_loss("never", body, body, losses="none")
