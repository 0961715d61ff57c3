"""PEFT's adapters on the lm_head of a fused model: values and gradients are those of PEFT's own forward."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastalign.causal_lm import fuse_head, unfuse_head
from fastalign.probe import UnsupportedModelError
from fastalign_kernels.linear import low_rank
from tests.models.tiny_models import assert_equal_gradients, batch, gradients, llama, lora, model_nll, shift

peft = pytest.importorskip("peft", reason="peft is not installed")

ON_HEAD: dict[str, dict[str, Any]] = {
    "LoRA": {"target_modules": ["q_proj", "lm_head"], "lora_alpha": 5},
    "rsLoRA, only the head": {"target_modules": ["lm_head"], "use_rslora": True, "r": 3},
    "r above H": {"target_modules": ["lm_head"], "r": 40},
    "dropout": {"target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.3},
    "tokens of tied embeddings": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4, 17]},
    "LoRA on tied embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "tokens of lm_head": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [5, 9]}},
}


def adapted(case: str, *, fuse: bool = False) -> Any:
    """A model with the adapters of a case on its head; fused before them if asked to."""
    model = llama(tie_word_embeddings="tied" in case)
    model = lora(fuse_head(model) if fuse else model, **ON_HEAD[case])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.mul_(1.5).add_(0.1)
    return model


def plain_loss(model: Any) -> torch.Tensor:
    inputs, labels = batch()
    targets = shift(labels)
    return model_nll(model, inputs, targets).sum() / (targets != -100).sum()


@pytest.mark.parametrize("fuse_first", [False, True], ids=["fused after", "fused before"])
@pytest.mark.parametrize("case", ON_HEAD)
def test_an_adapted_head_equals_pefts_own_forward(case: str, fuse_first: bool, recwarn: Any) -> None:
    inputs, labels = batch()
    plain = adapted(case)
    torch.manual_seed(7)
    expected_loss = plain_loss(plain)
    expected = gradients(plain, expected_loss)
    model = adapted(case, fuse=True) if fuse_first else fuse_head(adapted(case))
    torch.manual_seed(7)
    out = model(**inputs, labels=labels)
    assert out.logits is None
    torch.testing.assert_close(out.loss, expected_loss, rtol=1e-12, atol=1e-12)
    assert_equal_gradients(gradients(model, out.loss), expected)
    assert any(part in name for name in expected for part in ("lm_head", "trainable_tokens", "embed_tokens"))
    assert not [w for w in recwarn if "fuse" in str(w.message)]


@pytest.mark.parametrize("case", ["LoRA", "tokens of tied embeddings"])
def test_disabled_merged_and_unloaded_adapters(case: str) -> None:
    inputs, labels = batch()
    targets = shift(labels)
    model = fuse_head(adapted(case)).eval()

    def assert_served(of: Any) -> torch.Tensor:
        logp = of(**inputs, labels=labels).logp
        torch.testing.assert_close(logp, -model_nll(of, inputs, targets), rtol=1e-9, atol=1e-10)
        return logp

    adapter_on = assert_served(model)
    with model.disable_adapter():
        off = assert_served(model)
    assert not torch.allclose(adapter_on, off)
    assert torch.equal(assert_served(model), adapter_on)
    model.merge_adapter()
    torch.testing.assert_close(assert_served(model), adapter_on, rtol=1e-9, atol=1e-10)
    with model.disable_adapter():  # PEFT takes a merged adapter out again
        torch.testing.assert_close(assert_served(model), off, rtol=1e-9, atol=1e-10)
    merged = fuse_head(adapted(case)).eval().merge_and_unload()
    torch.testing.assert_close(assert_served(merged), adapter_on, rtol=1e-9, atol=1e-10)


def test_the_sum_of_weight_and_adapter_is_never_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head gets the adapter itself, once a call."""
    seen: list[tuple[int, ...]] = []
    as_low_rank = low_rank.thin_product

    def recorded(lora: Any, *arguments: Any) -> Any:
        seen.append(tuple(lora.A.shape))
        return as_low_rank(lora, *arguments)

    monkeypatch.setattr("fastalign_kernels.linear.inputs.thin_product", recorded)
    model = fuse_head(adapted("LoRA"))
    seen.clear()
    inputs, labels = batch()
    model(**inputs, labels=labels)
    with model.disable_adapter():
        model(**inputs, labels=labels)
    assert seen == [(2, model.config.hidden_size)]


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
@pytest.mark.parametrize("case", ["LoRA", "tokens of tied embeddings"])
def test_copies_are_fused(case: str, how: str) -> None:
    model, (inputs, labels) = fuse_head(adapted(case)), batch()
    expected = model(**inputs, labels=labels).loss
    found = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    out = found(**inputs, labels=labels)
    assert out.logits is None and torch.equal(out.loss, expected)
    assert unfuse_head(found)(**inputs, labels=labels).logits is not None


