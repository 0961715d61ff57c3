"""OpenRLHF's actor through fastalign's head.

    from fastalign.integrations import openrlhf
    openrlhf.patch()

`Actor.forward` makes logits in fp32, divides them by the temperature and takes log-probabilities and the
entropy from them. With the patch its model is fused (`fuse_head`) and gets the targets. It returns both
without logits, and `Actor.forward` finds them where the logits were. This serves OpenRLHF's SFT, DPO and RL
trainers. Each of Ray's worker processes needs the patch. OpenRLHF's functions still run, with one warning,
for a model that `fuse_head` refuses and for weights that DeepSpeed's ZeRO-3 shards.
"""

import importlib
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import hosts
from .hosts import PatchedHost
from .published import OPENRLHF

HOST = "openrlhf"


def patch(*, tail_eps: float | None = None, workspace_mib: float | None = None) -> PatchedHost:
    """Let OpenRLHF's actor score tokens by fastalign's head. Patching twice changes nothing.

    Args:
        tail_eps, workspace_mib: those of `linear_token_stats`, for every call.
    Returns:
        A handle: `calls` counts the actor's calls, `unpatch()` or the end of a `with` block undoes the patch
        and unfuses the models.
    Raises:
        UnsupportedHostError: a version of OpenRLHF that fastalign was not tested with, or other parameters.
        ModuleNotFoundError: OpenRLHF is not installed.
    """
    options = {"tail_eps": tail_eps, "workspace_mib": workspace_mib}
    if (handle := PatchedHost.current(HOST, options)) is not None:
        return handle
    hosts.check_published(OPENRLHF)
    actors: Any = importlib.import_module("openrlhf.models.actor")
    strategy: Any = importlib.import_module("openrlhf.utils.deepspeed.deepspeed").DeepspeedStrategy

    handle = PatchedHost(HOST, options)
    scoring = _Scoring(handle)
    handle.replace(actors.Actor, "forward", scoring.forward_of(actors.Actor.forward))
    for name, field in (("log_probs_from_logits", "logp"), ("compute_entropy", "entropy")):
        handle.replace(actors, name, _reading(field, getattr(actors, name)))
    unpad = actors.unpad_and_slice_tensor
    handle.replace(actors, "unpad_and_slice_tensor", scoring.noting_packed_targets(unpad))
    handle.warn_without_calls(
        strategy,
        "optimizer_step",
        "The actor's model cannot be fused, or it was called without log-probabilities.",
        applies=lambda strategy, optimizer, model, *_: isinstance(model, actors.Actor),
    )
    return handle


def unpatch() -> None:
    """Give OpenRLHF its own functions back. Does nothing if it is not patched."""
    hosts.unpatch(HOST)


@dataclass
class _Scores:
    """Stands where an output's logits were.

    Its model had the actor's temperature already, so the actor must divide by it, once, before it reads.
    """

    logp: Tensor
    entropy: Tensor
    unscaled: float  # the temperature, until the actor divides by it; then 1

    def to(self, dtype: torch.dtype) -> "_Scores":
        return self

    def div_(self, temperature: float) -> "_Scores":
        if temperature != self.unscaled:
            raise _other_forward(f"logits divided by {temperature}, expected by {self.unscaled}")
        self.unscaled = 1.0
        return self

    def read(self, field: str) -> Tensor:
        """logp or entropy, [B, T]."""
        if self.unscaled != 1.0:
            raise _other_forward(f"{field} of undivided logits, expected them divided by {self.unscaled}")
        scores: Tensor = getattr(self, field)
        return scores

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"logits.{name}: got a model fused by fastalign.integrations.openrlhf, which makes no logits, "
            "expected a reader of log-probabilities and entropy"
        )


def _other_forward(seen: str) -> hosts.UnsupportedHostError:
    return hosts.UnsupportedHostError(
        f"openrlhf: got {seen}: this Actor.forward is not the one that fastalign was tested with"
    )


def _reading(field: str, original: Any) -> Any:
    """The host's function of logits, or what the fused model computed instead of them."""
    signature = inspect.signature(original)

    def read(logits: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(logits, _Scores):
            return original(logits, *args, **kwargs)
        temperature = signature.bind(logits, *args, **kwargs).arguments.get("temperature", 1.0)
        return (logits if temperature == 1.0 else logits.div_(temperature)).read(field)

    return read


class _Scoring:
    """Gives the actor's model the targets of the call of `Actor.forward` that runs now."""

    def __init__(self, handle: PatchedHost) -> None:
        self.handle = handle
        self.targets: Tensor | None = None

    def forward_of(self, original: Any) -> Any:
        from .fused_models import fuse_served

        signature = inspect.signature(original)

        def forward(actor: Any, *args: Any, **kwargs: Any) -> Any:
            asked = signature.bind(actor, *args, **kwargs).arguments
            scored = asked.get("action_mask") is not None or asked.get("return_logprobs")
            if not scored or not fuse_served(self.handle, actor.model):
                return original(actor, *args, **kwargs)
            self.handle.count()
            with self._scoring(actor, torch.roll(asked["sequences"], -1, 1)):
                return original(actor, *args, **kwargs)

        return forward

    def noting_packed_targets(self, original: Any) -> Any:
        def unpad_and_slice_tensor(*args: Any, **kwargs: Any) -> Any:
            packed = original(*args, **kwargs)
            self.targets = packed[2]
            return packed

        return unpad_and_slice_tensor

    @contextmanager
    def _scoring(self, actor: Any, targets: Tensor) -> Iterator[None]:
        """While this lasts, the actor's model scores `targets` and returns `_Scores` as its logits."""

        def add_targets(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            options = {
                "token_stats": True,
                "temperature": actor.temperature,
                "workspace_mib": self.handle.options["workspace_mib"],
            }
            return args, kwargs | {"shift_labels": self.targets} | options

        def replace_logits(model: Any, args: Any, kwargs: Any, output: Any) -> None:
            output["logits"] = _Scores(output.logp, output.entropy, unscaled=actor.temperature)

        self.targets = targets
        with ExitStack() as undo:
            undo.callback(setattr, self, "targets", None)
            before = actor.model.register_forward_pre_hook(add_targets, with_kwargs=True)
            undo.callback(before.remove)
            undo.callback(actor.model.register_forward_hook(replace_logits, with_kwargs=True).remove)
            yield
