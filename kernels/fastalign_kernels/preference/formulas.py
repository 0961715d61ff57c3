"""The losses of a pair of completions, one small function each: DPO and its kin.

With c = log pi - log pi_ref of the chosen completion and r of the rejected one, sums over their tokens in
nats, each is a formula

    (c, r, beta, label_smoothing) -> (loss, d loss / dc, d loss / dr)

that a CPU evaluates on vectors and Triton compiles into its kernel (preference/losses_triton.py). To add a
loss, write its formula here. Then add a line to `PAIR_LOSSES`, and one to `PAIR_REFERENCES` of
reference.py. CONTRIBUTING.md has the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, exp, expm1, log, sigmoid, where


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) = -log s(-x). F.softplus returns x above 20, which is wrong by 2e-9."""
    return -F.logsigmoid(-x)


# The formulas. Triton compiles their source too (preference/losses_triton.py). So they have no annotations,
# and they call only softplus, sigmoid, exp, expm1, log and where. s is the logistic function,
# x = beta (c - r), and e the label smoothing. s (1 - s) is written s(x) s(-x), which cannot cancel.


def logistic(c, r, beta, e):
    """-(1 - e) log s(x) - e log s(-x). DPO (2305.18290, eq. 7); e > 0 is cDPO (Mitchell 2023)."""
    x = beta * (c - r)
    d = beta * (e - sigmoid(-x))
    sure = softplus(-x)
    return where(e == 0, sure, (1 - e) * sure + e * softplus(x)), d, -d  # 0 * inf is NaN


def hinge(c, r, beta, e):
    """max(0, 1 - x). SLiC (2305.10425) on DPO's margin, as in RSO (2309.06657)."""
    x = beta * (c - r)
    d = where(x >= 1, 0.0, -beta)
    return where(x >= 1, 0.0, 1 - x), d, -d


def ipo(c, r, beta, e):
    """(c - r - 1 / (2 beta))^2. IPO (2310.12036, eq. 17, where beta is called tau)."""
    m = c - r - 0.5 / beta
    return m * m, 2 * m, -2 * m


def robust(c, r, beta, e):
    """(-(1 - e) log s(x) + e log s(-x)) / (1 - 2e) = softplus(-x) - e x / (1 - 2e). Robust DPO (2403.00409,
    eq. 11)."""
    x = beta * (c - r)
    tilt = e / (1 - 2 * e)
    d = -beta * (sigmoid(-x) + tilt)
    sure = softplus(-x)
    return where(e == 0, sure, sure - tilt * x), d, -d  # 0 * inf is NaN


def exo_pair(c, r, beta, e):
    """KL((q, 1 - q) || (1 - e, e)), q = s(x): q log(q / (1 - e)) + (1 - q) log((1 - q) / e). EXO (2402.00856,
    eq. 16)."""
    x = beta * (c - r)
    q = sigmoid(x)
    p = sigmoid(-x)
    d = beta * q * p * (x - log(1 - e) + log(e))
    return q * (-softplus(-x) - log(1 - e)) + p * (-softplus(x) - log(e)), d, -d


def nca_pair(c, r, beta, e):
    """-log s(bc) - (log s(-bc) + log s(-br)) / 2. NCA (2402.05369)."""
    a = beta * c
    b = beta * r
    value = softplus(-a) + 0.5 * (softplus(a) + softplus(b))
    return value, beta * (0.5 * sigmoid(a) - sigmoid(-a)), 0.5 * beta * sigmoid(b)


def bco_pair(c, r, beta, e):
    """-log s(bc - delta) - log s(delta - br) at delta = 0. BCO (2404.04656); `dpo_loss` says how to have a
    delta."""
    a = beta * c
    b = beta * r
    return softplus(-a) + softplus(b), -beta * sigmoid(-a), beta * sigmoid(b)


def sppo_hard(c, r, beta, e):
    """(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2. SPPO (2405.00675, eq. 4.7) with win rates 1 and 0."""
    m = c - 0.5 / beta
    n = r + 0.5 / beta
    return m * m + n * n, 2 * m, 2 * n


def apo_zero(c, r, beta, e):
    """s(-bc) + s(br): chosen up, rejected down. APO (2408.06266, eq. 7)."""
    a = beta * c
    b = beta * r
    return sigmoid(-a) + sigmoid(b), -beta * sigmoid(a) * sigmoid(-a), beta * sigmoid(b) * sigmoid(-b)


def apo_down(c, r, beta, e):
    """s(bc) + s(-x): both down, rejected more. APO (2408.06266, eq. 8)."""
    a = beta * c
    x = beta * (c - r)
    d = beta * sigmoid(x) * sigmoid(-x)
    return sigmoid(a) + sigmoid(-x), beta * sigmoid(a) * sigmoid(-a) - d, d


def discopop(c, r, beta, e):
    """-(1 - m) log s(x) + m e^-x, m = s(x / 0.05). DiscoPOP's log-ratio modulated loss (2406.08414, eq.
    5)."""
    x = beta * (c - r)
    y = x / 0.05
    n = sigmoid(-y)
    tail = exp(-x - softplus(-y))  # m e^-x, which alone is 0 * inf at x = -1e4
    d = beta * (tail * (n / 0.05 - 1) - sigmoid(-x) * n - softplus(-x) * sigmoid(y) * n / 0.05)
    return softplus(-x) * n + tail, d, -d


def odds_ratio(c, r, beta, e):
    """-beta log s(log odds(c) - log odds(r)), log odds(c) = c - log(1 - e^c). ORPO (2403.07691, eq. 7); c and
    r clamped at -1e-6."""
    c = where(c > -1e-6, -1e-6, c)
    r = where(r > -1e-6, -1e-6, r)
    not_c = -expm1(c)
    not_r = -expm1(r)
    x = c - r - log(not_c) + log(not_r)
    d = beta * sigmoid(-x)
    return beta * softplus(-x), -d / not_c, d / not_r


class PairLoss(NamedTuple):
    """A row of the table: the formula, the label smoothing that it takes (a key of `SMOOTHING`), and whether
    lengths, which turn its log-ratios into means over tokens, are refused, optional or needed."""

    formula: Callable[[Any, Any, Any, Any], tuple[Any, Any, Any]]
    smoothing: str = "0"
    lengths: str = "refused"


PAIR_LOSSES = {
    "sigmoid": PairLoss(logistic, "[0, 0.5)"),
    "hinge": PairLoss(hinge),
    "ipo": PairLoss(ipo, lengths="optional"),
    "robust": PairLoss(robust, "[0, 0.5)"),
    "exo_pair": PairLoss(exo_pair, "(0, 0.5)"),
    "nca_pair": PairLoss(nca_pair),
    "bco_pair": PairLoss(bco_pair),
    "sppo_hard": PairLoss(sppo_hard),
    "apo_zero": PairLoss(apo_zero),
    "apo_down": PairLoss(apo_down),
    "discopop": PairLoss(discopop),
    "sigmoid_norm": PairLoss(logistic, "[0, 0.5)", "needed"),
    "odds_ratio": PairLoss(odds_ratio),
}
DPO_LOSS_TYPES = tuple(name for name in PAIR_LOSSES if name != "odds_ratio")
SMOOTHING: dict[str, Callable[[float], bool]] = {
    "0": lambda e: e == 0,
    "[0, 0.5)": lambda e: 0 <= e < 0.5,
    "(0, 0.5)": lambda e: 0 < e < 0.5,
}
