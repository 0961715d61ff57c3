"""What a causal LM does between its lm_head and its loss: declared by its config, proven on ten tokens.

`explain_loss` runs a model's own forward and finds the transform that explains its logits and its loss.
`check_fused` then runs the same tokens through the fused head and compares. Both compare in fp64. A
difference that rounding cannot explain is an UnsupportedModelError.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from .finite import find_not_finite
from .parallel_heads import whole_logits
from .versions import newer_than_tested

# Names in configs; `logits_scaling` divides (Granite), but not in HyperCLOVA-X.
_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
# The largest random logit. With logits of an untrained model's size, rounding would hide a softcap of 30.
_LARGEST = 64.0


class UnsupportedModelError(ValueError):
    """The fused head cannot compute the model's loss exactly. The message says why."""


def unsupported(model: nn.Module, fault: str, *, expected: str) -> UnsupportedModelError:
    """The UnsupportedModelError that names the model's class, and packages newer than those tested.

    `fault` continues "got a Llama, which".
    """
    refusal = f"model: got {type(model).__name__}, which {fault}, expected {expected}"
    return UnsupportedModelError("; ".join([refusal, *newer_than_tested()]))


class LogitTransform(NamedTuple):
    """What a model does to lm_head's output: z·logit_scale, then softcap·tanh(z/softcap)."""

    logit_scale: float
    softcap: float | None

    def __call__(self, z: Tensor) -> Tensor:
        z = z * self.logit_scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def declared_transforms(model: PreTrainedModel) -> list[LogitTransform]:
    """The transform that the config declares, then the same without parts that a model may not apply."""
    config = model.config.get_text_config()
    divides = not config.model_type.startswith("hyperclovax")
    scale = 1.0
    for name in _SCALES:
        value = getattr(config, name, None)
        if isinstance(value, int | float):
            scale *= 1 / value if name == "logits_scaling" and divides else value
    softcap = next((float(cap) for name in _SOFTCAPS if (cap := getattr(config, name, None))), None)
    return list(dict.fromkeys(LogitTransform(s, c) for s in (scale, 1.0) for c in (softcap, None)))


