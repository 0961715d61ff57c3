"""Every method of the benchmark agrees with the truth, and a wrong one is refused."""

import importlib
import importlib.util
import json
import sys
from functools import partial

import pytest
import torch
from torch import Tensor

from bench.cases import bench_ppo_step, bench_sampling, measure, truth
from bench.cases.case import Case, Target
from bench.core import peers, shapes
from bench.core.operation import EAGER, OURS, Absent, Shape
from bench.methods import cross_entropy as methods
from bench.methods import preference as preference_methods
from bench.methods import sampling as sampling_methods
from bench.methods import steps as step_methods
from bench.methods.sampling import Filter, drawn_from
from bench.methods.table import OPERATIONS
from bench.reports import markdown
from fastalign.measure import Error, largest_error
from tests.bench.tiny_cases import CASES, INSTALLED, TINY, tiny_case

# Peers that have no such operation.
WITHOUT_METHOD = {("TRL", "linear_ppo")} | {
    (peer, operation)
    for peer in ("TRL", "Liger")
    for operation in (
        *("linear_distillation", "linear_cross_entropy with LoRA"),
        "linear_logprobs, screen, untrained",
    )
}
FIRST = {case.operation: name for name, case in reversed(CASES.items())}


def tiny(name: str) -> tuple[Case, dict[str, Tensor], Tensor | None]:
    """The case at a tiny shape with its inputs; skips where a model that they need is absent."""
    case = CASES[name]._replace(shape=TINY)
    try:
        return case, *truth.make_inputs(case, "cpu")
    except Absent as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("name", CASES)
