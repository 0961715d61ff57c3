"""The fused head inside tiny random transformers models, against the models' own logits in fp64."""

from __future__ import annotations

import copy
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as tf
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from fastalign.causal_lm import FusedCausalLMOutput, UnsupportedModelError, backbone, fuse_head, unfuse_head
from fastalign.hosts import CACHE, enable_checkpointing
from fastalign_kernels import kept_share, linear_cross_entropy, ppo_loss

pytestmark = pytest.mark.hosts

VOCAB = 97  # odd, and a multiple of no block
GQA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MHA = {name: value for name, value in GQA.items() if name != "num_key_value_heads"}
GPT = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "dropout": 0.0,
}

CONFIGS: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "llama": partial(tf.LlamaConfig, **GQA),
    "llama-tied": partial(tf.LlamaConfig, **GQA, tie_word_embeddings=True),
    "mistral": partial(tf.MistralConfig, **GQA),
    "qwen2": partial(tf.Qwen2Config, **GQA),
    "qwen3": partial(tf.Qwen3Config, **GQA, head_dim=8, tie_word_embeddings=True),
    "gemma2-softcap": partial(tf.Gemma2Config, **GQA, head_dim=8, final_logit_softcapping=1.5),
    "gemma3-no-softcap": partial(tf.Gemma3TextConfig, **GQA, head_dim=8, final_logit_softcapping=None),
    "cohere-multiplies": partial(tf.CohereConfig, **GQA, logit_scale=0.3),
    "cohere2-multiplies": partial(tf.Cohere2Config, **GQA, logit_scale=0.3),
    "granite-divides": partial(tf.GraniteConfig, **GQA, logits_scaling=4.0),
    "hyperclovax-multiplies": partial(tf.HyperCLOVAXConfig, **GQA, logits_scaling=4.0),
    "falcon-h1-multiplies": partial(
        tf.FalconH1Config,
        **GQA,
        lm_head_multiplier=0.5,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
    ),
    "mpt-declares-an-unused-scale": partial(
        tf.MptConfig, vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4, max_seq_len=64, logit_scale=0.5
    ),
    "phi-bias": partial(tf.PhiConfig, **MHA),
    "gpt2": partial(tf.GPT2Config, **GPT, **NO_DROPOUT),
    "gptj-bias": partial(tf.GPTJConfig, **GPT, **NO_DROPOUT, rotary_dim=4),
    "gpt-neox": partial(tf.GPTNeoXConfig, **MHA),
    "opt": partial(tf.OPTConfig, **OPT),
    "opt-project-out": partial(tf.OPTConfig, **OPT, word_embed_proj_dim=16),
    "llama4": partial(
        tf.Llama4TextConfig,
        **GQA,
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=2,
        no_rope_layers=[1, 1],
    ),
    "mixtral": partial(tf.MixtralConfig, **GQA, num_local_experts=2),
}


def build(
    config: tf.PreTrainedConfig,
    dtype: torch.dtype = torch.float64,
    kind: Any = tf.AutoModelForCausalLM.from_config,
) -> Any:
    """A random model in train mode whose logits reach about ±5, so that softcaps and scales matter."""
    torch.manual_seed(0)
    model = kind(config).to(dtype).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(6.0)
            elif name.endswith("bias"):
                parameter.normal_()
    return model


def llama(**changes: Any) -> Any:
    return build(tf.LlamaConfig(**{**GQA, **changes}))


