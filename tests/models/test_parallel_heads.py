"""fuse_head on models that transformers sharded by its tp_plan, on two ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import parallel_ranks
from tests.models.tiny_models import batch, llama, model_nll, shift
from tests.models.tiny_models import gradients as model_gradients
from tests.two_ranks import run_as_two_ranks

pytestmark = pytest.mark.cpu_only


def model_of(case: str) -> Any:
    tied, _ = parallel_ranks.CASES[case]
    return llama(tie_word_embeddings=tied).double()


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("parallel")
    for case in parallel_ranks.CASES:
        model_of(case).save_pretrained(folder / case)
    run_as_two_ranks(parallel_ranks.__file__, folder)
    return torch.load(folder / "result.pt")


@pytest.mark.parametrize("case", parallel_ranks.CASES)
def test_a_fused_parallel_model_equals_a_whole_one(result: dict[str, Any], case: str) -> None:
    loss, gradients, same_logits = result[case]
    model = model_of(case)
    inputs, labels = batch(rows=4)
    nll = model_nll(model, inputs, shift(labels)).sum() / (shift(labels) != -100).sum()
    expected = model_gradients(model, nll)
    torch.testing.assert_close(loss, nll.detach(), rtol=1e-12, atol=0)
    assert gradients.keys() == expected.keys() and same_logits
    for name, gradient in expected.items():
        floor = 1e-12 * gradient.abs().max().item()
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-10, atol=floor)


def test_a_rollout_of_a_parallel_model_is_refused(result: dict[str, Any]) -> None:
    assert "is sharded over ranks (DTensor), expected a whole model on each rank" in result["generate"]