def test_every_method_present_agrees_with_the_truth(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile makes of plain PyTorch runs without inductor, but in one case: it takes seconds."""
    case, tensors, upstream = tiny(name)
    if case.operation != "linear_cross_entropy":
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    check = truth.checker(case, tensors, upstream)
    present = set()
    for method, load in case.methods.items():
        if method.startswith(methods.COMPILED) and name != FIRST[case.operation]:
            continue  # seconds each where nothing is cached: one case of an operation tells
        try:
            results = truth.run(load("cpu"), tensors, upstream)
        except Absent:
            continue
        present.add(method)
        assert {f"d {trained}" for trained in case.trained} <= set(results)
        assert not check(results).refused, method
    assert {OURS, EAGER} <= present
    for package, peer in (("trl", "TRL"), ("liger_kernel", "Liger")):
        if (
            INSTALLED[package]
            and (peer, case.operation) not in WITHOUT_METHOD
            and case.operation.startswith("linear")
            and not case.only
        ):
            assert any(method.startswith(peer) for method in present), peer


@pytest.mark.parametrize("name", CASES)
def test_the_truth_in_chunks_is_the_truth_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, tensors, upstream = tiny(name)
    whole = truth.truth(case, tensors, upstream)
    monkeypatch.setattr(truth, "ROWS_AT_ONCE", 20)  # 20, 20, 8: chunks of unequal weight in a mean
    for key, error in largest_error(truth.truth(case, tensors, upstream), whole).items():
        assert error.relative < 1e-14, key
    direct = truth.run(
        OPERATIONS[case.operation].methods[EAGER]("cpu"),
        {
            key: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
            for key, t in tensors.items()
        },
        upstream,
    )
    assert all(error.relative < 1e-14 for error in largest_error(direct, whole).values())


def test_peers_that_need_a_gpu_or_are_not_installed_are_absent_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(Absent, match="needs a GPU"):
        methods.LINEAR_CROSS_ENTROPY.methods["Liger fused linear CE"]("cpu")
    monkeypatch.setitem(sys.modules, "trl.kernels.chunked_logprob", None)
    with pytest.raises(Absent, match="trl is not installed"):
        methods.LINEAR_LOGPROBS.methods["TRL ChunkedLogProbFunction"]("cpu")
    for operation, method, package, name in (
        (methods.LINEAR_CROSS_ENTROPY, "Apple CCE", "cut-cross-entropy", "cut_cross_entropy"),
        (methods.LINEAR_LOGPROBS, "Apple CCE, exact", "cut-cross-entropy", "cut_cross_entropy"),
        (
            methods.LINEAR_CROSS_ENTROPY,
            "quack chunked linear CE",
            "quack-kernels",
            "quack.linear_cross_entropy",
        ),
        (methods.CROSS_ENTROPY, "quack CE", "quack-kernels", "quack.cross_entropy"),
        (methods.CROSS_ENTROPY, "flash-attn CE", "flash-attn", "flash_attn.losses.cross_entropy"),
    ):
        with pytest.raises(Absent, match="needs a GPU"):
            operation.methods[method]("cpu")
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(Absent, match=f"{package} is not installed"):
            operation.methods[method]("cuda")
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    with pytest.raises(Absent, match=r"torch .* has no chunked linear_cross_entropy"):
        methods.LINEAR_CROSS_ENTROPY.methods["F.linear_cross_entropy, 512 tokens a chunk"]("cpu")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(Absent, match="no-such-compiler"):
        methods.CROSS_ENTROPY.methods[methods.COMPILED]("cpu")


def test_each_peer_is_found_or_named_as_absent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = peers.found()
    assert torch.__version__.startswith(found["torch"]) and found["flash-attn"] == "absent: needs a GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if importlib.util.find_spec("flashinfer") is None:
        assert peers.found()["flashinfer-python"] == "absent: not installed"


def test_a_head_is_sized_to_the_machine_or_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = shapes.HEADS
    assert shapes.sized(*heads["SmolLM2-135M"], "cpu", 24 * 2**30) == 1024
    assert shapes.sized(*heads["Llama-3.2-1B"], "cpu", 24 * 2**30) == 64
    assert shapes.sized(*heads["Llama-3-8B"], "cuda", 80 * 10**9) == 8192
    with pytest.raises(
        Absent, match=r"head \[128256, 4096\]: got a machine with 16 GiB, expected at least 18 GiB"
    ):
        shapes.sized(*heads["Llama-3-8B"], "cpu", 16 * 2**30)
    with pytest.raises(
        Absent, match=r"head \[256000, 2304\]: got 32 tokens in the time of a case, expected at least 64"
    ):
        shapes.sized(*heads["Gemma-2-2B"], "cpu", 64 * 2**30)
    assert shapes.memory_bytes("cpu") > 2**30
    monkeypatch.setattr(shapes, "memory_bytes", lambda device: 2**30)
    measured = measure.measure(
        "big", CASES["linear_cross_entropy fp32"]._replace(head="Qwen3-8B"), "cpu", seconds=0.01
    )
    text = markdown.render_case(measure.as_json(measured))
    assert "absent: head [151936, 4096]: got a machine with 1 GiB, expected at least 21 GiB" in text


def test_a_whole_step_leaves_the_weights_as_they_were_and_takes_the_stages_own_loss() -> None:
    tensors = step_methods.step_inputs(TINY, torch.float32, "cpu")
    for stage in step_methods.STAGES:
        step = OPERATIONS[f"{stage} step"].methods[OURS]("cpu")
        first, second = step(**tensors), step(**tensors)
        assert all(torch.equal(first[name], second[name]) for name in first), stage
        norm = sum(first[name].square().sum() for name in first if name != "loss")
        assert 0 < norm <= step_methods.LARGEST_NORM**2
        plain = OPERATIONS[f"{stage} step"].methods[EAGER]("cpu")(**tensors)
        for name, value in first.items():
            torch.testing.assert_close(
                value, plain[name], rtol=1e-3, atol=1e-4 * float(plain[name].abs().max())
            )
    step_methods.without_loss("kto")(tensors)()
    step_methods._trainee.cache_clear()


def test_a_wrong_method_is_refused_and_not_timed(three_methods: dict[str, int]) -> None:
    measured = measure.measure("tiny", tiny_case(), "cpu", seconds=0.01)
    rows = measured.rows
    assert rows["wrong"].refused.startswith("wrong: d logits is off by") and rows["wrong"].timing is None
    assert three_methods["wrong"] == 1  # for the check alone
    assert rows["broken"].refused == "failed: RuntimeError: 0 active drivers"
    assert rows["absent"].refused == "absent: on holiday"
    timed = {name: len(row.timing.seconds) for name, row in rows.items() if row.timing}
    assert set(timed) == {"copy", OURS, EAGER} and set(timed.values()) <= set(
        range(measure.ROUNDS[0], measure.ROUNDS[1] + 1)
    )


@pytest.mark.parametrize("operation", ["linear_dpo", "linear_kto"])
def test_a_preference_loss_with_other_maths_is_wrong(operation: str) -> None:
    """The allowance for rounded log-probabilities is small beside what an average, another beta or a lost row
    would change."""
    case = CASES[f"{operation} {shapes.DTYPE}"]._replace(shape=TINY, dtype="fp32")
    tensors, upstream = truth.make_inputs(case, "cpu")
    check = truth.checker(case, tensors, upstream)
    eager = OPERATIONS[case.operation].methods[EAGER]("cpu")
    right = truth.run(eager, tensors, upstream)
    assert not check(right).refused
    for key, factor in {"loss": 1 + 1e-4, "d hidden": 1 + 1e-4, "d weight": 1 - 1e-4}.items():
        assert check({**right, key: right[key] * factor}).refused.startswith(f"wrong: {key} is off by"), key
    swapped = {
        **tensors,
        "reference_hidden": tensors["reference_hidden"].roll(TINY.N // preference_methods.ROWS, 0),
    }
    assert check(truth.run(eager, swapped, upstream)).refused.startswith("wrong: loss is off by")
    no_gradient_of_the_last_row = right["d hidden"].clone()
    no_gradient_of_the_last_row[-12:] = 0
    assert check({**right, "d hidden": no_gradient_of_the_last_row}).refused.startswith(
        "wrong: d hidden is off by"
    )


def test_rounding_one_large_log_prob_is_allowed_for_and_no_more() -> None:
    """At 512 tokens a row log-probabilities are -6600: one rounding of those to fp32 moves the loss by 2e-5,
    plain PyTorch's or not."""
    case = CASES[f"linear_dpo {shapes.DTYPE}"]._replace(shape=Shape(2048, 8, 400), dtype="fp32")
    tensors, upstream = truth.make_inputs(case, "cpu")
    widened = {key: t.detach().double() if t.is_floating_point() else t for key, t in tensors.items()}
    true = truth.truth(case, tensors, upstream)
    exponents = true["exponents"].abs().amax().item()
    assert 0.1 * 400 * 6 < exponents < 0.1 * 512 * 12
    check = truth.checker(case, tensors, upstream)
    rounded = (true["exponents"] / preference_methods.BETA).float().double()
    loss = preference_methods._dpo(rounded[:4], rounded[4:], widened).mean()
    assert loss != true["loss"] and not check({"loss": loss.float()}).refused
    halved = (true["exponents"] / preference_methods.BETA).bfloat16().double()
    assert check({"loss": preference_methods._dpo(halved[:4], halved[4:], widened).mean().float()}).refused


def test_results_with_nan_are_wrong() -> None:
    nan, fine = Error(float("nan"), float("nan")), Error(1e-6, 1e-6)
    results = {"d logits": torch.zeros(4)}
    assert truth.refusal(results, {"d logits": nan}, {"d logits": fine}, {"d logits": 1.0})
    assert not truth.refusal(results, {"d logits": fine}, {"d logits": fine}, {"d logits": 1.0})


def test_a_single_number_may_be_one_rounding_of_its_own_dtype_off() -> None:
    exact, off = (
        {"loss": Error(0.0, 0.0)},
        {"loss": Error(0.0625, 0.0)},
    )  # half a unit in the last place of bf16 at 11 is 0.03125
    assert not truth.refusal({"loss": torch.tensor(11.0, dtype=torch.bfloat16)}, off, exact, {"loss": 11.0})
    assert truth.refusal({"loss": torch.tensor(11.0)}, off, exact, {"loss": 11.0})


@pytest.mark.parametrize("name", bench_sampling.CASES)
def test_every_sampler_present_draws_from_the_kept_set(name: str) -> None:
    case = bench_sampling.CASES[name]._replace(shape=TINY)
    try:
        tensors, _ = truth.make_inputs(case, "cpu")
    except Absent as reason:
        pytest.skip(str(reason))
    check, present = truth.checker(case, tensors, None), set()
    for method, load in OPERATIONS[case.operation].methods.items():
        try:
            verdict = check(truth.run(load("cpu"), tensors, None))
        except Absent:
            continue
        present.add(method)
        assert not verdict.refused, method
        assert set(verdict.errors) == (
            {"token", "logp", "log_kept", "logp_raw", "entropy"} if method == OURS else {"token"}
        )
    assert OURS in present and "FlashInfer" not in present
    peer = sampling_methods.MULTINOMIAL if case.operation == "sample" else sampling_methods.TRANSFORMERS
    assert (peer in present) == (INSTALLED["transformers"] or case.operation == "sample")


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (Filter(), (0, 1, 2, 3, 4)),
        (Filter(top_k=2), (0, 1, 2)),  # 1 and 2 tie
        (Filter(top_p=0.69), (0, 1, 2)),
        (Filter(top_p=0.39), (0,)),
        (Filter(top_k=1, top_p=0.99), (0,)),
        (Filter(top_k=3, top_p=0.45), (0,)),  # half of what top_k kept lies above 1 and 2
        (Filter(temperature=0.5, top_p=0.8), (0, 1, 2)),  # 16 4 4 2.25 0.25 of 26.5, squares
    ],
)
def test_the_kept_set_that_draws_are_judged_by(rule: Filter, kept: tuple[int, ...]) -> None:
    p = torch.tensor([0.4, 0.2, 0.2, 0.15, 0.05], dtype=torch.float64)
    check = drawn_from(rule)({"logits": p.log()[None].float()})
    for token in range(-1, 6):
        refused = check({"token": torch.tensor([token], dtype=torch.int32)}).refused
        assert refused == ("" if token in kept else "wrong: 1 of 1 tokens drawn outside the kept set"), token
    tempered = p ** (1 / rule.temperature) / (p ** (1 / rule.temperature)).sum()
    true = {
        "logp": (tempered[0] / tempered[list(kept)].sum()).log(),
        "log_kept": tempered[list(kept)].sum().log(),
        "logp_raw": p[0].log(),
        "entropy": -(p * p.log()).sum(),
    }
    right = {"token": torch.tensor([0]), **{name: value[None].float() for name, value in true.items()}}
    assert not check(right).refused
    for name in true:
        assert check({**right, name: right[name] + 3e-5}).refused.startswith(f"wrong: {name} is off by 3.0")
        assert check({**right, name: right[name] * float("nan")}).refused.startswith(
            f"wrong: {name} is off by nan"
        )