def batch(rows: int = 3, length: int = 11) -> tuple[dict[str, Tensor], Tensor]:
    """Ids with a padded row, and labels with some -100."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, length - 3 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :4] = -100
    return {"input_ids": ids, "attention_mask": mask}, labels


def shift(labels: Tensor) -> Tensor:
    return F.pad(labels, (0, 1), value=-100)[:, 1:]


def own_nll(model: Any, inputs: dict[str, Tensor], targets: Tensor, temperature: float = 1.0) -> Tensor:
    """[B, T] from the model's own logits in their dtype (its own loss goes through fp32); 0 where ignored."""
    logits = model(**inputs).logits / temperature
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(
    seen: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-10
) -> None:
    assert seen.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        difference = (seen[name] - gradient).abs().max()
        assert difference <= relative * gradient.abs().max(), (
            f"{name}: {difference} of {gradient.abs().max()}"
        )


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
    own = model(**inputs, labels=labels)
    nll = own_nll(model, inputs, targets)
    expected = gradients(model, nll.sum() / kept.sum())

    out = fuse_head(model)(**inputs, labels=labels, token_stats=token_stats)

    returned = type(out)
    assert returned is FusedCausalLMOutput and out.logits is None
    torch.testing.assert_close(out.loss, nll.sum() / kept.sum(), rtol=1e-10, atol=0)
    rounding = 8 * torch.finfo(torch.float32).eps * own.logits.abs().max()  # its own loss is computed in fp32
    assert (out.loss - own.loss).abs() <= rounding
    logp = own.logits.double().log_softmax(-1)
    torch.testing.assert_close(out.logp, -nll, rtol=1e-10, atol=1e-12)
    entropy = -(logp.exp() * logp).sum(-1)
    torch.testing.assert_close(out.entropy, entropy * kept, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out.lse, own.logits.logsumexp(-1) * kept, rtol=1e-10, atol=1e-12)
    assert torch.equal(out.top1, (own.logits.argmax(-1) == targets) & kept)
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
        with pytest.raises(ValueError, match="need labels or shift_labels"):
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
    with pytest.raises(ValueError, match=r"tail_eps: 2.0 seen, a probability in \(0, 1\)"):
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
    expected = own_nll(model, inputs, targets, temperature=0.7)
    wanted = gradients(model, expected.sum() / 7)
    out = model(
        **inputs, shift_labels=targets, num_items_in_batch=count, token_stats=token_stats, temperature=0.7
    )
    torch.testing.assert_close(out.loss, expected.sum() / 7, rtol=1e-10, atol=0)
    torch.testing.assert_close(out.logp, -expected, rtol=1e-10, atol=1e-12)
    assert_equal_gradients(gradients(model, out.loss), wanted)


