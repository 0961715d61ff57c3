"""A step of a rollout reads nothing back from the device, and can be captured as a graph."""

from __future__ import annotations

import warnings
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import transformers as tf
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

from fastalign.rollout import decoding
from fastalign.rollout.decoding import WARM_UP
from tests.rollout.tiny_rollouts import CONFIGS, PAD, VOCAB, assert_same, build, draw, prompts

pytestmark = pytest.mark.hosts


def host_state(layers: list[Any]) -> list[dict[str, Any]]:
    return [
        {key: id(value) if isinstance(value, Tensor) else value for key, value in vars(layer).items()}
        for layer in layers
    ]


@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, "sdpa") for name in ("llama", "qwen3-tied", "mistral-window", "gpt2")]
    + [(name, "eager") for name in ("llama", "gemma2-alternating-window", "gpt2")],
)
def test_a_step_reads_nothing_back_from_the_device(
    name: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = decoding.sample

    def sample_as_on_a_gpu(
        *args: Any, **kwargs: Any
    ) -> Any:  # which leaves the values of tensors unchecked, as a traced one does
        with mock.patch("torch.compiler.is_compiling", lambda: True):
            return original(*args, **kwargs)

    monkeypatch.setattr(decoding, "sample", sample_as_on_a_gpu)
    monkeypatch.setattr(decoding, "check_written", lambda *_: None)  # after the prefill, and it reads
    options: dict[str, Any] = {"seed": 0, "temperature": torch.ones(2), "repetition_penalty": 1.2}
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),
    ):  # its tensors have no values: reading one raises
        model = tf.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation=attention).eval()
        state = decoding.Decoding(
            model,
            model,
            input_ids=torch.ones(2, 5).long(),
            attention_mask=torch.ones(2, 5).long(),
            max_new_tokens=20,
            eos=[2],
            options=options | {"pad_id": PAD},
        )
        tensors = {key: value for key, value in vars(state).items() if isinstance(value, Tensor)}
        host = host_state(state.cache.layers)
        for _ in range(2):
            state.step()
        with pytest.raises(DataDependentOutputException):
            state.all_ended()
    # A graph replays addresses, and nothing that Python counts.
    assert all(getattr(state, key) is value for key, value in tensors.items())
    assert host_state(state.cache.layers) == host


class Stream:
    def __init__(self, name: str = "side") -> None:
        self.name = name

    def wait_stream(self, other: Stream) -> None:
        pass


def stand_in_for_cuda(monkeypatch: pytest.MonkeyPatch, **stand_ins: Any) -> None:
    for name, stand_in in {"Stream": Stream, "current_stream": lambda: Stream("main"), **stand_ins}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)


def test_a_model_that_cannot_be_captured_runs_eagerly_and_is_named_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As Bloom, whose step copies from the host."""
    log: list[str] = []

    @contextmanager
    def inside(*what: Any, **options: Any):
        log.append("capture" if options else what[0].name)
        yield

    def step() -> None:
        if log[-1:] == ["capture"]:
            raise RuntimeError("Cannot copy between CPU and CUDA tensors\nsecond line")
        log.append("step")

    stand_in_for_cuda(
        monkeypatch,
        CUDAGraph=lambda: None,
        stream=inside,
        graph=inside,
        set_stream=lambda stream: log.append(f"back on {stream.name}"),
    )
    monkeypatch.setattr(decoding, "_not_captured", set())
    steps = decoding.run_steps(step, capture=True, name="BloomForCausalLM")
    with pytest.warns(
        UserWarning, match=r"BloomForCausalLM cannot be captured .* eagerly \(Cannot copy"
    ) as said:
        for _ in range(WARM_UP + 2):
            next(steps)
    assert len(said) == 1 and "second line" not in str(said[0].message)
    assert log == ["side", "step"] * WARM_UP + ["capture", "back on main", "step", "step"]
    log.clear()
    again = decoding.run_steps(step, capture=True, name="BloomForCausalLM")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(WARM_UP + 2):
            next(again)
    assert log == ["step"] * (WARM_UP + 2)


def test_a_captured_step_runs_for_real_in_the_warm_up_and_by_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of CUDA calls, with stand-ins: a capture runs nothing, so each step must come of the warm-up
    or of a replay."""
    log: list[str] = []

    class Waiting(Stream):
        def wait_stream(self, other: Stream) -> None:
            log.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    @contextmanager
    def inside(*what: Any, **options: Any):
        log.append(
            f"in {what[0].name}" if isinstance(what[0], Stream) else f"capture on {options['stream'].name}"
        )
        yield

    stand_in_for_cuda(
        monkeypatch,
        Stream=Waiting,
        CUDAGraph=Graph,
        stream=inside,
        graph=inside,
        current_stream=lambda: Waiting("main"),
    )
    cached = set()

    def step() -> None:
        log.append("step")
        cached.add(torch.is_autocast_cache_enabled())

    steps = decoding.run_steps(step, capture=True, name="Llama")
    for _ in range(WARM_UP + 3):
        next(steps)
    warm_up = ["side waits for main", "in side", "step", "main waits for side"]
    assert log == warm_up * WARM_UP + ["capture on side", "step"] + ["replay"] * 3
    assert cached == {False}, "torch.compile would compile again in the capture, where the state differs"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", CONFIGS)
def test_on_a_gpu_a_captured_rollout_equals_an_eager_one(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(decoding, "_not_captured", set())  # a model is named once
    model = build(CONFIGS[name]()).cuda()
    ids, mask = (tensor.cuda() for tensor in prompts())
    eos = int(draw(model, (ids, mask), max_new_tokens=40, cuda_graph=False).tokens[0, 20])
    options = {"max_new_tokens": 40, "eos_id": eos, "top_p": 0.95, "repetition_penalty": 1.1}
    options["return_kept"] = name == "llama"
    eager = draw(model, (ids, mask), **options, cuda_graph=False)
    # Bloom copies its alibi slopes from the host in every step.
    said = pytest.warns(UserWarning, match="BloomForCausalLM cannot be captured")
    with said if name == "bloom-alibi" else nullcontext():
        captured = draw(model, (ids, mask), **options)
    assert_same(captured, eager)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_compiled_step_is_captured_too() -> None:
    model = build(CONFIGS["llama"]()).cuda()
    ids, mask = prompts()
    batch = ids.cuda(), mask.cuda()
    options = {"max_new_tokens": 40, "top_p": 0.95, "repetition_penalty": 1.1}
    eager = draw(model, batch, **options, cuda_graph=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cannot be captured")
        compiled = draw(model, batch, **options, compile=True)
    same = (eager.tokens == compiled.tokens).long().cumprod(1).bool()  # until a near tie falls otherwise
    assert same[:, 0].all() and same.float().mean() > 0.5
    torch.testing.assert_close(compiled.logp[same], eager.logp[same], rtol=0, atol=1e-4)


def test_prompt_bits() -> None:
    ids = torch.tensor([[0, 0, 31, 31, 95, 64, 64], [5, 96, 0, 1, 63, 32, 0], [7, 7, 7, 7, 7, 7, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [0, 0, 0, 0, 0, 0, 1]])
    words = decoding.id_bits(ids, mask, VOCAB)
    assert words.dtype == torch.int32 and words.shape == (3, 4)
    marked = [{v for v in range(128) if int(row[v // 32]) >> v % 32 & 1} for row in words]
    assert marked == [{31, 95, 64}, {5, 96, 0, 1, 63, 32}, {9}]