def test_a_sampler_outside_the_kept_set_or_with_a_wrong_log_prob_is_refused_and_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = bench_sampling.CASES["sample fp32, top_k 50"]._replace(
        shape=TINY, targets=(Target("time", 1e9, "unfiltered"),)
    )
    operation = OPERATIONS[case.operation]
    ours = operation.methods[OURS]("cpu")

    def renormalised(
        logits: Tensor,
    ) -> dict[str, Tensor]:  # as an engine that reports log-probs before its filter
        found = ours(logits=logits)
        return {**found, "logp": found["logp"] + found["log_kept"]}

    unfiltered = sampling_methods.multinomial
    table = {
        OURS: operation.methods[OURS],
        "unfiltered": unfiltered,
        "unrenormalised": lambda _: renormalised,
    }
    monkeypatch.setitem(OPERATIONS, case.operation, operation._replace(methods=table))
    measured = measure.measure("tiny", case, "cpu", seconds=0.01)
    rows = measured.rows
    assert (
        rows["unfiltered"].refused.endswith("of 48 tokens drawn outside the kept set")
        and rows["unfiltered"].timing is None
    )
    assert (
        rows["unrenormalised"].refused.startswith("wrong: logp is off by")
        and rows["unrenormalised"].timing is None
    )
    assert rows[OURS].timing and rows[OURS].errors["token"] == Error(0, 0)
    rendered = measure.as_json(measured)
    text = markdown.render_case(json.loads(json.dumps(rendered)))
    assert (
        "N 48, V 333; no gradients" in text and "times one read (amax) | error, token | error, logp |" in text
    )
    assert f"- unfiltered: {rows['unfiltered'].refused}" in text
    assert markdown.target_lines(rendered) == [
        f"tiny: time against unfiltered was not measured: {rows['unfiltered'].refused}"
    ]


