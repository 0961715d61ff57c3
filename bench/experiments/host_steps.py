"""Steps of verl's and OpenRLHF's own trainers on one CPU: their batches, losses, metrics and optimizer steps.

The classes are the installed packages'. Only their constructors, which start Ray, FSDP, DeepSpeed or vLLM,
are passed over: the trainers get a tiny Llama, SGD and a process group of one rank. vLLM, aiohttp and
flash-attn are stubs if they are not installed. What flash-attn does for packing is plain PyTorch here, as it
is there.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.distributed as dist
import transformers as tf
from torch import Tensor

from .host_runs import BATCH, TINY, Logs, llama

STUBS = ("vllm", "aiohttp", "flash_attn", "flash_attn.bert_padding", "flash_attn.utils.distributed")
PROMPTS, ANSWERS = (3, 5, 4, 2), (4, 6, 1, 5)  # tokens of each row


class Stubs(MetaPathFinder, Loader):
    """Finds packages of STUBS that are not installed. Whatever is read from them is a mock."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        known = name in (*STUBS, "flash_attn.utils") or name.startswith(("vllm.", "aiohttp."))
        return importlib.util.spec_from_loader(name, self, is_package=True) if known else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module: Any = ModuleType(spec.name)
        module.__getattr__ = mocked
        return module

    def exec_module(self, module: ModuleType) -> None: ...


def mocked(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock()


@contextmanager
def stubs() -> Iterator[None]:
    """While this lasts, hosts can import what is not installed. Installed packages come first."""
    finder = Stubs()
    sys.meta_path.append(finder)
    try:
        yield
    finally:  # or other packages would think that vLLM is installed
        sys.meta_path.remove(finder)
        for name, module in list(sys.modules.items()):
            if getattr(module, "__loader__", None) is finder:
                del sys.modules[name]


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of one rank while this lasts."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Scalars; of a list (one number a micro-batch) the mean."""
    found = {}
    for name, value in metrics.items():
        parts = value if isinstance(value, list) else [value]
        scalars = [torch.as_tensor(x.aggregate() if hasattr(x, "aggregate") else x) for x in parts]
        found[name] = float(torch.stack([x.float().mean() for x in scalars]).mean().detach())
    return found


# verl


def verl_engine(
    steps: int,
    handle: Any,
    *,
    backend: str | None = "torch",
    padded: bool = False,
    weighted: bool = False,
    loss: str = "vanilla",
    mode: str = "token-mean",
    lora: tuple[str, ...] = (),
) -> Logs:
    """`train_batch` of verl's FSDP engine with its `ppo_loss`: two micro-batches, a KL and an entropy term.

    One row has no token in its response mask. `weighted`: rollout weights, a third of them 0. Without
    fastalign verl's backend is "torch". backend None: verl's logits, without fused kernels.
    """
    engines: Any = importlib.import_module("verl.workers.engine.fsdp.transformer_impl")
    losses: Any = importlib.import_module("verl.workers.utils.losses")
    configs: Any = importlib.import_module("verl.workers.config")
    patches: Any = importlib.import_module("verl.models.transformers.monkey_patch")
    engines.get_device_id = engines.get_device_name = lambda: "cpu"
    config = configs.FSDPActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        entropy_coeff=0.01,
        use_kl_loss=True,
        kl_loss_coef=0.1,
        loss_agg_mode=mode,
        policy_loss=configs.PolicyLossConfig(loss_mode=loss, rollout_correction={"loss_type": "ppo_clip"}),
    )
    plain, policy = tf.LlamaForCausalLM.forward, llama(lora)
    if backend is not None:
        patches.patch_forward_with_backends(
            policy.get_base_model() if lora else policy,
            use_fused_kernels=True,
            fused_kernels_backend="torch" if handle is None else backend,
        )

    class Engine(engines.FSDPEngineWithLMHead):
        __init__ = object.__init__
        get_data_parallel_size = is_mp_src_rank_with_outputs = lambda self: 1
        get_data_parallel_group = lambda self: dist.group.WORLD  # noqa: E731

    engine = Engine()
    vars(engine).update(
        module=policy,
        optimizer=sgd(policy),
        optimizer_config=SimpleNamespace(clip_grad=1.0),
        engine_config=SimpleNamespace(entropy_checkpointing=False, entropy_from_logits_with_chunking=False),
        compute_entropy_from_logits=engines.verl_F.entropy_from_logits,
        use_ulysses_sp=False,
        ulysses_sequence_parallel_size=1,
        pad_to_length=False,
        _qat_enabled=False,
        _autocast_dtype=torch.float32,
    )
    options = {"use_remove_padding": not padded, "use_fused_kernels": backend is not None}
    try:
        with one_rank():
            return [
                numbers(
                    engine.train_batch(verl_batch(step, weighted, options), partial(losses.ppo_loss, config))[
                        "metrics"
                    ]
                )
                for step in range(steps)
            ]
    finally:
        tf.LlamaForCausalLM.forward = plain  # verl replaces the class's


