"""NaN at a position that counts reaches every loss; NaN elsewhere reaches nothing. In each implementation and
in the specifications."""

import pytest
import torch

from fastalign_kernels import (
    cpo_loss,
    cross_entropy,
    dpo_loss,
    gae,
    kto_kl,
    kto_loss,
    linear_cross_entropy,
    linear_distillation_loss,
    linear_dpo_loss,
    linear_kto_loss,
    linear_logprobs,
    linear_ppo_loss,
    linear_token_stats,
    masked_whiten,
    native,
    orpo_loss,
    ppo_loss,
    reward_loss,
    simpo_loss,
    sum_by_sequence,
    token_stats,
    value_loss,
)
from fastalign_kernels.linear.reference import (
    linear_cross_entropy_ref,
    linear_distillation_loss_ref,
    linear_token_stats_ref,
)
from fastalign_kernels.logits import cross_entropy_ref
from fastalign_kernels.policy import advantages as advantage
from fastalign_kernels.policy import ops as policy
from fastalign_kernels.policy.reference import gae_ref, masked_whiten_ref, ppo_loss_ref, value_loss_ref
from fastalign_kernels.preference import ops as preference
from fastalign_kernels.preference.formulas import DPO_LOSS_TYPES, PAIR_LOSSES
from fastalign_kernels.preference.reference import (
    cpo_loss_ref,
    dpo_loss_ref,
    kto_loss_ref,
    orpo_loss_ref,
    reward_loss_ref,
    simpo_loss_ref,
)
from fastalign_kernels.softmax import rows
from tests.kernels.small_inputs import DESIRABLE, LENGTHS, normal_numbers

NAN = float("nan")
B, T, H, V = 2, 19, 4, 6  # more than one vector of tokens, and a rest
normal, GENERATOR = normal_numbers(torch.float32)
MASK = torch.ones(B, T, dtype=torch.bool).index_put(
    (torch.tensor([0, 1]), torch.tensor([3, 18])), torch.tensor(False)
)
COUNTED, ELSEWHERE = (1, 17), (1, 18)
IDS = torch.randint(V, (B, T), generator=GENERATOR).masked_fill(~MASK, -100)
PACKED = torch.tensor([0, T, 2 * T])
TEACHER_IDS = torch.stack([IDS, (IDS + 1) % V], -1).masked_fill(~MASK[..., None], -100)
TEACHER_LOGP = torch.tensor([0.5, 0.3]).log().expand(B, T, 2)


TOKENS = {name: normal(B, T) for name in ("logp", "old_logp", "advantages", "entropy", "reference_logp")}
VALUES = {name: normal(B, T) for name in ("values", "old_values", "returns")}
PAIRS = {f"policy_{name}_logps": normal(2) - 3 for name in ("chosen", "rejected")}
REFERENCES = {f"reference_{name}_logps": normal(2) - 3 for name in ("chosen", "rejected")}
KTO = {"policy_logps": normal(2), "reference_logps": normal(2), "kl": normal(1).abs()[0]}
SCORES = {name: normal(2) for name in ("chosen_scores", "rejected_scores", "margin")}
HEAD = {"hidden": normal(B, T, H), "weight": normal(V, H), "bias": normal(V)}
SCALES: dict = {"entropy_coefficient": 0.1, "kl_coefficient": 0.1}
ROWS = {"reference_logps": normal(2)}

