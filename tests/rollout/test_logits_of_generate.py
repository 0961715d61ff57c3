"""Where a rollout's token differs from that of transformers' generate: logits and scores are compared."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.rollout.tiny_rollouts import CONFIGS, NEW, PAD, build, calls_of, draw, prompts

pytestmark = pytest.mark.hosts


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2-alternating-window"])
def test_where_a_batch_of_generate_draws_another_token_its_penalty_had_counted_the_padding(
    name: str,
) -> None:
    """The logits of the static cache are those of generate's cache up to the first such token, windows' edges
    included.

    transformers 5.17 takes the id of the padding for drawn (seen on an H200's host: mistral-window, the last
    token of row 3, 0 for 87). Later versions do not.
    """
    model = build(CONFIGS[name]())
    ids, mask = prompts()
    ours: list[Tensor] = []
    with calls_of(model, lambda logits, _: ours.append(logits[:, -1].clone())):
        tokens = draw(model, temperature=0.0, repetition_penalty=1.4).tokens
    batch = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=PAD,
        repetition_penalty=1.4,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
    )
    theirs = batch.sequences[:, ids.shape[1] :]
    agreed = torch.ones(len(ids), dtype=torch.bool)
    for column in range(NEW):
        torch.testing.assert_close(
            ours[column][agreed], batch.logits[column][agreed], rtol=0, atol=4e-6, msg=f"column {column}"
        )
        for row in (agreed & (tokens[:, column] != theirs[:, column])).nonzero()[:, 0].tolist():
            penalised = batch.scores[column][row, PAD] != batch.logits[column][row, PAD]
            counted = mask[row, 0] == 0 and PAD not in tokens[row, :column]
            assert tokens[row, column] == PAD and penalised and counted, (row, column)
        agreed &= tokens[:, column] == theirs[:, column]
