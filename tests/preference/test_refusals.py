"""What the preference losses refuse, by the name of the argument."""

from __future__ import annotations

import pytest
import torch

from fastalign_kernels.preference.losses import (
    cpo_loss,
    dpo_loss,
    kto_kl,
    kto_loss,
    orpo_loss,
    reward_loss,
    simpo_loss,
)
from tests.preference.sequence_losses import S, lengths

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings(
        "ignore:.*encountered in:RuntimeWarning"
    ),  # numpy's, inside Triton's interpreter: overflow to inf is meant
]


ZEROS, LONG = torch.zeros(S), torch.ones(S, dtype=torch.int64)


DPO_REFUSALS = [
    (
        {"policy_rejected_logps": torch.zeros(3)},
        r"policy_rejected_logps: shape \[3\] seen, the shape of policy_chosen_logps = \[7\] wanted",
    ),
    ({"reference_chosen_logps": torch.zeros(1)}, r"reference_chosen_logps: shape \[1\] seen"),
    ({"reference_rejected_logps": LONG}, r"reference_rejected_logps: torch.int64 seen, torch.float32 or"),
    (
        {"policy_rejected_logps": torch.zeros(S, device="meta")},
        r"policy_rejected_logps: on meta, but policy_chosen_logps is on cpu",
    ),
    ({"beta": 0.0}, r"beta: 0.0 seen, a number above 0 wanted"),
    ({"beta": float("nan")}, r"beta: nan seen"),
    ({"loss_type": "kto"}, r"loss_type: 'kto' seen, one of sigmoid, hinge"),
    ({"loss_type": "odds_ratio"}, r"loss_type: 'odds_ratio' seen"),
    ({"reduction": "avg"}, r"reduction: 'avg' seen, one of mean, sum, none wanted"),
    ({"label_smoothing": 0.5}, r"label_smoothing: got 0.5, expected \[0, 0.5\) with loss_type='sigmoid'"),
    ({"label_smoothing": -0.1}, r"label_smoothing: got -0.1"),
    ({"loss_type": "exo_pair"}, r"label_smoothing: got 0.0, expected \(0, 0.5\) with loss_type='exo_pair'"),
    (
        {"loss_type": "robust", "label_smoothing": 0.5},
        r"label_smoothing: got 0.5, expected \[0, 0.5\) with loss_type='robust'",
    ),
    (
        {"loss_type": "hinge", "label_smoothing": 0.1},
        r"label_smoothing: got 0.1, expected 0 with loss_type='hinge'",
    ),
    (
        {"chosen_lengths": LONG},
        r"chosen_lengths: got a tensor of shape \[7\], expected None with loss_type='sigmoid'",
    ),
    (
        {"loss_type": "sigmoid_norm"},
        r"chosen_lengths: got None, expected both lengths \[S\] with loss_type='sigmoid_norm'",
    ),
    (
        {"loss_type": "ipo", "chosen_lengths": LONG},
        r"rejected_lengths: got None, expected both lengths \[S\] with loss_type='ipo'",
    ),
    (
        {"loss_type": "ipo", "chosen_lengths": LONG, "rejected_lengths": ZEROS},
        r"rejected_lengths: torch.float32 seen, torch.int64 or",
    ),
    (
        {"loss_type": "ipo", "chosen_lengths": LONG[:3], "rejected_lengths": LONG},
        r"chosen_lengths: shape \[3\] seen",
    ),
    (
        {"loss_type": "ipo", "chosen_lengths": -LONG, "rejected_lengths": LONG},
        r"chosen_lengths: got -1, expected values >= 0",
    ),
]


@pytest.mark.parametrize(
    "change, named", DPO_REFUSALS, ids=lambda v: " ".join(v) if isinstance(v, dict) else ""
)
def test_dpo_refusals_name_the_argument(change, named):
    names = (
        "policy_chosen_logps",
        "policy_rejected_logps",
        "reference_chosen_logps",
        "reference_rejected_logps",
    )
    with pytest.raises(ValueError, match=named):
        dpo_loss(**dict.fromkeys(names, ZEROS) | change)


@pytest.mark.parametrize(
    "call, named",
    [
        (lambda: kto_loss(ZEROS, ZEROS, LONG, ZEROS[0]), r"desirable: torch.int64 seen, torch.bool wanted"),
        (lambda: kto_loss(ZEROS, ZEROS, LONG[:2] > 0, ZEROS[0]), r"desirable: shape \[2\] seen"),
        (lambda: kto_loss(ZEROS, ZEROS[:2], LONG > 0, ZEROS[0]), r"reference_logps: shape \[2\] seen"),
        (lambda: kto_loss(ZEROS, ZEROS, LONG > 0, None), r"kl: got None, expected a scalar"),
        (lambda: kto_loss(ZEROS, ZEROS, LONG > 0, ZEROS), r"kl: shape \[7\] seen, a scalar = \[\] wanted"),
        (lambda: kto_loss(ZEROS, ZEROS, LONG > 0, torch.tensor(-0.5)), r"kl: got -0.5, expected values >= 0"),
        (lambda: kto_loss(ZEROS, ZEROS, LONG > 0, LONG[0]), r"kl: torch.int64 seen"),
        (
            lambda: kto_loss(ZEROS, ZEROS, LONG > 0, ZEROS[0], desirable_weight=-1.0),
            r"desirable_weight: -1.0 seen, a number >= 0 wanted",
        ),
        (
            lambda: kto_loss(ZEROS, ZEROS, LONG > 0, ZEROS[0], undesirable_weight=-1.0),
            r"undesirable_weight: -1.0 seen",
        ),
        (
            lambda: kto_loss(ZEROS, ZEROS, LONG > 0, ZEROS[0], loss_type="bco"),
            r"loss_type: 'bco' seen, one of kto, apo_zero_unpaired wanted",
        ),
        (lambda: kto_loss(ZEROS, ZEROS, LONG > 0, ZEROS[0], beta=-1.0), r"beta: -1.0 seen"),
        (lambda: kto_loss(ZEROS, ZEROS, LONG > 0, ZEROS[0], reduction="x"), r"reduction: 'x' seen"),
        (lambda: kto_kl(ZEROS, ZEROS[:1]), r"reference_mismatched_logps: shape \[1\] seen"),
        (lambda: kto_kl(LONG, ZEROS), r"policy_mismatched_logps: torch.int64 seen"),
        (lambda: reward_loss(ZEROS, ZEROS[:1]), r"rejected_scores: shape \[1\] seen"),
        (lambda: reward_loss(ZEROS, ZEROS, LONG), r"margin: torch.int64 seen"),
        (
            lambda: reward_loss(ZEROS, ZEROS, center_coefficient=-1.0),
            r"center_coefficient: -1.0 seen, a number >= 0 wanted",
        ),
        (
            lambda: simpo_loss(ZEROS, ZEROS, **lengths() | {"chosen_lengths": None}),
            r"chosen_lengths: got None",
        ),
        (lambda: simpo_loss(ZEROS, ZEROS, **lengths(), beta=0.0), r"beta: 0.0 seen"),
        (lambda: simpo_loss(ZEROS, ZEROS, **lengths(), alpha=-1.0), r"alpha: -1.0 seen"),
        (
            lambda: orpo_loss(ZEROS, ZEROS, **lengths() | {"rejected_lengths": None}),
            r"rejected_lengths: got None",
        ),
        (lambda: cpo_loss(ZEROS, ZEROS, label_smoothing=0.7), r"label_smoothing: got 0.7"),
    ],
)
def test_refusals_name_the_argument(call, named):
    with pytest.raises(ValueError, match=named):
        call()
