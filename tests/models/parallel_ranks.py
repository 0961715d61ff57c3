"""A rank of the tests of fuse_head on tensor-parallel models: `parallel_ranks.py FOLDER RANK RANKS`.

FOLDER has a saved model for each case; rank 0 writes FOLDER/result.pt.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers as tf
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig

from fastalign.causal_lm import fuse_head, unfuse_head
from fastalign.probe import UnsupportedModelError
from fastalign.rollout import generate
from tests.models.tiny_models import batch
from tests.two_ranks import be_a_rank

# Case: whether embeddings are tied, and how transformers places lm_head.
CASES = {
    "untied": (False, "colwise_gather_output"),
    "tied": (True, "colwise_gather_output"),
    "colwise_rep": (False, "colwise_rep"),
    "colwise": (False, "colwise"),
}


def loss_and_gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    inputs, labels = batch(rows=4)
    model.zero_grad()
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return loss.detach(), {
        name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in gradients.items()
    }


def refusal(call: Any) -> str:
    try:
        call()
    except (UnsupportedModelError, ValueError) as error:
        return str(error)
    return "nothing"


def run_rank(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    ranks = int(sys.argv[3])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=ranks)
    result: dict[str, Any] = {}
    for case, (_, style) in CASES.items():
        config = DistributedConfig(tp_size=ranks, tp_plan={"lm_head": style})
        model = tf.AutoModelForCausalLM.from_pretrained(
            folder / case, distributed_config=config, dtype=torch.float64
        )
        inputs, _ = batch(rows=4)
        with torch.no_grad():
            before = model(**inputs).logits
        fuse_head(model)
        with torch.no_grad():
            same_logits = torch.equal(model(**inputs).logits, before)
        result[case] = (*loss_and_gradients(model), same_logits)
        if case == "tied":
            prompt = {"max_new_tokens": 2, "seed": 0, "eos_id": 0, "pad_id": 0}
            result["generate"] = refusal(
                lambda model=model, inputs=inputs, prompt=prompt: generate(
                    model, inputs["input_ids"], torch.ones_like(inputs["input_ids"]), **prompt
                )
            )
        unfuse_head(model)
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, before)
    if rank == 0:
        torch.save(result, folder / "result.pt")
    dist.barrier()


if __name__ == "__main__":
    be_a_rank(run_rank)
