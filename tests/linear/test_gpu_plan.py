"""Which GPU engine a head call gets, and the sizes of its tiles: pure functions, without a GPU."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastalign_kernels.linear import engines
from fastalign_kernels.linear.gpu import plan as gpu_plan
from fastalign_kernels.linear.inputs import HeadInputs, NeedsGrad
from fastalign_kernels.linear.options import HeadOptions


def test_a_softcap_keeps_the_softmax_only_if_no_slope_is_lost():
    assert gpu_plan.keeps_softmax(torch.bfloat16, 256000, 30.0, 1.0)
    assert not gpu_plan.keeps_softmax(torch.bfloat16, 256000, 50.0, 1.0)
    assert not gpu_plan.keeps_softmax(torch.float16, 256000, 30.0, 1.0)
    assert gpu_plan.keeps_softmax(torch.float16, 256000, 0.0, 1.0)


def call(n_tokens=8192, vocab_size=151936, dtype=torch.bfloat16, workspace_mib=2560.0, **changed):
    gradients = {"hidden_grad": True, "head_grad": True} | changed
    return gpu_plan.GpuCall(n_tokens, 4096, vocab_size, dtype, workspace_mib, **gradients)


@pytest.mark.parametrize(
    "given, engine",
    [
        (call(), "kept_softmax"),
        (call(workspace_mib=512), "kept_softmax"),
        (call(workspace_mib=300), "vocab_slices"),  # blocks of 512 tokens: dW's sum costs more than a GEMM
        (call(workspace_mib=300, head_grad=False), "kept_softmax"),
        (call(workspace_mib=100, head_grad=False, hidden_grad=False), "vocab_slices"),
        (call(workspace_mib=10), "token_tiles"),  # no slice of 256 columns fits
        (call(n_tokens=100, workspace_mib=100), "kept_softmax"),
        (call(dtype=torch.float64), "token_tiles"),
        (call(tail=True), "token_tiles"),
        (call(tail=True, head_grad=False, hidden_grad=False), "kept_softmax"),
        (call(n_tokens=0), "kept_softmax"),
        (call(tail=True, screen=True, architecture=90), "screen"),
        (call(tail=True, screen=True, architecture=90, n_tokens=1023), "token_tiles"),  # exact
        (call(tail=True, screen=True, architecture=90)._replace(hidden_size=2048), "tail"),  # likewise
        (call(screen=True, architecture=90, head_grad=False, hidden_grad=False), "screen"),
        (call(screen=True, head_grad=False, hidden_grad=False), "kept_softmax"),
    ],
)
def test_the_engine_of_a_call(given, engine):
    assert gpu_plan.select_engine(given) == engine


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"dtype": torch.float32}, "of bf16 and fp16 factors alone, and these are torch.float32"),
        ({"architecture": 100}, "compute capability 90, and this one has 100"),
        ({"vocab_size": 255}, "V from 256 on, and this one has H 4096 and V 255"),
        ({"cap": 30.0}, "a head with a softcap has exact logits alone"),
        ({"bias": True}, "a head with a bias has exact logits alone"),
        ({"tail": False}, "saves nothing in training without tail_eps"),
    ],
)
def test_what_a_gpu_cannot_screen(changed, message):
    given = call(tail=True, screen=True, architecture=90)
    assert gpu_plan.screen_refusal(given) == ""
    assert message in gpu_plan.screen_refusal(given._replace(**changed))


@pytest.mark.parametrize(
    "given, tile, block",
    [
        (call(n_tokens=2048), 1024, 2048),
        (call(), 256, 8192),  # a larger tile would make two blocks of it
        (call(n_tokens=16384), 256, 8192),
        (call(n_tokens=10000), 1024, 5120),  # two blocks in any case, so that the tile is large
        (call(n_tokens=1100, head_grad=False), 768, 768),
        (call(dtype=torch.float32, n_tokens=4000), 1024, 4000),
    ],
)
def test_sizes_of_tiles_and_blocks(given, tile, block):
    sizes = gpu_plan.tile_sizes(given)
    assert (sizes.tile, sizes.block) == (tile, block)
    assert sizes.bytes <= given.workspace_mib * 2**20


def test_the_default_workspace_is_a_sixteenth_of_the_card():
    assert gpu_plan.gpu_workspace_mib(24 * 2**30) == 1536
    assert gpu_plan.gpu_workspace_mib(141 * 2**30) == gpu_plan.gpu_workspace_mib(None) == 2560
    assert math.isclose(gpu_plan.gpu_workspace_mib(8 * 2**30), 512)


@pytest.mark.parametrize(
    "architecture, hidden_size, options, engine",
    [
        (80, 16, HeadOptions(), "kept_softmax"),
        (100, 16, HeadOptions(), "kept_softmax"),  # no GPU has measured the epilogue there
        (90, 16, HeadOptions(), "epilogue"),
        (90, 12, HeadOptions(), "kept_softmax"),  # TMA takes rows of whole 16 bytes
        (90, 16, HeadOptions(softcap=50.0), "kept_softmax"),
        (90, 16, HeadOptions(workspace_mib=300), "epilogue_slices"),
        (90, 16, HeadOptions(tail_eps=1e-3), "tail"),
        (90, 12, HeadOptions(tail_eps=1e-3), "token_tiles"),
        (80, 16, HeadOptions(tail_eps=1e-3), "token_tiles"),
    ],
)
def test_the_engine_on_a_card(monkeypatch, architecture, hidden_size, options, engine):
    monkeypatch.setattr(engines, "architecture", lambda index: architecture)
    monkeypatch.setattr(engines, "_card_bytes", lambda index: 80 * 2**30)
    with FakeTensorMode():
        hidden = torch.empty(8192, hidden_size, dtype=torch.bfloat16, device="cuda")
        weight = torch.empty(151936, hidden_size, dtype=torch.bfloat16, device="cuda")
        inputs = HeadInputs(hidden, weight, torch.empty(8192, dtype=torch.int64), None, options)
        needs = NeedsGrad(hidden=True, weight=True)
        assert engines.select(inputs, needs) == (engine, 2560, 5120)
        assert engines.overwrites_saved(inputs, needs) == (engine in ("kept_softmax", "epilogue", "tail"))
