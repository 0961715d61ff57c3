"""Rotary position embeddings whose frequencies depend on the longest sequence of a forward pass.

transformers' LongRoPE (Phi-3) has one set of frequencies up to `original_max_position_embeddings` and
another beyond. Dynamic NTK stretches them beyond `max_position_embeddings`. The largest position of the
whole batch decides, for every row and for later tokens, while a cache keeps keys with the frequencies of
their time. So a sequence's numbers would depend on its batch, and a rollout's on when it crosses the
switch.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple


class RopeSwitch(NamedTuple):
    """Up to `tokens` tokens in the longest sequence of a forward pass, the frequencies are the same."""

    kind: str
    tokens: int
    name: str
    """The name of the number in the configuration."""
    stretches: bool
    """Whether each larger length has frequencies of its own."""

    def crossed_by(self, shortest: int, longest: int) -> bool:
        """Whether sequences of these lengths, in one forward pass, would not keep their own frequencies."""
        return longest > self.tokens and (self.stretches or shortest <= self.tokens)

    def __str__(self) -> str:
        return f"{self.tokens} tokens ({self.name} of its {self.kind} RoPE)"


def rope_switch(config: Any) -> RopeSwitch | None:
    """The lowest switch of a transformers configuration; None if frequencies do not depend on the length."""
    text = config.get_text_config(decoder=True)
    parameters = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    # The parameters of each kind of layer, as in Gemma 3
    by_layer = [part for part in parameters.values() if isinstance(part, dict)]
    switches = [switch for part in by_layer or [parameters] if (switch := _switch(text, part))]
    return min(switches, key=lambda switch: switch.tokens, default=None)


def _switch(text: Any, parameters: dict[str, Any]) -> RopeSwitch | None:
    kind = str(parameters.get("rope_type", parameters.get("type", "default")))
    if "dynamic" in kind:
        return RopeSwitch(kind, text.max_position_embeddings, "max_position_embeddings", stretches=True)
    if kind == "longrope":
        name = "original_max_position_embeddings"
        tokens = parameters.get(name) or getattr(text, name, None) or text.max_position_embeddings
        return RopeSwitch(kind, tokens, name, stretches=False)
    return None


def check_lengths(config: Any, lengths: Iterable[int], *, remedy: str) -> None:
    """Raise ValueError if sequences of these lengths would change each other's frequencies.

    The lengths are tokens of sequences in one forward pass.
    """
    switch = rope_switch(config)
    if switch is None:
        return
    found = sorted(set(lengths))
    if found and switch.crossed_by(found[0], found[-1]):
        raise ValueError(
            f"got sequences of {found[0]} to {found[-1]} tokens for one forward pass, expected all on one "
            f"side of {switch}, because {config.model_type} computes all of them with the "
            f"frequencies of the longest: {remedy}"
        )