# Tokens: inputs [B, T, ...] of which each position counts by itself; the others do as a whole.
OF_TOKENS: dict = {
    "ppo_loss": (lambda **x: ppo_loss(**x, mask=MASK, **SCALES).loss, TOKENS),
    "ppo_loss k1 dual_clip": (
        lambda **x: ppo_loss(**x, mask=MASK, **SCALES, kl_estimator="k1", dual_clip=3.0).loss,
        TOKENS,
    ),
    "ppo_loss k2 sequence_mean": (
        lambda **x: ppo_loss(**x, mask=MASK, **SCALES, kl_estimator="k2", aggregation="sequence_mean").loss,
        TOKENS,
    ),
    "ppo_loss_ref": (lambda **x: ppo_loss_ref(**x, mask=MASK, **SCALES, dual_clip=3.0).loss, TOKENS),
    "value_loss": (lambda **x: value_loss(**x, mask=MASK).loss, VALUES),
    "value_loss without clip": (lambda **x: value_loss(**x, mask=MASK, clip=None).loss, VALUES),
    "value_loss_ref": (lambda **x: value_loss_ref(**x, mask=MASK).loss, VALUES),
    "value_loss_ref without clip": (lambda **x: value_loss_ref(**x, mask=MASK, clip=None).loss, VALUES),
    "gae": (
        lambda **x: gae(**x, mask=MASK).advantages.sum(),
        {"rewards": normal(B, T), "values": normal(B, T)},
    ),
    "gae_ref": (
        lambda **x: gae_ref(**x, mask=MASK).advantages.sum(),
        {"rewards": normal(B, T), "values": normal(B, T)},
    ),
    "masked_whiten": (lambda **x: masked_whiten(**x, mask=MASK).sum(), {"x": normal(B, T)}),
    "masked_whiten_ref": (lambda **x: masked_whiten_ref(**x, mask=MASK).sum(), {"x": normal(B, T)}),
    "cross_entropy": (
        lambda **x: cross_entropy(**x, targets=IDS),
        {"logits": normal(B, T, V), "token_weights": normal(B, T)},
    ),
    "cross_entropy_ref": (
        lambda **x: cross_entropy_ref(**x, targets=IDS),
        {"logits": normal(B, T, V), "token_weights": normal(B, T)},
    ),
    "token_stats": (lambda **x: token_stats(**x, ids=IDS).lse.sum(), {"logits": normal(B, T, V)}),
    "linear_cross_entropy": (
        lambda **x: linear_cross_entropy(**x, targets=IDS),
        HEAD | {"token_weights": normal(B, T)},
    ),
    "linear_cross_entropy_ref": (
        lambda **x: linear_cross_entropy_ref(**x, targets=IDS),
        HEAD | {"token_weights": normal(B, T)},
    ),
    "linear_logprobs": (lambda **x: linear_logprobs(**x, ids=IDS).sum(), HEAD),
    "linear_distillation_loss": (
        lambda **x: linear_distillation_loss(**x, teacher_ids=TEACHER_IDS, teacher_logp=TEACHER_LOGP),
        HEAD,
    ),
    "linear_distillation_loss jsd": (
        lambda **x: linear_distillation_loss(
            **x, teacher_ids=TEACHER_IDS, teacher_logp=TEACHER_LOGP, divergence="jsd", reduction="sum"
        ),
        HEAD,
    ),
    "linear_distillation_loss_ref": (
        lambda **x: linear_distillation_loss_ref(
            hidden=torch.where(MASK[..., None], x["hidden"], 0.0),
            weight=x["weight"],
            bias=x["bias"],
            teacher_ids=TEACHER_IDS,
            teacher_logp=TEACHER_LOGP,
        ),
        HEAD,
    ),
    "linear_token_stats_ref": (lambda **x: linear_token_stats_ref(**x, ids=IDS).logp.sum(), HEAD),
    "linear_token_stats": (lambda **x: linear_token_stats(**x, ids=IDS).lse.sum(), HEAD),
    "linear_ppo_loss": (
        lambda **x: linear_ppo_loss(**x, ids=IDS, mask=MASK, **SCALES).loss,
        HEAD
        | {name: x for name, x in TOKENS.items() if name in ("old_logp", "advantages", "reference_logp")},
    ),
    "linear_dpo_loss": (
        lambda hidden, weight, **x: linear_dpo_loss(hidden, weight, IDS, **x).loss,
        HEAD | ROWS,
    ),
    "linear_kto_loss": (
        lambda hidden, weight, kl, **x: linear_kto_loss(hidden, weight, IDS, DESIRABLE, kl, **x).loss,
        HEAD | {"reference_logps": normal(B), "kl": KTO["kl"]},
    ),
}
OF_SEQUENCES: dict = {
    "sum_by_sequence": (lambda values: sum_by_sequence(values, PACKED)[1], {"values": normal(2 * T)}),
    "simpo_loss": (lambda **x: simpo_loss(**x, **LENGTHS, alpha=0.1).loss, PAIRS),
    "simpo_loss_ref": (lambda **x: simpo_loss_ref(**x, **LENGTHS, alpha=0.1).loss, PAIRS),
    "orpo_loss": (lambda **x: orpo_loss(**x, **LENGTHS).loss, PAIRS),
    "orpo_loss_ref": (lambda **x: orpo_loss_ref(**x, **LENGTHS).loss, PAIRS),
    "cpo_loss": (lambda **x: cpo_loss(**x).loss, PAIRS),
    "cpo_loss_ref": (lambda **x: cpo_loss_ref(**x).loss, PAIRS),
    "kto_loss": (lambda **x: kto_loss(**x, desirable=DESIRABLE).loss, KTO),
    "kto_loss_ref": (lambda **x: kto_loss_ref(**x, desirable=DESIRABLE).loss, KTO),
    "kto_kl": (kto_kl, {"policy_mismatched_logps": normal(2), "reference_mismatched_logps": normal(2)}),
    "reward_loss": (lambda **x: reward_loss(**x, center_coefficient=0.1).loss, SCORES),
    "reward_loss_ref": (lambda **x: reward_loss_ref(**x, center_coefficient=0.1).loss, SCORES),
}