def test_a_step_of_ppo_is_right_by_either_way_and_a_wrong_one_is_refused() -> None:
    case = bench_ppo_step.CASES["ppo_step fp32"]._replace(shape=TINY)
    tensors, upstream = truth.make_inputs(case, "cpu")
    check = truth.checker(case, tensors, upstream)
    results = {
        method: truth.run(load("cpu"), tensors, upstream)
        for method, load in OPERATIONS["ppo_step"].methods.items()
    }
    assert [check(found).refused for found in results.values()] == ["", ""] and set(results) == {OURS, EAGER}
    right = results[OURS]
    for name, factor in {"logp": 1 + 1e-3, "entropy": 1 + 1e-3}.items():
        assert check({**right, name: right[name] * factor}).refused.startswith(f"wrong: {name} is off by"), (
            name
        )
    turned = {**right, "d weight": right["d weight"] + 1e-3 * right["d weight"].roll(1, 0)}
    assert check(turned).refused.startswith("wrong: d weight is off by")
    assert check({**right, "d weight": 3 * right["d weight"]}).refused == "", "clipping scales a gradient"
    likeliest = int(tensors["weight"].sum(1).argmin())  # some id that hardly any state makes likely
    assert (
        "tokens drawn outside the kept set"
        in check({**right, "tokens": torch.full_like(right["tokens"], likeliest)}).refused
    )
