"""What a step's metrics say of the fused head's approximations, `tail_eps` and `screen`."""

from __future__ import annotations

from fastalign_kernels import kept_share, screen_counts


def reset_counts() -> None:
    """Forget what was counted so far, such as an evaluation's passes."""
    kept_share()
    screen_counts()


def head_counts() -> dict[str, float]:
    """What tails and screens kept in all passes and rollouts of this process since the last call.

    kept_share: of a tail's columns. Of a screen, exact_tokens: the share of tokens that were computed
    exactly; exact_columns: the exact logits of each of the rest; open_tokens: the share that its bound left
    open, if there are any. What did not run is absent.
    """
    share, screened = kept_share(), screen_counts()
    found = {} if share is None else {"kept_share": share}
    if not screened.tokens:
        return found
    found["screen/exact_tokens"] = screened.exact_tokens / screened.tokens
    if here := screened.tokens - screened.exact_tokens:
        found["screen/exact_columns"] = screened.exact_columns / here
    if screened.open_tokens:
        found["screen/open_tokens"] = screened.open_tokens / screened.tokens
    return found
