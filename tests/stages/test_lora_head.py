"""Stages with a LoRA adapter on lm_head take the steps of PEFT's own forward and plain PyTorch losses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors import safe_open
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from fastalign import peft_heads
from fastalign.stages import dpo, grpo, kto, merge, ppo, pretrain, reward, sft
from fastalign.stages.models.adapters import load_plain
from fastalign_kernels import linear_cross_entropy_stats, linear_logprobs, linear_ppo_loss, linear_token_stats
from fastalign_kernels.linear.cross_entropy_stats import CrossEntropyStats
from fastalign_kernels.logits import TokenStats
from fastalign_kernels.policy.losses import ppo_loss
from tests.stages.tiny import CHAT, lines, save_base, save_tokenizer, sentence, write

STAGES: dict[str, Any] = {
    "pretrain": (pretrain, pretrain.PretrainConfig, "pretrain"),
    "sft": (sft, sft.SFTConfig, "sft"),
    "dpo": (dpo, dpo.DPOConfig, "dpo"),
    "kto": (kto, kto.KTOConfig, "kto"),
    "grpo": (grpo, grpo.GRPOConfig, "ppo"),
    "ppo": (ppo, ppo.PPOConfig, "ppo"),
    "reward": (reward, reward.RewardConfig, "dpo"),
}
COMMON: dict[str, Any] = {"device": "cpu", "dtype": "float32", "batch_size": 4, "learning_rate": 1e-2}
ADAPTERS: dict[str, Any] = {"lora_rank": 4, "lora_targets": ["c_attn", "lm_head"]}


def scores(prompts: list[str], completions: list[str]) -> list[float]:
    """Of completions: how often they have an a."""
    return [float(text.count("a")) - 0.05 * len(text) for text in completions]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny GPT-2, whose embeddings are its lm_head's weight, and data of all stages."""
    folder = tmp_path_factory.mktemp("files")
    tokenizer = save_tokenizer(folder / "tokenizer", ("<eos>", "<pad>", "<s>"), chat_template=CHAT)
    save_base(folder / "base", tokenizer, length=96, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    rows: dict[str, list[dict[str, Any]]] = {
        "pretrain": [{"text": sentence(n)} for n in range(24)],
        "sft": [{"prompt": sentence(n), "completion": " " + sentence(n + 50)} for n in range(12)],
        "dpo": [
            {"prompt": sentence(n), "chosen": " good", "rejected": " bad " + sentence(n + 9)}
            for n in range(12)
        ],
        "kto": [
            {"prompt": sentence(n), "completion": " " + sentence(n + 9), "label": n % 2 == 0}
            for n in range(12)
        ],
        "ppo": [{"prompt": sentence(n)} for n in range(12)],
    }
    for name, records in rows.items():
        write(folder / f"{name}.jsonl", records)
    return folder


@pytest.fixture
def run(files: Path, tmp_path: Path) -> Callable[..., Any]:
    """A function that runs a stage and returns its configuration."""

    def make(stage: str, name: str = "run", **changes: Any) -> Any:
        options = COMMON | ADAPTERS | {"model": str(files / "base"), "output_dir": str(tmp_path / name)}
        module, of_stage, data = STAGES[stage]
        options["train_data"] = str(files / f"{data}.jsonl")
        if stage in ("ppo", "grpo"):
            options |= {"reward": f"{__file__}:scores", "max_new_tokens": 4}
            options |= {"group_size": 2} if stage == "grpo" else {"ppo_epochs": 2, "value": "shared"}
        elif stage == "pretrain":
            options |= {"sequence_length": 48, "tokenizer": str(files / "tokenizer")}
        else:
            options |= {"max_length": 96}
        config = of_stage(**(options | changes))
        module.run(config)
        return config

    return make


def plain_head(
    logits: torch.Tensor, targets: torch.Tensor, head: Any, options: dict[str, Any], ppo: dict[str, Any]
) -> Any:
    """What `head` returns, by plain PyTorch."""
    logp_of_all = F.log_softmax(logits / options["temperature"], -1)
    counted = targets != options["ignore_index"]
    logp = logp_of_all.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * counted
    entropy = -(logp_of_all.exp() * logp_of_all).sum(-1) * counted
    if head is linear_logprobs:
        return logp
    if head is linear_ppo_loss:
        mask = ppo.pop("mask") & counted
        assert ppo.pop("kept", None) is None and ppo.pop("screen") is None and ppo.pop("logits_dtype") is None
        return ppo_loss(logp, ppo.pop("old_logp"), ppo.pop("advantages"), mask, entropy=entropy, **ppo)
    lse, top1 = torch.logsumexp(logits / options["temperature"], -1), logits.argmax(-1) == targets
    if head is linear_token_stats:
        return TokenStats(logp, entropy, lse, top1)
    assert head is linear_cross_entropy_stats
    num_items = options["num_items"]
    loss = -logp.sum() / (counted.sum() if num_items is None else num_items)
    return CrossEntropyStats(loss, *(x.detach() for x in (logp, entropy, lse, top1)))


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """A function after which lm_head's call is PEFT's own forward and plain PyTorch; it gives the calls."""
    calls: list[str] = []

    def forward(
        self: Any, hidden: torch.Tensor, targets: Any = None, *, head: Any = None, **options: Any
    ) -> Any:
        logits = type(self).forward(self, hidden)
        if targets is None:
            return logits
        calls.append(head.__name__)
        of_head = {name: options.pop(name) for name in list(options) if name in causal_lm_options}
        return plain_head(logits, targets, head, of_head, options)

    causal_lm_options = (
        "temperature",
        "ignore_index",
        "num_items",
        "workspace_mib",
        "tail_eps",
        "logit_scale",
        "softcap",
    )
    forward.__name__ = "_fastalign_plain_forward"

    def patch() -> list[str]:
        monkeypatch.setattr(peft_heads, "_fastalign_lora_forward", forward)
        return calls

    return patch


@pytest.mark.parametrize(
    "stage, steps", [("sft", 10), ("dpo", 10), ("ppo", 10), ("grpo", 3), ("kto", 3), ("pretrain", 2)]
)
def test_steps_are_those_of_pefts_forward_and_plain_losses(
    run: Callable[..., Any], plain: Callable[[], list[str]], stage: str, steps: int
) -> None:
    fused = run(stage, "fused", max_steps=steps)
    calls = plain()
    expected = run(stage, "plain", max_steps=steps)
    assert calls, "the plain head was not called"
    for found, true in zip(lines(fused), lines(expected), strict=True):
        numbers = {name: value for name, value in true.items() if not name.startswith("time")}
        assert {name: found[name] for name in numbers} == pytest.approx(numbers, rel=1e-5, abs=1e-5)
    assert len(lines(fused)) >= steps


@pytest.fixture(scope="module")
def tuned(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapters of an SFT run in fp64, on a model whose lm_head is its embeddings."""
    folder = tmp_path_factory.mktemp("tuned")
    options = COMMON | ADAPTERS | {"dtype": "float64", "max_steps": 3, "max_length": 96}
    data: dict[str, Any] = {"model": str(files / "base"), "train_data": str(files / "sft.jsonl")}
    sft.run(sft.SFTConfig(**options, **data, output_dir=str(folder)))
    return folder / "model"


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.tensor([[5, 9, 30, 7]])).logits
    return found


def test_the_saved_adapters_hold_no_weight_of_the_base(tuned: Path) -> None:
    with safe_open(tuned / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
        moved = file.get_tensor("base_model.model.lm_head.lora_B.weight")
    assert all("lora_" in name for name in names) and moved.abs().max() > 0


def test_merging_into_tied_weights_unties_them(files: Path, tuned: Path, tmp_path: Path) -> None:
    """An adapter of lm_head does not change the embeddings, merged or not."""
    expected = logits_of(AutoPeftModelForCausalLM.from_pretrained(tuned, dtype=torch.float64))
    base = AutoModelForCausalLM.from_pretrained(files / "base", dtype=torch.float64)
    assert base.lm_head.weight is base.get_input_embeddings().weight
    assert (expected - logits_of(base)).abs().max() > 1e-3
    folder = merge.run(merge.MergeConfig(model=str(tuned), output_dir=str(tmp_path / "merged")))
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    for model in (merged, load_plain(str(tuned), task="CAUSAL_LM", dtype=torch.float64)):
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(model.get_input_embeddings().weight, base.get_input_embeddings().weight)


def test_an_adapter_of_tied_embeddings_leaves_the_head_as_it_was(
    run: Callable[..., Any], files: Path
) -> None:
    config = run("sft", dtype="float64", max_steps=2, lora_targets=["wte"])
    folder = f"{config.output_dir}/model"
    expected = logits_of(AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float64))
    merged = load_plain(folder, task="CAUSAL_LM", dtype=torch.float64)
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-12, atol=1e-12)
    base = AutoModelForCausalLM.from_pretrained(files / "base", dtype=torch.float64)
    assert torch.equal(merged.lm_head.weight, base.lm_head.weight)
    assert not torch.equal(merged.get_input_embeddings().weight, base.lm_head.weight)


def test_a_run_goes_on_from_an_adapted_head(run: Callable[..., Any], tuned: Path) -> None:
    """Its reference is the merged model: the first loss is ln 2."""
    config = run("dpo", model=str(tuned), dtype="float64", max_steps=2)
    assert lines(config)[0]["loss"] == pytest.approx(0.6931471805599453, rel=1e-12)
    model = load_plain(f"{config.output_dir}/model", task="CAUSAL_LM", dtype=torch.float64)
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


def test_a_value_model_of_its_own_has_the_other_adapters(run: Callable[..., Any]) -> None:
    config = run("ppo", value="own", max_steps=1)
    with safe_open(Path(config.output_dir, "value", "adapter_model.safetensors"), "pt") as file:
        assert any("c_attn" in name for name in file.keys()) and not any("lm_head" in n for n in file.keys())  # noqa: SIM118
    with pytest.raises(ValueError, match="lora_targets: got lm_head, expected modules of GPT2ForSequenceCl"):
        run("ppo", "alone", value="own", max_steps=1, lora_targets=["lm_head"])


def test_what_has_no_such_module_is_refused_by_name(run: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="lora_targets: got c_attn, lm_head, expected names without lm_head"):
        run("reward", max_steps=1)
    with pytest.raises(
        ValueError,
        match="lora_targets: got q_proj, expected modules of GPT2LMHeadModel, such as c_attn,",
    ):
        run("sft", max_steps=1, lora_targets=["q_proj", "lm_head"])
