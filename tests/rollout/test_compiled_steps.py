"""compile=True: the same rollout with fewer kernels a step, compiled once for all rollouts of a model."""

import shutil
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from bench.experiments.decode_kernels import decoding, kernels
from fastalign.probe import probing
from tests.rollout.tiny_rollouts import NEW, draw, llama

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


def test_a_compiled_step_draws_the_same_tokens_with_half_the_kernels() -> None:
    torch.compiler.reset()
    counters.clear()
    model = llama(num_hidden_layers=1)
    options: dict[str, Any] = {"top_p": 0.95, "repetition_penalty": 1.2}
    with torch._inductor.config.patch("cpp.enable_kernel_profile", True):  # names the kernels in a trace
        eager, compiled = (draw(model, compile=compiled, **options) for compiled in (False, True))
        assert torch.equal(compiled.tokens, eager.tokens)
        torch.testing.assert_close(compiled.logp, eager.logp, rtol=0, atol=4e-6)
        with torch.no_grad():
            model.lm_head.weight.mul_(0.5)
        assert not torch.equal(draw(model, compile=True, seed=8, **options).tokens, eager.tokens)
        with probing(model):
            before, after = (
                kernels(decoding(model, 4, compile_step=compiled, prompt=9, new=NEW)).total()
                for compiled in (False, True)
            )
    # Of four rollouts, the first has compiled.
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert 2 * after < before, (before, after)
