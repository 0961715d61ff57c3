"""A model whose head cannot be served exactly is refused by name and left alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from fastalign.causal_lm import UnsupportedModelError, fuse_head, unfuse_head
from tests.models.tiny_models import CONFIGS, GQA, MHA, VOCAB, batch, build, llama, model_nll, shift

pytestmark = pytest.mark.hosts


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
    nll = model_nll(model, inputs, shift(labels))
    torch.testing.assert_close(model(**inputs, labels=labels).logp, -nll, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("bend", "reason"),
    [
        ("input", "an lm_head whose input differs from its backbone's output by"),
        ("softcap", r"logits that differ by .* from LogitTransform\(logit_scale=1.0, softcap=None\)"),
        ("masked", "differ by"),
        ("sliced", "1 calls of lm_head, not one that ends in a loss and logits of its shape"),
        ("loss", "a loss that differs from the cross-entropy of its logits by 0.125"),
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
    with pytest.raises(UnsupportedModelError, match=f"got Tilted, which has .*{reason}"):
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


def partitioned() -> Any:
    """As DeepSpeed's ZeRO-3 leaves a model: no values, and an attribute that says so."""
    model = llama()
    model.lm_head.weight = nn.Parameter(torch.empty(0))
    model.lm_head.weight.ds_id = 3
    return model


def meta() -> Any:
    with torch.device("meta"):
        return tf.LlamaForCausalLM(tf.LlamaConfig(**GQA))


T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}


MOE = {"num_local_experts": 2, "output_router_logits": True}


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "encoder-decoder": (
        lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)),
        "T5ForConditionalGeneration, which is an encoder-decoder",
    ),
    "backbone": (lambda: tf.LlamaModel(tf.LlamaConfig(**GQA)), "LlamaModel, which has no output embeddings"),
    "classifier": (
        lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**GQA)),
        "LlamaForSequenceClassification, which has no output embeddings",
    ),
    "bert": (
        lambda: tf.BertLMHeadModel(tf.BertConfig(**MHA, is_decoder=True)),
        "BertLMHeadModel, which has an lm_head whose input",
    ),
    "electra": (
        lambda: tf.ElectraForCausalLM(tf.ElectraConfig(**MHA, is_decoder=True)),
        "ElectraForCausalLM, which has a head that does not take",
    ),
    "bart": (
        lambda: tf.BartForCausalLM(tf.BartConfig(vocab_size=VOCAB, d_model=32, decoder_layers=1)),
        "BartForCausalLM, which has a loss",
    ),
    "quantised head": (quantised_head, "LlamaForCausalLM, which has a .*QuantisedLinear as its lm_head"),
    "ZeRO-3": (partitioned, "LlamaForCausalLM, which has its lm_head.weight partitioned by DeepSpeed ZeRO-3"),
    "router loss": (
        lambda: build(tf.MixtralConfig(**GQA, **MOE)),
        "MixtralForCausalLM, which adds an auxiliary router loss",
    ),
    "DataParallel": (lambda: nn.DataParallel(llama()), "DataParallel, which copies a module"),
    "not transformers": (lambda: nn.Linear(2, 2), "Linear, which is no transformers PreTrainedModel"),
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
    with pytest.raises(ValueError, match="LlamaForCausalLM with weights on the meta device.*verify=False"):
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
        UnsupportedModelError, match="LlamaForCausalLM, which had its lm_head replaced after fuse_head"
    ):
        model(**inputs, labels=labels)
    nll = model_nll(model, inputs, shift(labels))
    torch.testing.assert_close(fuse_head(model)(**inputs, labels=labels).logp, -nll, rtol=1e-10, atol=1e-12)


def test_unfusing_a_wrapped_forward_is_refused() -> None:
    model = fuse_head(llama())
    model.forward = partial(model.forward)
    with pytest.raises(ValueError, match="LlamaForCausalLM, whose forward was replaced after fuse_head"):
        unfuse_head(model)
