"""The fused head inside tiny random transformers models, against the models' own logits in fp64."""

from __future__ import annotations

import copy
import inspect
from functools import partial
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F

from fastalign.causal_lm import FusedCausalLMOutput, UnsupportedModelError, fuse_head, unfuse_head
from fastalign.servable_heads import backbone
from fastalign.transformers_names import CACHE, enable_checkpointing
from fastalign_kernels import kept_share, linear_cross_entropy, ppo_loss
from tests.models.tiny_models import (
    CONFIGS,
    GQA,
    assert_equal_gradients,
    batch,
    build,
    gradients,
    llama,
    lora,
    model_nll,
    shift,
)

pytestmark = pytest.mark.hosts


@pytest.mark.parametrize("token_stats", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_statistics_and_gradients_equal_the_models_own(name: str, token_stats: bool) -> None:
    kind = partial(tf.AutoModelForCausalLM.from_config, attn_implementation="eager")
    if name == "mixtral":  # torch's grouped GEMM has no fp64
        kind = partial(kind, experts_implementation="eager")
    model = build(CONFIGS[name](), kind=kind)
    inputs, labels = batch()
    targets = shift(labels)
    kept = targets != -100
    plain = model(**inputs, labels=labels)
    nll = model_nll(model, inputs, targets)
    expected = gradients(model, nll.sum() / kept.sum())

    out = fuse_head(model)(**inputs, labels=labels, token_stats=token_stats)

    returned = type(out)
    assert returned is FusedCausalLMOutput and out.logits is None
    torch.testing.assert_close(out.loss, nll.sum() / kept.sum(), rtol=1e-10, atol=0)
    rounding = (
        8 * torch.finfo(torch.float32).eps * plain.logits.abs().max()
    )  # its own loss is computed in fp32
    assert (out.loss - plain.loss).abs() <= rounding
    logp = plain.logits.double().log_softmax(-1)
    torch.testing.assert_close(out.logp, -nll, rtol=1e-10, atol=1e-12)
    entropy = -(logp.exp() * logp).sum(-1)
    torch.testing.assert_close(out.entropy, entropy * kept, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out.lse, plain.logits.logsumexp(-1) * kept, rtol=1e-10, atol=1e-12)
    assert torch.equal(out.top1, (plain.logits.argmax(-1) == targets) & kept)
    assert_equal_gradients(gradients(model, out.loss), expected)
    assert (out.logp.requires_grad, out.entropy.requires_grad, out.lse.requires_grad) == (token_stats,) * 3


@pytest.mark.parametrize("name", ["llama-tied", "gemma2-softcap", "gpt2", "falcon-h1-multiplies"])
def test_generate_and_the_forward_without_labels_are_unaffected(name: str) -> None:
    model = build(CONFIGS[name]()).eval()
    inputs, _ = batch()
    inputs = {key: value[:1] for key, value in inputs.items()}
    before, logits, signature = (
        model.generate(**inputs, max_new_tokens=6, do_sample=False),
        model(**inputs).logits,
        inspect.signature(model.forward),
    )
    fuse_head(model)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), before)
    assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits, logits)
    assert inspect.signature(model.forward) == signature
    with pytest.raises(ValueError, match="not_an_argument"):
        model.generate(**inputs, not_an_argument=1)
    unused: dict[str, Any]
    for unused in (
        {"token_stats": True},
        {"temperature": 0.5},
        {"workspace_mib": 8},
        {"ppo": {}},
        {"keep_hidden": True},
    ):
        with pytest.raises(ValueError, match="labels: got None with .*, expected labels or shift_labels"):
            model(**inputs, **unused)


def test_fusing_is_idempotent_and_unfusing_restores() -> None:
    model = llama()
    before = {module: dict(module.__dict__) for module in model.modules()}
    model.model.layers[1].eval()
    training = [module.training for module in model.modules()]
    rng = torch.get_rng_state()
    assert fuse_head(model) is model
    assert (
        torch.equal(torch.get_rng_state(), rng)
        and [module.training for module in model.modules()] == training
    )
    patched = model.forward
    assert fuse_head(model) is model and model.forward == patched
    model.model.layers[1].train()
    assert unfuse_head(model) is model and unfuse_head(model) is model
    assert {module: dict(module.__dict__) for module in model.modules()} == before


