"""Short trainings by the code of other hosts than TRL, with their functions and with fastalign's head.

Each function trains a tiny random Llama and returns the numbers of each step. The hosts' code is the
installed packages': models, losses, and the loops of LLaMA-Factory and Axolotl. Those of verl and OpenRLHF
need Ray or DeepSpeed, so SGD steps here, after the gradient is clipped to 1. host_steps.py runs their steps.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import transformers as tf
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fastalign.causal_lm import fuse_head
from fastalign.integrations.transformers import loss_function

from .trl_runs import TINY, model, tokenizer

Logs = list[dict[str, float]]
ATTENTION = ("q_proj", "v_proj")  # LoRA's modules
BATCH, LENGTH, ANSWER = 4, 12, 6


def llama(lora: tuple[str, ...] = ()) -> Any:
    """A tiny Llama with the same random weights at each call, LoRA's included, so that LoRA counts."""
    made = model("SFT", TINY, {})
    if not lora:
        return made
    adapted = get_peft_model(made, LoraConfig(r=4, target_modules=[*lora], task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return adapted


def batches(steps: int, rows: int = BATCH) -> Iterable[dict[str, Tensor]]:
    """Random tokens with prompts of half their length, and advantages of their answers."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        ids = torch.randint(3, TINY.vocab, (rows, LENGTH), generator=generator)
        answers = (torch.arange(LENGTH) >= LENGTH - ANSWER).expand_as(ids)
        yield {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": ids.where(answers, -100),
            "loss_weights": answers.float(),
            "advantages": torch.randn(rows, ANSWER, generator=generator),
        }


def stepped(parameters: Iterable[nn.Parameter], steps: int, step: Callable[[Any], dict[str, Any]]) -> Logs:
    """`step` gives a batch's numbers, of which "loss" is minimised."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer, logs = torch.optim.SGD(trained, lr=0.1), []
    for batch in batches(steps):
        numbers = step(batch)
        numbers["loss"].backward()
        numbers["grad_norm"] = nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        logs.append({name: float(value) for name, value in numbers.items()})
    return logs


def transformers_trainer(
    steps: int, handle: Any, *, how: str, lora: tuple[str, ...] = (), **options: Any
) -> Logs:
    """transformers' Trainer. `handle` is None without fastalign; `how` is fuse_head or loss_function."""
    policy = llama(lora)
    base = policy.get_base_model() if lora else policy
    if handle is not None and how == "fuse_head":
        fuse_head(policy)
    elif handle is not None:
        base.loss_function = loss_function
    rows = [{k: v[0] for k, v in batch.items() if k != "advantages"} for batch in batches(8, 1)]
    rows = [{k: v for k, v in row.items() if k != "loss_weights"} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        settings = {"max_steps": steps, "per_device_train_batch_size": 4, "logging_steps": 1, "use_cpu": True}
        quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
        arguments = tf.TrainingArguments(folder, **(settings | quiet | options))
        evaluated = rows if "eval_strategy" in options else None
        trainer = tf.Trainer(policy, arguments, train_dataset=rows, eval_dataset=evaluated)
        trainer.remove_callback(tf.PrinterCallback)
        trainer.train()
    names = ("loss", "grad_norm", "eval_loss")
    return [{k: line[k] for k in names if k in line} for line in trainer.state.log_history]


def verl(
    steps: int, handle: Any, *, backend: str = "torch", mode: str = "token-mean", lora: tuple[str, ...] = ()
) -> Logs:
    """verl's patched forward of a Llama and its policy loss "vanilla"."""
    dense = importlib.import_module("verl.models.transformers.dense_common")
    algorithms = importlib.import_module("verl.trainer.ppo.core_algos")
    # On a CPU verl itself has the backend torch alone.
    forward = getattr(dense, f"forward_with_{'torch' if handle is None else backend}_backend")
    policy = llama(lora)
    base = policy.get_base_model() if lora else policy
    config = SimpleNamespace(
        clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=0.28, get=lambda name, default: default
    )
    config.global_batch_info = {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None}

    def step(batch: dict[str, Tensor]) -> dict[str, Any]:
        output = forward(base, input_ids=batch["input_ids"], temperature=0.8, return_dict=True)
        tokens = slice(LENGTH - ANSWER - 1, LENGTH - 1)
        shape = batch["input_ids"].shape
        logp, entropy = (x.view(shape)[:, tokens] for x in (output.log_probs, output.entropy))
        old = logp.detach() + 0.5 * batch["advantages"].sin()
        mask = torch.ones_like(logp, dtype=torch.bool)
        vanilla = algorithms.POLICY_LOSS_REGISTRY["vanilla"]
        loss, metrics = vanilla(old, logp, batch["advantages"], mask, mode, config)
        return {"loss": loss - 0.01 * entropy.mean(), "entropy": entropy.mean(), **metrics}

    return stepped(policy.parameters(), steps, step)


def openrlhf(
    steps: int, handle: Any, *, trainer: str, lora: tuple[str, ...] = (), temperature: float = 1.0
) -> Logs:
    """OpenRLHF's Actor and its losses, as its SFT, DPO and PPO trainers call them."""
    losses = importlib.import_module("openrlhf.models.loss")
    actor = importlib.import_module("openrlhf.models.actor").Actor(llama(lora))
    actor.temperature, actor.packing_samples = temperature, False
    answer = torch.ones(BATCH, ANSWER, dtype=torch.bool)

    def step(batch: dict[str, Tensor]) -> dict[str, Any]:
        given = (batch["input_ids"],)
        mask = {"attention_mask": batch["attention_mask"]}
        if trainer == "PPO":
            logp, output = actor(*given, answer, **mask, return_output=True, return_entropy=True)
            old = logp.detach() + 0.5 * batch["advantages"].sin()
            loss, clipped, kl, *_ = losses.PolicyLoss()(logp, old, batch["advantages"], answer)
            entropy = output.entropy[:, -ANSWER:].mean()
            return {"loss": loss - 0.01 * entropy, "clipped": clipped, "kl": kl, "entropy": entropy}
        logp, _ = actor(*given, **mask, return_output=True, return_logprobs=True)
        if trainer == "SFT":
            return {"loss": losses.SFTLoss()(logp, batch["loss_weights"][:, 1:])}
        chosen, rejected = (logp * batch["loss_weights"][:, 1:]).sum(-1).chunk(2)
        loss, *rewards = losses.DPOLoss(beta=0.1)(chosen, rejected, chosen.detach() + 1, rejected.detach())
        return {"loss": loss, **{f"reward {i}": x.mean() for i, x in enumerate(rewards)}}

    return stepped(actor.parameters(), steps, step)


def llamafactory(steps: int, handle: Any, *, lora: tuple[str, ...] = (), accumulation: int = 1) -> Logs:
    """`fit` of LLaMA-Factory's v1 SFT trainer, with batches that need no tokenizer."""
    trainers = importlib.import_module("llamafactory.v1.trainers.sft_trainer")
    callbacks = importlib.import_module("llamafactory.v1.utils.callbacks")
    logs: Logs = []

    class Recorder(callbacks.TrainerCallback):  # type: ignore[name-defined]
        def on_step_end(self, args: Any, state: Any, **_: Any) -> None:
            logs.append({"loss": state.loss, "grad_norm": state.grad_norm})

    class Micro(list):
        set_epoch = staticmethod(lambda epoch: None)

    trainer = object.__new__(trainers.SFTTrainer)
    policy = llama(lora)
    tokens = ("input_ids", "attention_mask", "labels", "loss_weights")
    rows = [{k: batch[k] for k in tokens} for batch in batches(steps * accumulation)]
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    vars(trainer).update(
        args=SimpleNamespace(dist_config=None, max_grad_norm=1.0, logging_steps=1, save_steps=None),
        model=policy,
        device=torch.device("cpu"),
        dp_size=1,
        global_step=0,
        num_training_steps=steps,
        train_batch_generator=Micro(rows[i::steps] for i in range(steps)),
        optimizer=torch.optim.SGD(parameters, lr=0.1),
        _deepspeed_engine=None,
        _resume_epoch=0,
        callback_handler=callbacks.CallbackHandler([Recorder()], trainer=trainer),
        state=callbacks.TrainerState(num_training_steps=steps),
    )
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda step: 1.0)
    trainer.fit()
    return logs


def axolotl(steps: int, handle: Any, *, lora: tuple[str, ...] = (), new_tokens: int = 0) -> Logs:
    """Axolotl's ModelLoader and its trainer, with the plugin if `handle` is given."""
    loaders: Any = importlib.import_module("axolotl.loaders.model")
    config: Any = importlib.import_module("axolotl.utils.dict").DictDefault
    plugins: Any = importlib.import_module("axolotl.integrations.base").PluginManager.get_instance()
    with tempfile.TemporaryDirectory() as folder:
        llama().save_pretrained(folder)
        plugins.plugins.clear()
        if handle is not None:
            plugins.register("fastalign.integrations.axolotl.FastalignPlugin")
            assert plugins.plugins, "Axolotl only logs that it could not import a plugin"
        settings: dict[str, Any] = {
            **dict.fromkeys(("base_model", "base_model_config"), folder),
            **dict.fromkeys(("type_of_model", "model_type"), "LlamaForCausalLM"),
            **dict.fromkeys(("device", "device_map"), "cpu"),
            **dict.fromkeys(("context_parallel_size", "tensor_parallel_size"), 1),
            **{"torch_dtype": torch.float32, "sequence_len": 64, "attn_implementation": "sdpa"},
            **{"model_config_type": "llama", "mean_resizing_embeddings": False},
        }
        if lora:
            settings |= {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
            settings |= {"lora_target_modules": [*lora]}
            settings |= {"lora_modules_to_save": ["lm_head", "embed_tokens"] if new_tokens else None}
        words = tokenizer(TINY.vocab + new_tokens)
        torch.manual_seed(0)
        policy, _ = loaders.ModelLoader(config(settings), words).load()
        kept = ("input_ids", "attention_mask", "labels")
        rows = [{k: v[0].tolist() for k, v in batch.items() if k in kept} for batch in batches(8, 1)]
        quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
        sizes = {"max_steps": steps, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        prm: Any = ModuleType("trl.experimental.prm")  # TRL 1.9 has it, newer ones do not
        prm.PRMConfig = tf.TrainingArguments
        sys.modules.setdefault(prm.__name__, prm)
        trainers: Any = importlib.import_module("axolotl.core.trainers.base")
        arguments: Any = importlib.import_module("axolotl.core.training_args").AxolotlTrainingArguments
        trainer = trainers.AxolotlTrainer(
            policy,
            arguments(folder, logging_steps=1, learning_rate=1e-3, **sizes, **quiet),
            train_dataset=Dataset.from_list(rows),
            processing_class=words,
            data_collator=tf.default_data_collator,
        )
        trainer.remove_callback(tf.PrinterCallback)
        trainer.train()
    return [{k: line[k] for k in ("loss", "grad_norm") if k in line} for line in trainer.state.log_history]


def run(
    train: Callable[..., Logs], steps: int, patch: Callable[[], Any] | None, **options: Any
) -> tuple[Logs, Any]:
    """What a training logs, and the handle of the patch, if there is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        with nullcontext() if patch is None else patch() as handle:
            return train(steps, handle, **options), handle
