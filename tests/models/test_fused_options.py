"""`fuse_head(screen=…, logits_dtype=…)`: the options hold in all passes, or are refused by name."""

from __future__ import annotations

import copy

import pytest
import torch

from fastalign.causal_lm import fuse_head
from fastalign_kernels import linear_cross_entropy, linear_token_stats, native, screen_counts
from tests.models.tiny_models import batch, llama, shift

pytestmark = pytest.mark.hosts

needs_screen = pytest.mark.skipif(
    not native.has_int8_gemm(),
    reason="csrc/int8 needs AVX-512 VNNI, and this CPU has none (or the library is not there)",
)


@needs_screen
def test_a_screen_is_that_of_the_head_functions_with_gradients_and_without() -> None:
    model = fuse_head(llama().float(), tail_eps=0.02, screen=True)
    inputs, labels = batch()
    screen_counts()
    out = model(**inputs, labels=labels, keep_hidden=True)
    assert screen_counts().tokens == (shift(labels) != -100).sum()
    hidden, weight = out.last_hidden_state.detach(), model.lm_head.weight
    expected = linear_cross_entropy(hidden, weight, shift(labels), tail_eps=0.02, screen=True)
    assert torch.equal(out.loss, expected)
    assert torch.equal(*(torch.autograd.grad(loss, weight)[0] for loss in (out.loss, expected)))
    with torch.no_grad():
        logp = copy.deepcopy(model)(**inputs, labels=labels, token_stats=True).logp
        assert torch.equal(logp, linear_token_stats(hidden, weight, shift(labels), screen=True).logp)


@needs_screen
def test_fusing_again_without_a_screen_gives_exact_logits() -> None:
    model = fuse_head(llama().float(), screen=True)
    inputs, labels = batch()
    model = fuse_head(model)
    screen_counts()
    model(**inputs, labels=labels)
    assert screen_counts().tokens == 0


def test_a_head_without_8_bit_products_is_refused_and_stays_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = llama()
    with pytest.raises(ValueError, match=r"screen: got True, expected None: factors of torch.float64 have"):
        fuse_head(model.double(), screen=True)
    monkeypatch.setattr(native, "has_int8_gemm", lambda: False)
    monkeypatch.setattr(native, "missing", "")
    with pytest.raises(ValueError, match=r"screen: got True, expected None: this CPU has no AVX-512 VNNI"):
        fuse_head(model.float(), screen=True)
    assert "forward" not in model.__dict__


def test_logits_of_a_fused_model_are_rounded_in_all_its_losses() -> None:
    model = fuse_head(llama().bfloat16(), logits_dtype=torch.bfloat16)
    inputs, labels = batch()
    out = model(**inputs, labels=labels, keep_hidden=True)
    hidden, weight = out.last_hidden_state.detach(), model.lm_head.weight
    rounded, plain = (
        linear_cross_entropy(hidden, weight, shift(labels), logits_dtype=dtype)
        for dtype in (torch.bfloat16, None)
    )
    assert torch.equal(out.loss, rounded) and not torch.equal(rounded, plain)
    logp = model(**inputs, labels=labels, token_stats=True).logp
    expected = linear_token_stats(hidden, weight, shift(labels), logits_dtype=torch.bfloat16).logp
    assert torch.equal(logp, expected)
    assert torch.equal(fuse_head(model)(**inputs, labels=labels).loss, plain)


def test_a_dtype_that_logits_cannot_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"logits_dtype: got torch.float16, expected None, torch.float32 or"):
        fuse_head(llama(), logits_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"screen: got True with logits_dtype torch.bfloat16, expected None"):
        fuse_head(llama(), screen=True, logits_dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"logits_dtype: got torch.bfloat16 with torch.float32 hidden states"
    ):
        inputs, labels = batch()
        fuse_head(llama().float(), logits_dtype=torch.bfloat16)(**inputs, labels=labels)