def test_token_statistics_take_any_upstream_gradient() -> None:
    model = fuse_head(llama(tie_word_embeddings=True))
    inputs, labels = batch()
    targets = shift(labels)
    weights = torch.randn(3, *targets.shape, dtype=torch.float64) * (targets != -100)
    logits = model(**inputs).logits
    logp = logits.log_softmax(-1)
    own = (
        logp.gather(-1, targets.clamp_min(0)[..., None])[..., 0],
        -(logp.exp() * logp).sum(-1),
        logits.logsumexp(-1),
    )
    expected = gradients(model, sum((w * s).sum() for w, s in zip(weights, own, strict=True)))
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
        -own_nll(model, inputs, targets, 0.7).detach() + 0.3 * old,
        -own_nll(model, inputs, targets, 0.7).detach() + 0.3 * reference,
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
    own = ppo_loss(logp, old, advantages, mask, entropy=entropy, **options)
    expected = gradients(model, own.loss)
    fuse_head(model)
    ppo = {"old_logp": old, "advantages": advantages, "mask": mask, **options}
    out = model(**inputs, shift_labels=targets, ppo=ppo, temperature=0.7, keep_hidden=True)
    assert 0 < out.policy.clip_fraction < 1 and out.loss is out.policy.loss and out.logp is None
    torch.testing.assert_close(tuple(out.policy), tuple(own), rtol=1e-10, atol=1e-12)
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
    own, out = model(**inputs, **asked), model(**inputs, **asked, labels=labels)
    assert len(out.hidden_states) == 3 and len(out.attentions) == 2
    assert all(
        torch.equal(a, b)
        for a, b in zip(out.hidden_states + out.attentions, own.hidden_states + own.attentions, strict=True)
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
    assert {*own} - {"logits"} < {*out}, "what a plain model names, a fused one names alike"
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
    with pytest.raises(ValueError, match="token_stats and ppo: both seen, one wanted"):
        model(**inputs, labels=labels, token_stats=True, ppo={})
    with pytest.raises(
        ValueError, match=r"labels: shape \[3, 10\] seen, that of the tokens, \[3, 11\], wanted"
    ):
        model(**inputs, labels=labels[:, 1:])
    with pytest.raises(ValueError, match="logits_to_keep=2"):
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
    own = exact(**inputs, labels=labels).loss
    out = fuse_head(exact)(**inputs, labels=labels)
    z = hidden.double() @ exact.lm_head.weight.double().T
    cap = getattr(exact.config, "final_logit_softcapping", None)
    z = z if cap is None else cap * torch.tanh(z / cap)
    truth = F.cross_entropy(z.flatten(0, 1), shift(labels).flatten())
    floor = 4 * torch.finfo(torch.float32).eps * truth
    assert out.loss.dtype == torch.float32
    assert (out.loss - truth).abs() <= 2 * (own - truth).abs() + floor
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


def lora(model: Any, **options: Any) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(2)
    options = {
        "r": 2,
        "target_modules": ["q_proj"],
        "init_lora_weights": False,
        "task_type": "CAUSAL_LM",
    } | options
    return peft.get_peft_model(model, peft.LoraConfig(**options)).double()


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
    expected = gradients(model, own_nll(model, inputs, targets).sum() / (targets != -100).sum())
    assert any("lm_head" in name for name in expected) == bool(options)
    out = model(**inputs, labels=labels)
    assert_equal_gradients(gradients(model, out.loss), expected)
    with model.disable_adapter():
        nll = own_nll(model, inputs, targets)
        torch.testing.assert_close(model(**inputs, labels=labels).logp, -nll, rtol=1e-10, atol=1e-12)
    assert unfuse_head(model)(**inputs, labels=labels).logits is not None


class Tilted(tf.LlamaForCausalLM):
    """A Llama that bends its logits or its loss in one way."""

    bend = ""

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any
    ) -> Any:
        if self.bend == "input":
            hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return tf.modeling_outputs.CausalLMOutputWithPast(
                logits=(logits := self.lm_head(hidden * 1.01)), loss=self.loss_function(logits, labels, VOCAB)
            )
        out = super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
        if self.bend == "softcap":
            out.logits = 30 * torch.tanh(out.logits / 30)
        elif self.bend == "masked":
            out.logits[..., 5] = torch.finfo(out.logits.dtype).min
        elif self.bend == "sliced":
            out.logits = out.logits[..., :-1]
        elif self.bend == "loss":
            out.loss = out.loss + 0.125
        return out


