"""Names of models on the hub: what the hub says against one is told by the name of the field."""

from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from fastalign.stages.models import hub_names


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            errors.GatedRepoError.__new__(errors.GatedRepoError),
            "granted access only; log in with `hf auth login`",
        ),
        (errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError), "the hub has no such model"),
        (ConnectionError("no route"), r"the hub cannot be reached \(no route\)"),
        (errors.HfHubHTTPError.__new__(errors.HfHubHTTPError), None),
    ],
    ids=["gated", "absent", "unreachable", "other"],
)
def test_what_the_hub_says_against_a_name_is_told(
    error: Exception, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    hub_names.check_name.cache_clear()
    if told is None:
        hub_names.check_name("model", "someone/something")
    else:
        with pytest.raises(ValueError, match=f"model: .*someone/something.*{told}"):
            hub_names.check_name("model", "someone/something")
    hub_names.check_name.cache_clear()