def test_ppo_and_token_statistics_have_the_adapter() -> None:
    model, (inputs, labels) = fuse_head(adapted("LoRA")), batch()
    targets = shift(labels)
    nll = model_nll(model, inputs, targets, temperature=0.7)
    out = model(**inputs, labels=labels, token_stats=True, temperature=0.7)
    torch.testing.assert_close(out.logp, -nll, rtol=1e-10, atol=1e-12)
    ppo = {"old_logp": -nll.detach(), "advantages": torch.randn_like(nll), "mask": targets != -100}
    policy = model(**inputs, labels=labels, ppo=ppo, temperature=0.7)
    found = gradients(model, policy.loss)
    surrogate = -(ppo["advantages"] * (-nll + nll.detach()).exp())[ppo["mask"]].mean()
    torch.testing.assert_close(policy.loss, surrogate.detach(), rtol=1e-10, atol=1e-12)
    assert_equal_gradients(found, gradients(model, surrogate), 1e-9)


def test_an_adapted_head_compiles_to_one_graph() -> None:
    model = fuse_head(lora(llama(num_hidden_layers=1), **ON_HEAD["LoRA"]))
    inputs, labels = batch()
    eager = model(**inputs, labels=labels, use_cache=False)
    expected = gradients(model, eager.loss)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out = compiled(**inputs, labels=labels, use_cache=False)
    assert_equal_gradients(gradients(model, out.loss), expected)


def several(model: Any) -> Any:
    model.add_adapter("second", peft.LoraConfig(target_modules=["lm_head"], r=2))
    model.base_model.set_adapter(["default", "second"])
    return model.double()


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "several adapters": (
        lambda: several(adapted("LoRA")),
        r"has 2 active adapters on its lm_head \(default, second\), expected one plain LoRA adapter",
    ),
    "DoRA": (
        lambda: lora(llama(), target_modules=["lm_head"], use_dora=True),
        r"has DoraLinearVariant \(DoRA or another variant of LoRA\) on its lm_head",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_head_cannot_have_is_refused_by_name(case: str) -> None:
    make, reason = REFUSED[case]
    with pytest.raises(UnsupportedModelError, match=rf"LlamaForCausalLM, which {reason}"):
        fuse_head(make())


def test_adapters_that_cannot_be_served_later_run_with_full_logits_and_one_warning() -> None:
    inputs, labels = batch()
    model = fuse_head(adapted("LoRA"))
    model = several(model)
    with pytest.warns(UserWarning, match=r"was changed after fuse_head \(.*2 active adapters.*full logits"):
        found = model(**inputs, labels=labels)
    assert found.logits is not None
    with pytest.raises(UnsupportedModelError, match="2 active adapters"):
        model(**inputs, labels=labels, token_stats=True)
    model.base_model.set_adapter("second")
    assert model(**inputs, labels=labels).logits is None


def test_one_adapter_name_a_row_is_refused() -> None:
    inputs, labels = batch()
    model = fuse_head(adapted("LoRA")).eval()
    with pytest.raises(UnsupportedModelError, match=r"adapter_names: got \['default', .* expected None"):
        model(**inputs, labels=labels, adapter_names=["default"] * 3)