def dpo_case(function, loss_type: str):
    lengths = LENGTHS if PAIR_LOSSES[loss_type].lengths == "needed" else {}
    smoothing = 0.1 if loss_type == "exo_pair" else 0.0
    return lambda **x: function(**x, loss_type=loss_type, label_smoothing=smoothing, **lengths).loss


for _type in DPO_LOSS_TYPES:
    OF_SEQUENCES[f"dpo_loss {_type}"] = (dpo_case(dpo_loss, _type), PAIRS | REFERENCES)
    OF_SEQUENCES[f"dpo_loss_ref {_type}"] = (dpo_case(dpo_loss_ref, _type), PAIRS | REFERENCES)


IMPLEMENTATIONS = ("default", "python", "triton")


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, monkeypatch):
    """The default: the native library, or on a GPU Triton. Then Python code in its place. Then Triton, in its
    interpreter on a CPU."""
    if request.param == "python":
        monkeypatch.setattr(native, "missing", "for this test")
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
        if torch.cuda.is_available():
            pytest.skip("compiled kernels take no CPU tensors; the interpreter runs them where no GPU is")
        from fastalign_kernels.policy import advantages_triton as advantage_triton
        from fastalign_kernels.policy import losses_triton as policy_triton
        from fastalign_kernels.preference import losses_triton as preference_triton
        from fastalign_kernels.softmax import rows_triton

        kernels = {
            rows: rows_triton,
            policy: policy_triton,
            preference: preference_triton,
            advantage: advantage_triton,
        }
        for module, replaced in kernels.items():
            monkeypatch.setattr(module.KERNELS, "select", lambda _, replaced=replaced: replaced)


def with_nan(given, name, position):
    """The inputs with NaN at one position of one of them: a token's, or, where it has no tokens, its last
    element."""
    changed = given[name].clone()
    if changed.shape[:2] == (B, T):
        changed[position] = NAN
    else:
        changed.view(-1)[-1] = NAN
    return given | {name: changed}