def test_a_tail_is_the_heads_own_and_fusing_again_changes_it() -> None:
    model = llama()
    torch.nn.init.normal_(model.lm_head.weight, std=1.0)  # sure enough that columns are left out
    fuse_head(model, tail_eps=0.02)
    inputs, labels = batch()
    kept_share()
    out = model(**inputs, labels=labels, keep_hidden=True)
    (found,) = torch.autograd.grad(out.loss, model.lm_head.weight)
    share = kept_share()
    assert share is not None and share < 0.6
    hidden, weight = out.last_hidden_state.detach(), model.lm_head.weight
    expected = linear_cross_entropy(hidden, weight, shift(labels), tail_eps=0.02)
    assert torch.equal(found, torch.autograd.grad(expected, weight)[0])
    assert kept_share() == share
    fuse_head(model)
    exact = model(**inputs, labels=labels)
    assert (
        exact.loss == out.loss
        and not torch.equal(torch.autograd.grad(exact.loss, weight)[0], found)
        and kept_share() is None
    )
    with pytest.raises(ValueError, match=r"tail_eps: got 2.0, expected a probability in \(0, 1\)"):
        fuse_head(model, tail_eps=2.0)


def test_a_deep_copy_is_fused_and_independent() -> None:
    model = fuse_head(llama())
    inputs, labels = batch()
    loss = model(**inputs, labels=labels).loss
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(reference(**inputs, labels=labels).loss, loss, rtol=0, atol=0)
    assert unfuse_head(model) is model and reference(**inputs, labels=labels).logits is None


@pytest.mark.parametrize("token_stats", [False, True])
@pytest.mark.parametrize("count", [7, torch.tensor(7)], ids=["int", "tensor"])
def test_num_items_shift_labels_and_temperature(count: Any, token_stats: bool) -> None:
    model = fuse_head(llama())
    inputs, labels = batch()
    targets = shift(labels).roll(1, 0)  # not what labels would give
    expected = model_nll(model, inputs, targets, temperature=0.7)
    expected_grads = gradients(model, expected.sum() / 7)
    out = model(
        **inputs, shift_labels=targets, num_items_in_batch=count, token_stats=token_stats, temperature=0.7
    )
    torch.testing.assert_close(out.loss, expected.sum() / 7, rtol=1e-10, atol=0)
    torch.testing.assert_close(out.logp, -expected, rtol=1e-10, atol=1e-12)
    assert_equal_gradients(gradients(model, out.loss), expected_grads)


def test_token_statistics_take_any_upstream_gradient() -> None:
    model = fuse_head(llama(tie_word_embeddings=True))
    inputs, labels = batch()
    targets = shift(labels)
    weights = torch.randn(3, *targets.shape, dtype=torch.float64) * (targets != -100)
    logits = model(**inputs).logits
    logp = logits.log_softmax(-1)
    plain = (
        logp.gather(-1, targets.clamp_min(0)[..., None])[..., 0],
        -(logp.exp() * logp).sum(-1),
        logits.logsumexp(-1),
    )
    expected = gradients(model, sum((w * s).sum() for w, s in zip(weights, plain, strict=True)))
    out = model(**inputs, labels=labels, token_stats=True)
    seen = gradients(
        model, sum((w * s).sum() for w, s in zip(weights, (out.logp, out.entropy, out.lse), strict=True))
    )
    assert_equal_gradients(seen, expected)