def test_a_head_that_starts_at_zero_is_served_with_its_softcap() -> None:
    model = build(CONFIGS["gemma2-softcap"]())
    with torch.no_grad():
        model.lm_head.weight.zero_()
    fuse_head(model)
    with torch.no_grad():
        model.lm_head.weight.normal_()
    inputs, labels = batch()
    nll = own_nll(model, inputs, shift(labels))
    torch.testing.assert_close(model(**inputs, labels=labels).logp, -nll, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("bend", "reason"),
    [
        ("input", "lm_head's input from its backbone's output differs by"),
        ("softcap", r"up to 64, differ by .* from LogitTransform\(logit_scale=1.0, softcap=None\)"),
        ("masked", "differ by"),
        ("sliced", "1 calls of lm_head, and not one that ends in a loss and logits of its shape"),
        ("loss", "its loss from the cross-entropy of its logits differs by 0.125"),
    ],
)
def test_a_model_that_cannot_be_served_exactly_is_refused_and_left_alone(
    bend: str, reason: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = Tilted(tf.LlamaConfig(**GQA)).to(
        dtype
    )  # an untrained model's logits: a softcap of 30 is within rounding
    model.bend = bend
    with pytest.raises(UnsupportedModelError, match=f"Tilted cannot be served.*{reason}"):
        fuse_head(model)
    assert "forward" not in model.__dict__ and "forward" not in model.lm_head.__dict__


class QuantisedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def quantised_head() -> Any:
    model = llama()
    model.lm_head = QuantisedLinear(32, VOCAB)
    return model


def replaced_forward() -> Any:
    model = llama()
    model.forward = partial(model.forward)
    return model


def meta() -> Any:
    with torch.device("meta"):
        return tf.LlamaForCausalLM(tf.LlamaConfig(**GQA))


T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
MOE = {"num_local_experts": 2, "output_router_logits": True}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "encoder-decoder": (
        lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)),
        "T5ForConditionalGeneration is an encoder-decoder",
    ),
    "backbone": (lambda: tf.LlamaModel(tf.LlamaConfig(**GQA)), "LlamaModel has no output embeddings"),
    "classifier": (
        lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**GQA)),
        "LlamaForSequenceClassification has no output embeddings",
    ),
    "bert": (
        lambda: tf.BertLMHeadModel(tf.BertConfig(**MHA, is_decoder=True)),
        "BertLMHeadModel cannot be served exactly by the fused head: lm_head's input",
    ),
    "electra": (
        lambda: tf.ElectraForCausalLM(tf.ElectraConfig(**MHA, is_decoder=True)),
        "ElectraForCausalLM cannot be served exactly by the fused head: the head does not take",
    ),
    "bart": (
        lambda: tf.BartForCausalLM(tf.BartConfig(vocab_size=VOCAB, d_model=32, decoder_layers=1)),
        "BartForCausalLM cannot be served exactly by the fused head: its loss",
    ),
    "lora on the head": (
        lambda: lora(llama(), target_modules=["lm_head"]),
        "LlamaForCausalLM has a peft.tuners.lora.layer.Linear as its lm_head",
    ),
    "quantised head": (quantised_head, "LlamaForCausalLM has a .*QuantisedLinear as its lm_head"),
    "router loss": (
        lambda: build(tf.MixtralConfig(**GQA, **MOE)),
        "MixtralForCausalLM with output_router_logits=True",
    ),
    "DataParallel": (lambda: nn.DataParallel(llama()), "DataParallel copies a module"),
    "not transformers": (lambda: nn.Linear(2, 2), "Linear is no transformers PreTrainedModel"),
    "replaced forward": (
        replaced_forward,
        "has the forward of its LlamaForCausalLM replaced by functools.partial",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str) -> None:
    make, reason = REFUSED[case]
    with pytest.raises(UnsupportedModelError, match=reason):
        fuse_head(make())


def test_a_model_on_the_meta_device_cannot_be_verified() -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM has weights on the meta device.*verify=False"):
        fuse_head(meta())
    model = fuse_head(meta(), verify=False).to_empty(device="cpu")
    twin = fuse_head(llama().float())
    model.load_state_dict(twin.state_dict())
    for buffer, value in zip(model.buffers(), twin.buffers(), strict=True):
        buffer.copy_(value)
    inputs, labels = batch()
    assert torch.equal(model(**inputs, labels=labels).loss, twin(**inputs, labels=labels).loss)


def test_a_resized_vocabulary_wants_fusing_again() -> None:
    model = fuse_head(llama())
    model.resize_token_embeddings(VOCAB + 3)
    inputs, labels = batch()
    with pytest.raises(
        UnsupportedModelError, match="LlamaForCausalLM had its lm_head replaced after fuse_head"
    ):
        model(**inputs, labels=labels)
    nll = own_nll(model, inputs, shift(labels))
    torch.testing.assert_close(fuse_head(model)(**inputs, labels=labels).logp, -nll, rtol=1e-10, atol=1e-12)