def each_input(*tables, tokens_only=False):
    """A case for each input of each loss of the tables: by every implementation, the specifications by
    themselves."""
    cases = []
    for key, (loss, given) in ((key, case) for table in tables for key, case in table.items()):
        for name, x in given.items():
            if x.shape[:2] == (B, T) or not tokens_only:
                # The head functions run the kernels of cross_entropy, on which Triton's interpreter takes a
                # second a call.
                for kind in IMPLEMENTATIONS[: 1 if "_ref" in key else 2 if key.startswith("linear_") else 3]:
                    cases.append(pytest.param(kind, loss, given, name, id=f"{key}-{name}-{kind}"))
    return pytest.mark.parametrize(
        ("implementation", "loss", "given", "name"), cases, indirect=["implementation"]
    )


@each_input(OF_TOKENS, OF_SEQUENCES)
def test_nan_reaches_the_loss(implementation, loss, given, name):
    assert loss(**given).isfinite()
    assert loss(**with_nan(given, name, COUNTED)).isnan()


@each_input(OF_TOKENS, tokens_only=True)
def test_nan_elsewhere_reaches_nothing(implementation, loss, given, name):
    assert torch.equal(loss(**with_nan(given, name, ELSEWHERE)), loss(**given))


@pytest.mark.parametrize("value", [value_loss, value_loss_ref])
def test_nan_in_old_values(implementation, value):
    """For values 0, old values NaN and returns 1 the loss was 0.5."""
    values = torch.zeros(1, 1, requires_grad=True)
    result = value(values, torch.full((1, 1), NAN), torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(result.loss, values)
    assert result.loss.isnan() and result.clip_fraction.isnan() and gradient.isnan().all()


@pytest.mark.parametrize("loss", [ppo_loss, ppo_loss_ref])
@pytest.mark.parametrize("name", TOKENS)
def test_nan_reaches_the_metrics(implementation, loss, name):
    """Those that depend on the input."""
    result = loss(**with_nan(TOKENS, name, COUNTED), mask=MASK, **SCALES)._asdict()
    ratio, clipped = {"mean_ratio", "approx_kl"}, {"policy_loss", "clip_fraction"}
    of_logp = {"logp": ratio | clipped | {"kl"}, "old_logp": ratio | clipped, "advantages": clipped}
    expected = of_logp.get(name, {name.removesuffix("_logp").replace("reference", "kl")})
    assert {key for key, value in result.items() if value.isnan()} == expected | {"loss"}


@pytest.mark.parametrize("loss", [ppo_loss, ppo_loss_ref])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_metric_whose_coefficient_is_0_reaches_no_loss(implementation, loss, estimator):
    """A reference that gives a token no probability made the loss 0 * inf = NaN."""
    tokens = TOKENS | {"logp": TOKENS["logp"].clone().requires_grad_()}
    options = {"mask": MASK, "kl_estimator": estimator}
    expected = loss(**tokens, **options).loss
    (gradient,) = torch.autograd.grad(expected, tokens["logp"])
    for name in ("entropy", "reference_logp"):
        for value in (NAN, -torch.inf):
            changed = TOKENS[name].clone()
            changed[COUNTED] = value
            given = tokens | {name: changed}
            result = loss(**given, **options)
            assert torch.equal(result.loss, expected)
            assert torch.equal(torch.autograd.grad(result.loss, given["logp"])[0], gradient)
            metric = result.entropy if name == "entropy" else result.kl
            assert metric is not None and not metric.isfinite()


@pytest.mark.parametrize("loss", [reward_loss, reward_loss_ref])
def test_nan_reaches_the_metrics_of_reward_loss(implementation, loss):
    for name in ("chosen_scores", "rejected_scores"):
        assert all(metric.isnan() for metric in loss(**with_nan(SCORES, name, COUNTED)))
    result = loss(**with_nan(SCORES, "margin", COUNTED))
    assert (
        result.loss.isnan() and result.accuracy.isfinite() and result.mean_margin.isfinite()
    )  # both are of the scores alone