@pytest.mark.parametrize("name", ["gemma2-softcap", "cohere-multiplies", "phi-bias", "llama-tied"])
def test_ppos_loss_and_its_gradients_equal_those_from_logits(name: str) -> None:
    model = build(CONFIGS[name]())
    inputs, labels = batch()
    targets = shift(labels)
    generator = torch.Generator().manual_seed(1)
    mask = targets != -100
    old, reference, advantages = torch.randn(3, *targets.shape, generator=generator, dtype=torch.float64)
    old, reference = (
        -model_nll(model, inputs, targets, 0.7).detach() + 0.3 * old,
        -model_nll(model, inputs, targets, 0.7).detach() + 0.3 * reference,
    )
    options = {
        "clip": 0.1,
        "entropy_coefficient": 0.02,
        "reference_logp": reference,
        "kl_coefficient": 0.1,
        "normalizer": 9,
    }
    table = (model(**inputs).logits / 0.7).log_softmax(-1)
    logp, entropy = table.gather(-1, targets.clamp_min(0)[..., None])[..., 0], -(table.exp() * table).sum(-1)
    plain = ppo_loss(logp, old, advantages, mask, entropy=entropy, **options)
    expected = gradients(model, plain.loss)
    fuse_head(model)
    ppo = {"old_logp": old, "advantages": advantages, "mask": mask, **options}
    out = model(**inputs, shift_labels=targets, ppo=ppo, temperature=0.7, keep_hidden=True)
    assert 0 < out.policy.clip_fraction < 1 and out.loss is out.policy.loss and out.logp is None
    torch.testing.assert_close(tuple(out.policy), tuple(plain), rtol=1e-10, atol=1e-12)
    assert_equal_gradients(gradients(model, out.loss), expected)
    torch.testing.assert_close(
        out.last_hidden_state, backbone(model)(**inputs).last_hidden_state, rtol=1e-10, atol=1e-12
    )


def test_the_backbones_outputs_are_handed_on() -> None:
    model = fuse_head(
        build(
            tf.LlamaConfig(**GQA),
            kind=partial(tf.AutoModelForCausalLM.from_config, attn_implementation="eager"),
        )
    )
    inputs, labels = batch()
    asked = {"output_hidden_states": True, "output_attentions": True, "use_cache": True}
    plain, out = model(**inputs, **asked), model(**inputs, **asked, labels=labels)
    assert len(out.hidden_states) == 3 and len(out.attentions) == 2
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            out.hidden_states + out.attentions, plain.hidden_states + plain.attentions, strict=True
        )
    )
    assert getattr(out, CACHE).get_seq_length() == out[CACHE].get_seq_length() == 11
    # The older name is served as long as transformers serves it, in outputs and in arguments.
    assert out.past_key_values is out["past_key_values"] is getattr(out, CACHE)
    for name in ("past_key_values", CACHE):
        given = tf.DynamicCache(config=model.config)
        assert (
            getattr(model(**inputs, labels=labels, **{name: given}), CACHE) is given
            and given.get_seq_length() == 11
        )
    assert {*plain} - {"logits"} < {*out}, "what a plain model names, a fused one names alike"
    as_tuple = model(**inputs, labels=labels, return_dict=False, use_cache=False)
    assert (
        type(as_tuple) is tuple and torch.equal(as_tuple[0], out.loss) and torch.equal(as_tuple[1], out.logp)
    )


def test_a_batch_without_targets() -> None:
    model = fuse_head(llama())
    inputs, labels = batch()
    nothing = torch.full_like(labels, -100)
    for token_stats in (False, True):
        assert model(**inputs, labels=nothing, token_stats=token_stats).loss.isnan()
        loss = model(**inputs, labels=nothing, num_items_in_batch=5, token_stats=token_stats).loss
        found = gradients(model, loss)
        assert (
            loss == 0
            and len(found) == len(list(model.parameters()))
            and not any(g.any() for g in found.values())
        )


def test_wrong_arguments_are_named() -> None:
    model = fuse_head(llama())
    inputs, labels = batch()
    with pytest.raises(ValueError, match="token_stats: got both token_stats and ppo, expected one"):
        model(**inputs, labels=labels, token_stats=True, ppo={})
    with pytest.raises(ValueError, match=r"labels: got shape \[3, 10\], expected \[3, 11\]"):
        model(**inputs, labels=labels[:, 1:])
    with pytest.raises(ValueError, match="logits_to_keep: got 2"):
        model(**inputs, labels=labels, logits_to_keep=2)
    with pytest.raises(UnsupportedModelError, match="output_router_logits"):
        model(**inputs, labels=labels, output_router_logits=True)
    with pytest.raises(TypeError, match="input_ids"):
        model(inputs["input_ids"], **inputs, labels=labels)