def verl_batch(step: int, weighted: bool, options: dict[str, Any]) -> Any:
    """A batch of nested tensors, as verl's workers get it."""
    utils: Any = importlib.import_module("verl.utils.tensordict_utils")
    generator = torch.Generator().manual_seed(step)
    nested = partial(torch.nested.as_nested_tensor, layout=torch.jagged)

    def per_answer_token(shift: float, scale: float) -> Tensor:
        return nested([shift + scale * torch.randn(length, generator=generator) for length in ANSWERS])

    rows = [
        torch.randint(3, TINY.vocab, (prompt + answer,), generator=generator)
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
    ]
    mask = nested([torch.ones(length, dtype=torch.bool) & (row != 1) for row, length in enumerate(ANSWERS)])
    tensors = {
        "input_ids": nested(rows),
        "position_ids": nested([torch.arange(len(row)) for row in rows]),
        "prompts": nested([row[:prompt] for row, prompt in zip(rows, PROMPTS, strict=True)]),
        "responses": nested([row[prompt:] for row, prompt in zip(rows, PROMPTS, strict=True)]),
        "response_mask": mask,
        "loss_mask": mask,
        "advantages": per_answer_token(0, 1),
        "old_log_probs": per_answer_token(-4, 0.4),
        "ref_log_prob": per_answer_token(-4, 0.4),
    }
    if weighted:
        uniform = [torch.rand(length, generator=generator) for length in ANSWERS]
        tensors["rollout_is_weights"] = nested([2 * x * (x > 1 / 3) for x in uniform])
    given = {
        "temperature": 0.8,
        "calculate_entropy": True,
        "use_dynamic_bsz": False,
        "micro_batch_size_per_gpu": 2,
        "global_batch_size": len(rows),
    }
    return utils.get_tensordict(tensors, non_tensor_dict=given | options)


# OpenRLHF


def openrlhf_step(
    steps: int,
    handle: Any,
    *,
    packed: bool = False,
    temperature: float = 0.7,
    lora: tuple[str, ...] = (),
    **loss: Any,
) -> Logs:
    """`training_step` of OpenRLHF's PPO trainer, with a KL and an entropy term.

    `loss` holds options of `PolicyLoss`. Rows have padding on the left and on the right, and one of them has
    no action token.
    """
    with stubs():
        trainers: Any = importlib.import_module("openrlhf.trainer.ray.ppo_actor")
    experiences: Any = importlib.import_module("openrlhf.trainer.ppo_utils.experience")
    losses: Any = importlib.import_module("openrlhf.models.loss")
    ring: Any = importlib.import_module("openrlhf.models.ring_attn_utils")
    actor: Any = importlib.import_module("openrlhf.models.actor").Actor(llama(lora))
    actor.temperature, actor.packing_samples = temperature, packed
    if packed:
        ring.unpad_input, ring.pad_input, ring.index_first_axis = (
            unpad_input,
            pad_input,
            lambda x, rows: x[rows],
        )
        ring.rearrange = lambda x, pattern: x.flatten(0, 1)  # "b s ... -> (b s) ..."
    optimizer = sgd(actor)
    kl = SimpleNamespace(use_loss=True, init_coef=0.1, estimator="k3", unbiased_gradient=True)

    class Strategy:
        ring_attn_group = None
        norm = 0.0

        def backward(self, value: Tensor, model: Any, optimizer: Any) -> None:
            value.backward()
            self.norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))

        def optimizer_step(self, *_: Any, **__: Any) -> None:
            optimizer.step()
            optimizer.zero_grad()

        def get_grad_norm(self, model: Any) -> float:
            return self.norm

    trainer = object.__new__(trainers.ActorPPOTrainer)
    vars(trainer).update(
        actor=actor,
        strategy=Strategy(),
        actor_loss_fn=losses.PolicyLoss(**loss),
        actor_optim=optimizer,
        actor_scheduler=SimpleNamespace(get_last_lr=lambda: [0.1]),
        args=SimpleNamespace(
            actor=SimpleNamespace(entropy_coef=0.01),
            train=SimpleNamespace(dynamic_batch_enable=False),
            algo=SimpleNamespace(kl=kl),
        ),
        aux_loss=False,
        ema_model=None,
        replay_buffer=None,
    )
    with one_rank():
        return [
            numbers(trainer.training_step(experience(experiences.Experience, step), 0.1, step)["metrics"])
            for step in range(steps)
        ]


def experience(kind: Any, step: int) -> Any:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3, TINY.vocab, (BATCH, 13), generator=generator)
    attention, actions = torch.ones_like(ids), torch.ones(BATCH, 6, dtype=torch.bool)
    attention[1, :3] = attention[2, 11:] = 0
    actions[2, -3:] = actions[3] = False

    def per_action(shift: float, scale: float) -> Tensor:
        return shift + scale * torch.randn(BATCH, 6, generator=generator)

    made = kind(
        sequences=ids,
        attention_mask=attention,
        action_mask=actions,
        action_log_probs=per_action(-4, 0.4),
        base_action_log_probs=per_action(-4, 0.4),
        rollout_log_probs=per_action(-4, 0.4),
        advantages=per_action(0, 1),
        returns=None,
    )
    made.info = {}
    return made


def unpad_input(rows: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """flash-attn's function: the tokens of [B, T, ...] inside the mask, their indices and boundaries."""
    lengths = mask.sum(-1, dtype=torch.int32)
    inside = mask.flatten().nonzero().flatten()
    boundaries = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return rows.flatten(0, 1)[inside], inside, boundaries, lengths.max(), lengths


def pad_input(tokens: Tensor, inside: Tensor, batch: int, length: int) -> Tensor:
    """flash-attn's function, the inverse of `unpad_input`."""
    padded = tokens.new_zeros(batch * length, *tokens.shape[1:])
    return padded.index_put((inside,), tokens).unflatten(0, (batch, length))
