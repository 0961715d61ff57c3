"""The ids that a rollout's filters kept at each token, and ratios under the filtered policy."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign import linear_logprobs
from fastalign.causal_lm import fuse_head
from fastalign.rollout import Rollout, generation
from fastalign_kernels.sampling_kept import KeptRows
from tests.rollout.tiny_rollouts import assert_same, draw, llama, prompts

FILTERS: list[dict[str, Any]] = [
    {"top_p": 0.9},
    {"top_k": 5, "temperature": 0.7},
    {"min_p": 0.2, "top_k": torch.tensor([0, 3, 7, 1])},
]


def whole(drawn: Rollout) -> dict[str, Tensor]:
    """A model's arguments for the prompts followed by the rollout."""
    ids, mask = prompts()
    attention = torch.cat((mask, drawn.mask.long()), 1)
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    return {
        "input_ids": torch.cat((ids, drawn.tokens), 1),
        "attention_mask": attention,
        "position_ids": positions,
    }


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_each_token_has_the_set_that_the_filter_kept(options: dict[str, Any]) -> None:
    model = llama()
    eos = int(draw(model, **options).tokens[1, 6])
    drawn = draw(model, **options, eos_id=eos, return_kept=True)
    assert_same(drawn._replace(kept_ids=None), draw(model, **options, eos_id=eos))
    assert drawn.kept_ids is not None and drawn.kept_ids.ids.dtype == torch.int32
    T = prompts()[0].shape[1]
    with torch.no_grad():
        z = model(**whole(drawn)).logits[:, T - 1 : -1] / options.get("temperature", 1.0)
    logp = z.log_softmax(-1)
    offsets = drawn.kept_ids.offsets.tolist()
    sizes = drawn.kept_ids.offsets.diff().view(drawn.mask.shape)
    assert torch.equal(sizes > 0, drawn.mask) and not drawn.mask.all()
    for place, (row, column) in enumerate(
        torch.cartesian_prod(*map(torch.arange, drawn.mask.shape)).tolist()
    ):
        kept = drawn.kept_ids.ids[offsets[place] : offsets[place + 1]].long()
        if drawn.mask[row, column]:
            table = logp[row, column]
            assert drawn.tokens[row, column] in kept
            assert set(kept.tolist()) == set(table.topk(len(kept)).indices.tolist())
            mass = table[kept].logsumexp(0)
            assert mass.item() == pytest.approx(drawn.log_kept[row, column].item(), abs=1e-5)


def test_ratios_over_the_kept_ids_are_1_and_over_the_vocabulary_are_not() -> None:
    model = fuse_head(llama())
    drawn = draw(model, top_p=0.9, return_kept=True)
    T = prompts()[0].shape[1]
    with torch.no_grad():
        hidden = model.model(**whole(drawn)).last_hidden_state[:, T - 1 : -1]
    head = model.lm_head.weight
    exact = linear_logprobs(hidden, head, drawn.tokens, kept=drawn.kept_ids)
    unfiltered = linear_logprobs(hidden, head, drawn.tokens)
    assert (exact - drawn.logp)[drawn.mask].exp().sub(1).abs().max() < 1e-5
    ratio = (unfiltered - drawn.logp)[drawn.mask].exp()
    assert 0.85 < ratio.mean() < 0.97 and ratio.max() < 1
    # In the model's own forward, beside each position.
    offsets, ids = drawn.kept_ids  # type: ignore[misc]
    B, R = drawn.mask.shape
    labels = torch.cat(
        (prompts()[0].new_full((B, T - 1), -100), drawn.tokens, prompts()[0].new_full((B, 1), -100)), 1
    )
    sizes = torch.nn.functional.pad(offsets.diff().view(B, R), (T - 1, 1))
    sets = torch.nn.functional.pad(sizes.flatten().cumsum(0), (1, 0)), ids
    output = model(**whole(drawn), shift_labels=labels, token_stats=True, kept=sets)
    torch.testing.assert_close(output.logp[:, T - 1 : -1], exact)
    assert output.entropy is None
    with pytest.raises(ValueError, match="kept: got sets without token_stats"):
        model(**whole(drawn), shift_labels=labels, kept=sets)
    with pytest.raises(ValueError, match="kept: got sets without token_stats"):
        model(**whole(drawn), kept=sets)  # without labels its own forward would leave them out


def test_rows_that_draw_nothing_keep_nothing() -> None:
    drawn = draw(llama(), top_p=0.9, finished=torch.ones(4, dtype=torch.bool), return_kept=True)
    assert drawn.kept_ids is not None
    assert drawn.kept_ids.offsets.tolist() == [0] and drawn.kept_ids.ids.numel() == 0
    with pytest.raises(ValueError, match="return_kept: got 1"):
        draw(llama(), return_kept=1)


@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"top_k": 5, "repetition_penalty": 1.3}], ids=str)
def test_the_sets_of_a_step_follow_from_what_a_graph_overwrites(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """A replayed graph makes no new tensors: it fills those of the step that was captured."""
    expected = draw(llama(), **options, return_kept=True)

    def replayed(step: Any, *, capture: bool, name: str) -> Iterator[None]:
        assert capture
        state = step.__self__
        captured = KeptRows(*(tensor.clone() for tensor in state.kept_rows))
        while True:
            step()
            for memory, new in zip(captured, state.kept_rows, strict=True):
                memory.copy_(new)
            state.kept_rows = captured
            yield

    monkeypatch.setattr(generation, "can_capture", lambda *_: True)
    monkeypatch.setattr(generation, "run_steps", replayed)
    assert_same(draw(llama(), **options, return_kept=True), expected)