def test_the_head_runs_inside_lm_heads_call_and_reads_its_weight_nowhere_else() -> None:
    model = fuse_head(llama())
    inputs, labels = batch()
    expected = model(**inputs, labels=labels).loss
    weight = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)

    def unshard(module: nn.Module, args: Any) -> None:
        module.weight.data = weight.clone()

    def reshard(module: nn.Module, args: Any, output: Any) -> None:
        module.weight.data = torch.full_like(weight, torch.nan)

    model.lm_head.register_forward_pre_hook(unshard)
    model.lm_head.register_forward_hook(reshard)
    out = model(**inputs, labels=labels)
    assert torch.equal(out.loss, expected)
    assert all(g.isfinite().all() for g in gradients(model, out.loss).values())


@pytest.mark.parametrize("name", ["llama-tied", "gemma2-softcap"])
def test_bf16_weights_are_no_worse_than_the_models_own_loss(name: str) -> None:
    exact = build(CONFIGS[name](), dtype=torch.bfloat16)
    inputs, labels = batch()
    hidden = exact.model(**inputs).last_hidden_state
    plain = exact(**inputs, labels=labels).loss
    out = fuse_head(exact)(**inputs, labels=labels)
    z = hidden.double() @ exact.lm_head.weight.double().T
    cap = getattr(exact.config, "final_logit_softcapping", None)
    z = z if cap is None else cap * torch.tanh(z / cap)
    truth = F.cross_entropy(z.flatten(0, 1), shift(labels).flatten())
    floor = 4 * torch.finfo(torch.float32).eps * truth
    assert out.loss.dtype == torch.float32
    assert (out.loss - truth).abs() <= 2 * (plain - truth).abs() + floor
    assert all(g.dtype == torch.bfloat16 for g in gradients(exact, out.loss).values())


def test_autocast_gives_the_head_of_the_bf16_hidden_states() -> None:
    model = fuse_head(build(tf.LlamaConfig(**GQA), dtype=torch.float32))
    inputs, labels = batch()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**inputs, labels=labels)
        hidden = model.model(**inputs).last_hidden_state
    expected = linear_cross_entropy(hidden.bfloat16(), model.lm_head.weight, shift(labels))
    assert torch.equal(out.loss, expected)
    assert all(g.dtype == torch.float32 for g in gradients(model, out.loss).values())


def test_gradient_checkpointing_changes_nothing() -> None:
    model = fuse_head(llama())
    inputs, labels = batch()
    expected = gradients(model, model(**inputs, labels=labels).loss)
    enable_checkpointing(model)
    assert_equal_gradients(gradients(model, model(**inputs, labels=labels).loss), expected)


@pytest.mark.parametrize("token_stats", [False, True])
def test_compiled_without_a_graph_break_equals_eager(token_stats: bool) -> None:
    model = fuse_head(llama(num_hidden_layers=1))
    inputs, labels = batch()
    eager = model(**inputs, labels=labels, token_stats=token_stats, use_cache=False)
    expected = gradients(model, eager.loss)
    out = torch.compile(model, backend="aot_eager", fullgraph=True)(
        **inputs, labels=labels, token_stats=token_stats, use_cache=False
    )
    torch.testing.assert_close(out.logp, eager.logp, rtol=1e-12, atol=1e-12)
    assert_equal_gradients(gradients(model, out.loss), expected)


@pytest.mark.parametrize(
    "options", [{}, {"modules_to_save": ["lm_head"]}], ids=["adapters", "modules_to_save"]
)
@pytest.mark.parametrize("fuse_first", [False, True])
def test_peft(options: dict[str, Any], fuse_first: bool) -> None:
    base = llama()
    model = lora(fuse_head(base) if fuse_first else base, **options)
    assert fuse_head(model) is model
    if options:
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    inputs, labels = batch()
    targets = shift(labels)
    expected = gradients(model, model_nll(model, inputs, targets).sum() / (targets != -100).sum())
    assert any("lm_head" in name for name in expected) == bool(options)
    out = model(**inputs, labels=labels)
    assert_equal_gradients(gradients(model, out.loss), expected)
    with model.disable_adapter():
        nll = model_nll(model, inputs, targets)
        torch.testing.assert_close(model(**inputs, labels=labels).logp, -nll, rtol=1e-10, atol=1e-12)
    assert unfuse_head(model)(**inputs, labels=labels).logits is not None