def test_unfusing_a_wrapped_forward_is_refused() -> None:
    model = fuse_head(llama())
    model.forward = partial(model.forward)
    with pytest.raises(ValueError, match="forward of LlamaForCausalLM was replaced after fuse_head"):
        unfuse_head(model)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_a_trainer_run_equals_the_unfused_one(name: str, tmp_path: Path) -> None:
    inputs, labels = batch(rows=8)
    rows = [{"input_ids": inputs["input_ids"][i], "labels": labels[i]} for i in range(8)]

    def train(fused: bool, dtype: torch.dtype) -> tuple[list[float], dict[str, Tensor]]:
        model = build(CONFIGS[name](), dtype=dtype)
        arguments = tf.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            optim="sgd",
            learning_rate=0.1,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = tf.Trainer(model=fuse_head(model) if fused else model, args=arguments, train_dataset=rows)
        assert trainer.model_accepts_loss_kwargs
        trainer.train()
        return [log["loss"] for log in trainer.state.log_history if "loss" in log], dict(
            model.named_parameters()
        )

    own_losses, own = train(False, torch.float32)
    losses, weights = train(True, torch.float32)
    _, exact = train(True, torch.float64)
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(losses, own_losses, rtol=8 * eps, atol=0)
    for key, value in exact.items():
        floor = 4 * eps * value.abs().max()
        assert (weights[key] - value).abs().max() <= 2 * (own[key] - value).abs().max() + floor, key


# Two gloo ranks, in processes of their own that run this file.

DISTRIBUTED = ["ddp", "fsdp-tied", "fsdp-untied", "fsdp-lm-head"]


def distributed_model(case: str) -> Any:
    return llama(tie_word_embeddings=case == "fsdp-tied")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("two_ranks")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder)]
    ranks = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    return torch.load(folder / "result.pt")


@pytest.mark.parametrize("token_stats", [False, True])
@pytest.mark.parametrize("case", DISTRIBUTED)
def test_two_ranks_equal_one(case: str, token_stats: bool, two_ranks: dict[str, Any]) -> None:
    model = distributed_model(case)
    inputs, labels = batch(rows=4)
    nll = own_nll(model, inputs, shift(labels)).sum() / (shift(labels) != -100).sum()
    expected = gradients(model, nll)
    loss, found = two_ranks[f"{case} {token_stats}"]
    torch.testing.assert_close(loss, nll.detach(), rtol=1e-10, atol=0)
    assert_equal_gradients({name: 2 * gradient for name, gradient in found.items()}, expected)


def run_rank(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    result = {}
    inputs, labels = batch(rows=4)
    count = int((shift(labels) != -100).sum())
    half = slice(2 * rank, 2 * rank + 2)
    for case in DISTRIBUTED:
        model = fuse_head(distributed_model(case))
        wrapped = model
        if case == "ddp":
            wrapped = nn.parallel.DistributedDataParallel(model)
        else:
            own_group = [model.lm_head] if case == "fsdp-lm-head" else []
            for module in (*model.model.layers, *own_group, model):
                fully_shard(module, mesh=mesh)
        for token_stats in (False, True):
            model.zero_grad()  # before the forward: after it, FSDP2's root still holds unsharded parameters
            out = wrapped(
                **{name: value[half] for name, value in inputs.items()},
                labels=labels[half],
                num_items_in_batch=count,
                token_stats=token_stats,
            )
            found = gradients(model, out.loss)
            loss = out.loss.detach().clone()
            dist.all_reduce(loss)
            shards: dict[str, Any] = found
            full = {name: g.full_tensor() if case != "ddp" else g for name, g in shards.items()}
            result[f"{case} {token_stats}"] = (loss, full)
    if rank == 0:
        torch.save(result, folder / "result.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]), int(sys.argv[2]))
    # Not by return: the meshes keep gloo's threads alive, and one that drops a tensor while the interpreter
    # shuts down ends the process with "terminate called without an active exception" (seen once in CI, on the
    # rank that had nothing to save).
    sys.stderr.flush()
    os._exit(0)
