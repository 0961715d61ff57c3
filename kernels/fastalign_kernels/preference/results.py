"""What the preference losses return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PreferenceLoss(NamedTuple):
    """The loss and the rewards of pairs.

    loss: a scalar, or [S] with reduction="none".
    chosen_rewards, rejected_rewards: [S], beta * log-ratio, without gradient.
    """

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


class UnpairedLoss(NamedTuple):
    """The loss and the rewards of completions.

    loss: a scalar, or [S] with reduction="none".
    rewards: [S], beta * log-ratio, without gradient.
    """

    loss: Tensor
    rewards: Tensor


class RewardLoss(NamedTuple):
    """The loss of a reward model and two metrics without gradient. All are scalars.

    accuracy: the share of pairs whose chosen score is higher.
    mean_margin: the mean of chosen - rejected.
    """

    loss: Tensor
    accuracy: Tensor
    mean_margin: Tensor
