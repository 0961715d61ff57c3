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
from tests import marks
from tests.preference.sequence_losses import S, lengths

pytestmark = marks.KERNELS


ZEROS, LONG = torch.zeros(S), torch.ones(S, dtype=torch.int64)


DPO_REFUSALS = [
    (
        {"policy_rejected_logps": torch.zeros(3)},
        r"policy_rejected_logps: got shape \[3\], expected the shape of policy_chosen_logps = \[7\]",
    ),
    ({"reference_chosen_logps": torch.zeros(1)}, r"reference_chosen_logps: got shape \[1\]"),
    (
        {"reference_rejected_logps": LONG},
        r"reference_rejected_logps: got torch.int64, expected torch.float32 or",
    ),
    (
        {"policy_rejected_logps": torch.zeros(S, device="meta")},
        r"policy_rejected_logps: got a tensor on meta, expected cpu, where policy_chosen_logps is",
    ),
    ({"beta": 0.0}, r"beta: got 0.0, expected a number above 0"),
    ({"beta": float("nan")}, r"beta: got nan"),
    ({"loss_type": "kto"}, r"loss_type: got 'kto', expected one of sigmoid, hinge"),
    ({"loss_type": "odds_ratio"}, r"loss_type: got 'odds_ratio'"),
    ({"reduction": "avg"}, r"reduction: got 'avg', expected one of mean, sum, none"),
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
        r"rejected_lengths: got torch.float32, expected torch.int64 or",
    ),
    (
        {"loss_type": "ipo", "chosen_lengths": LONG[:3], "rejected_lengths": LONG},
        r"chosen_lengths: got shape \[3\]",
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
        (lambda: kto_loss(ZEROS, ZEROS, LONG, ZEROS[0]), r"desirable: got torch.int64, expected torch.bool"),
        (lambda: kto_loss(ZEROS, ZEROS, LONG[:2] > 0, ZEROS[0]), r"desirable: got shape \[2\]"),
        (lambda: kto_loss(ZEROS, ZEROS[:2], LONG > 0, ZEROS[0]), r"reference_logps: got shape \[2\]"),
        (lambda: kto_loss(ZEROS, ZEROS, LONG > 0, None), r"kl: got None, expected a scalar"),
        (lambda: kto_loss(ZEROS, ZEROS, LONG > 0, ZEROS), r"kl: got shape \[7\], expected a scalar = \[\]"),
        (lambda: kto_loss(ZEROS, ZEROS, LONG > 0, torch.tensor(-0.5)), r"kl: got -0.5, expected values >= 0"),
        (lambda: kto_loss(ZEROS, ZEROS, LONG > 0, LONG[0]), r"kl: got torch.int64"),
        (
            lambda: kto_loss(ZEROS, ZEROS, LONG > 0, ZEROS[0], desirable_weight=-1.0),
            r"desirable_weight: got -1.0, expected a number >= 0",
        ),
        (
            lambda: kto_loss(ZEROS, ZEROS, LONG > 0, ZEROS[0], undesirable_weight=-1.0),
            r"undesirable_weight: got -1.0",
        ),
        (
            lambda: kto_loss(ZEROS, ZEROS, LONG > 0, ZEROS[0], loss_type="bco"),
            r"loss_type: got 'bco', expected one of kto, apo_zero_unpaired",
        ),
        (lambda: kto_loss(ZEROS, ZEROS, LONG > 0, ZEROS[0], beta=-1.0), r"beta: got -1.0"),
        (lambda: kto_loss(ZEROS, ZEROS, LONG > 0, ZEROS[0], reduction="x"), r"reduction: got 'x'"),
        (lambda: kto_kl(ZEROS, ZEROS[:1]), r"reference_mismatched_logps: got shape \[1\]"),
        (lambda: kto_kl(LONG, ZEROS), r"policy_mismatched_logps: got torch.int64"),
        (lambda: reward_loss(ZEROS, ZEROS[:1]), r"rejected_scores: got shape \[1\]"),
        (lambda: reward_loss(ZEROS, ZEROS, LONG), r"margin: got torch.int64"),
        (
            lambda: reward_loss(ZEROS, ZEROS, center_coefficient=-1.0),
            r"center_coefficient: got -1.0, expected a number >= 0",
        ),
        (
            lambda: simpo_loss(ZEROS, ZEROS, **lengths() | {"chosen_lengths": None}),
            r"chosen_lengths: got None",
        ),
        (lambda: simpo_loss(ZEROS, ZEROS, **lengths(), beta=0.0), r"beta: got 0.0"),
        (lambda: simpo_loss(ZEROS, ZEROS, **lengths(), alpha=-1.0), r"alpha: got -1.0"),
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