@contextmanager
def probing(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients. Training flags, RNG and FSDP2's shards are restored afterwards.

    After a forward pass FSDP2 leaves the parameters of its root gathered, for the backward pass. An optimizer
    made then would hold the gathered copies, and would never train the embedding, the norm and the head.
    A model that is wholly gathered stays so.
    """
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    sharded = any(isinstance(weight, DTensor) for weight in model.parameters())
    training = [module for module in model.modules() if module.training]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True
            for module in shards if sharded else ():
                module.reshard()


class Explained(NamedTuple):
    """A model's own forward on ten tokens: its arguments, lm_head's input and output, and what follows it."""

    inputs: dict[str, Any]
    hidden: Tensor
    output: Tensor
    transform: LogitTransform

    @property
    def targets(self) -> Tensor:
        return F.pad(self.inputs["labels"], (0, 1), value=-100)[..., 1:].flatten().cpu()


def explain_loss(model: PreTrainedModel, head: nn.Linear) -> Explained:
    """Run the model's own forward, and find the declared transform that explains its logits and its loss.

    The forward continues from lm_head with random logits up to ±64. Tolerances are in roundings of the
    model's dtype: the transform rounds up to four times, by eps/2 each; the loss is accumulated in fp32.
    Call it within `probing`.
    """
    inputs = _arguments(model, head)
    with _recorded_head(model, randomize=True) as calls:
        output = model(**inputs)
    logits, loss = getattr(output, "logits", None), getattr(output, "loss", None)
    if len(calls) != 1 or loss is None or logits is None or logits.shape != calls[0].used.shape:
        raise _inexact(
            model, f"{len(calls)} calls of lm_head, not one that ends in a loss and logits of its shape"
        )
    [call] = calls
    differences = {t: _largest_difference(t(_exact(call.used)), logits) for t in declared_transforms(model)}
    served = [t for t, difference in differences.items() if difference <= 4 * _eps(logits) * _LARGEST]
    if not served:
        tried = ", ".join(f"{difference:.3g} from {t}" for t, difference in differences.items())
        raise _inexact(model, f"logits that differ by {tried}, given lm_head outputs up to {_LARGEST:g}")
    explained = Explained(inputs, call.hidden, call.output, served[0])
    what = "a loss that differs from the cross-entropy of its logits"
    _compare(model, what, loss, _nll(logits, explained.targets), _loss_rounding(_LARGEST))
    return explained


def check_fused(model: PreTrainedModel, explained: Explained) -> None:
    """Raise unless a fused model's loss is that of its own forward. Call it within `probing`."""
    with _recorded_head(model) as calls:
        try:
            fused = model(**explained.inputs)
        except ValueError as error:  # for example hidden states of another width
            raise _inexact(model, f"a head that does not take its backbone's output: {error}") from error
    # The backbone ran twice and must repeat itself.
    what = "an lm_head whose input differs from its backbone's output"
    size = explained.hidden.abs().max().item()
    _compare(model, what, explained.hidden, calls[0].hidden, _eps(explained.hidden) * size)
    expected, size = (
        _nll(explained.transform(_exact(explained.output)), explained.targets),
        explained.output.abs().max().item(),
    )
    rounding = 8 * _eps(explained.output) * size + _loss_rounding(size + expected.item())
    _compare(model, "a fused loss that differs from its plain one", fused.loss, expected, rounding)


def _arguments(model: PreTrainedModel, head: nn.Linear) -> dict[str, Any]:
    """Two rows of five ids. One label is ignored, and one that counts lies behind the attention mask."""
    vocab_size = min(model.config.get_text_config().vocab_size, head.out_features)
    ids = torch.randint(vocab_size, (2, 5), generator=torch.Generator().manual_seed(0))
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, 4], labels[0, 2] = 0, -100
    tensors = {"input_ids": ids, "labels": labels}
    if "attention_mask" in inspect.signature(model.forward).parameters:
        tensors["attention_mask"] = mask
    return {name: tensor.to(model.device) for name, tensor in tensors.items()}


class _HeadCall(NamedTuple):
    """One call of lm_head: its input, its output, and what the model was given as output."""

    hidden: Tensor
    output: Any
    used: Any


@contextmanager
def _recorded_head(model: PreTrainedModel, *, randomize: bool = False) -> Iterator[list[_HeadCall]]:
    """Collect the calls of lm_head. With `randomize`, the model continues with random logits."""
    calls: list[_HeadCall] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
        given, output = output, whole_logits(module, inputs[0], output)
        if not randomize:
            calls.append(_HeadCall(inputs[0], output, output))
            return given
        used = torch.rand(output.shape, generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1)
        used = used.mul_(_LARGEST).to(output)
        calls.append(_HeadCall(inputs[0], output, used))
        return used.clone()  # some models write into their logits

    handle = model.get_output_embeddings().register_forward_hook(record)
    try:
        yield calls
    finally:
        handle.remove()


def _compare(model: PreTrainedModel, what: str, found: Tensor, expected: Tensor, rounding: float) -> None:
    difference = _largest_difference(found, expected)
    if not difference <= rounding:  # NaN is a mismatch
        raise _inexact(model, f"{what} by {difference:.3g}, of which rounding explains {rounding:.3g}")


def _inexact(model: PreTrainedModel, why: str) -> ValueError:
    if wrong := find_not_finite(model.state_dict().items()):
        return ValueError(f"model: got {type(model).__name__}, of which {wrong}, expected finite numbers")
    return unsupported(model, f"has {why}", expected="one that the fused head serves exactly")


def _largest_difference(found: Tensor, expected: Tensor) -> float:
    return (_exact(found) - _exact(expected)).abs().max().item()


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(_exact(logits).flatten(0, 1), targets)


def _loss_rounding(size: float) -> float:
    return 16 * torch.finfo(torch.float32).eps * size


def _exact(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", torch.float64)  # on the CPU, because not every accelerator has fp64


def _eps(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps
