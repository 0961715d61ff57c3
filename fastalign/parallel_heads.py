"""An lm_head that transformers' tensor parallelism has sharded: its rows are a DTensor's, one part a rank.

transformers (`tp_plan`: colwise_gather_output, colwise_rep, colwise) makes lm_head.weight a DTensor with
`Shard(0)` and replaces the module's forward by a function that gathers the logits. The fused head reads the
rows where they are and gathers no logits. It keeps that forward for calls without targets.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

# The attribute in which a fused lm_head keeps the forward that it had.
_FORWARD = "_fastalign_parallel_forward"


def is_parallel(module: nn.Module) -> bool:
    """Whether transformers' tensor parallelism replaced a module's forward."""
    replaced = module.__dict__.get(_FORWARD, module.__dict__.get("forward"))
    return getattr(replaced, "__module__", None) == "transformers.distributed.tensor_parallel"


def keep_forward(module: nn.Module) -> None:
    """Keep a parallel module's forward before another one replaces it."""
    if is_parallel(module) and _FORWARD not in module.__dict__:
        module.__dict__[_FORWARD] = module.__dict__["forward"]


def restore_forward(module: nn.Module) -> None:
    """Undo `keep_forward`."""
    if _FORWARD in module.__dict__:
        module.__dict__["forward"] = module.__dict__.pop(_FORWARD)


@contextmanager
def behind_fused(module: nn.Module) -> Iterator[None]:
    """Inside, a module has its class's forward. What replaces it there is kept behind a fused forward."""
    fused = module.__dict__.pop("forward", None)
    yield
    if fused is not None:
        keep_forward(module)
        module.__dict__["forward"] = fused


def plain_logits(head: nn.Linear, hidden: Tensor) -> Any:
    """What lm_head returns without targets."""
    parallel = head.__dict__.get(_FORWARD)
    return F.linear(hidden, head.weight, head.bias) if parallel is None else parallel(hidden)


def refuse_shards(head: nn.Linear, *, served: bool) -> None:
    """Raise ValueError for rows that are sharded in another way than by tensor parallelism, or not `served`.

    FSDP2's are then other ranks' parameters, for other tokens.
    """
    if isinstance(head.weight, DTensor) and not (served and is_parallel(head)):
        raise ValueError(
            "lm_head.weight: got a DTensor inside lm_head's call, expected a whole weight, or one that "
            "transformers' tensor parallelism sharded and that has no rows replaced"
        )


def whole_logits(head: nn.Module, hidden: Tensor, output: Any) -> Any:
    """The logits of the whole vocabulary; under tp_plan "colwise" lm_head returns those of its rank."""
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    if not isinstance(weight, DTensor) or not isinstance(output, Tensor):
        return output
    if output.shape[-1] == weight.shape[0]:
        return output
    return F.linear(hidden, weight.full_tensor(), bias.full_tensor() if isinstance(bias, DTensor) else bias)
