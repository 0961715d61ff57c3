"""Rollouts with a screen: the tokens of exact logits, and what cannot be screened."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from fastalign.causal_lm import fuse_head
from fastalign.data.tokens import Prompt
from fastalign.stages.policy.rollouts import draw_completions
from fastalign.stages.policy_configs import RolloutOptions
from fastalign_kernels import native, screen_counts
from tests.linear.screen_inputs import needs_screen
from tests.rollout.tiny_rollouts import CONFIGS, NEW, build, draw, llama

pytestmark = [pytest.mark.hosts, needs_screen]


def fused(name: str = "llama", **changes: Any) -> Any:
    return fuse_head(llama(**changes) if name == "llama" else build(CONFIGS[name]()))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_tokens_are_those_of_exact_logits(name: str) -> None:
    model = fused(name)
    screen_counts()
    exact, screened = draw(model), draw(model, screen=True)
    assert torch.equal(exact.tokens, screened.tokens)
    for one, other in zip(exact[2:6], screened[2:6], strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=0)
    assert screen_counts().tokens == 4 * NEW


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"top_k": 5, "repetition_penalty": 1.5},
        {"top_p": 0.8, "return_kept": True},
        {"min_p": 0.1, "temperature": torch.tensor([0.5, 1.0, 2.0, 0.0])},
        {"finished": torch.tensor([False, True, False, False]), "eos_id": [3, 5, 9]},
    ],
    ids=lambda options: ", ".join(options),
)
def test_filters_penalties_and_ends(options: dict[str, Any]) -> None:
    model = fused()
    exact, screened = draw(model, **options), draw(model, screen=True, **options)
    assert torch.equal(exact.tokens, screened.tokens) and torch.equal(exact.mask, screened.mask)
    torch.testing.assert_close(exact.logp, screened.logp, atol=2e-3, rtol=0)
    if exact.kept_ids is not None and screened.kept_ids is not None:
        assert torch.equal(exact.kept_ids.ids, screened.kept_ids.ids)


def test_the_lm_head_makes_no_logits() -> None:
    model = fused()
    plain = torch.nn.functional.linear
    columns: list[int] = []

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        columns.append(weight.shape[0])
        return plain(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", linear)
        draw(model, screen=True)
    assert columns and model.config.vocab_size not in columns


def test_a_model_with_adapters_below_its_head() -> None:
    policy = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    fuse_head(policy)
    exact, screened = draw(policy), draw(policy, screen=True)
    assert torch.equal(exact.tokens, screened.tokens)


def test_rollouts_of_ppo_and_grpo_are_screened_as_their_head_is() -> None:
    prompts = [Prompt([5, 7, 9]), Prompt([11, 4])]
    drawn = []
    for screen in (None, True):
        policy = fuse_head(llama(), screen=screen)
        screen_counts()
        options = RolloutOptions(max_new_tokens=6, temperature=0.9, kl_coef=0)
        drawn.append(
            draw_completions(policy, prompts, lambda p, c: [0.0] * len(p), options, eos_id=3, pad_id=0)
        )
        assert bool(screen_counts().tokens) is bool(screen)
    assert drawn[0].completions == drawn[1].completions
    torch.testing.assert_close(drawn[0].old_logp, drawn[1].old_logp, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (llama, "screen: got True with a LlamaForCausalLM that is not fused, expected None; or call fuse_he"),
        (lambda: fuse_head(llama().double()), "screen: got True, expected None: factors of torch.float64"),
        (
            lambda: fuse_head(get_peft_model(llama(), LoraConfig(target_modules=["lm_head"]))),
            "screen: got True with an adapter on lm_head, expected None",
        ),
    ],
    ids=["not fused", "fp64", "adapter"],
)
def test_what_cannot_be_screened_is_refused_by_name(model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(model(), screen=True)


def test_a_cpu_without_8_bit_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fused()
    monkeypatch.setattr(native, "has_int8_gemm", lambda: False)
    monkeypatch.setattr(native, "missing", "")
    with pytest.raises(ValueError, match="screen: got True, expected None: this CPU has no AVX-512 VNNI"):
        draw(model, screen=True)
