"""Names of models and tokenizers, looked up in folders, in the hub's cache and on the hub.

This happens before anything large is imported.

transformers asks a hub that cannot be reached for each file again and again, for 23 seconds and more. Here it
is asked once.
"""

import os
import sys
from functools import lru_cache
from pathlib import Path

from ..config import Options
from ..policy_configs import is_function
from .model_files import check_tokenizer, check_weights

FIELDS = ("model", "tokenizer", "reward", "value_model")
SECONDS = 3.0  # that the hub has to answer
_FILES = ("config.json", "adapter_config.json", "tokenizer_config.json", "tokenizer.json")


def check_names(config: Options) -> None:
    """Check each field that names a model or a tokenizer with `check_name`."""
    for field in FIELDS:
        name = getattr(config, field, None)
        if name is not None and not (field == "reward" and is_function(name)):
            check_name(field, name)
    model = getattr(config, "model", None)
    if model is None or getattr(config, "tokenizer", "") is not None:
        return
    if Path(model, _FILES[0]).is_file():  # adapters have their base's tokenizer
        check_tokenizer("model", Path(model))


@lru_cache
def check_name(field: str, name: str) -> None:
    """Raise ValueError if `name` is no folder, is not in the hub's cache and is not found on the hub.

    If the hub cannot be reached, the cache is used without asking again, which is printed once.
    """
    if Path(name).is_dir():
        if field != "tokenizer" and not any(Path(name, file).is_file() for file in _FILES[:2]):
            inside = Path(name, "model")
            hint = f"; did you mean {str(inside)!r}?" if inside.is_dir() else ""
            raise ValueError(
                f"{field}: got folder {name!r} without config.json, expected a model's folder{hint}"
            )
        if field == "tokenizer":
            check_tokenizer(field, Path(name))
        else:
            check_weights(field, Path(name))
        return
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    try:
        cached = any(isinstance(try_to_load_from_cache(name, file), str) for file in _FILES)
    except HFValidationError:
        raise ValueError(
            f"{field}: got {name!r}, expected a folder here, or the name of a model on the hub"
        ) from None
    refusal = f"{field}: got {name!r}, expected a folder here, or a model in the cache or on the hub"
    try:
        get_hf_file_metadata(hf_hub_url(name, _FILES[0]), timeout=SECONDS)
    except GatedRepoError:
        if not cached:
            reason = "the hub gives it to those who were granted access only; log in with `hf auth login`"
            raise ValueError(f"{refusal}: {reason}") from None
    except RepositoryNotFoundError:
        if not cached:
            reason = "the hub has no such model (if it is private: `hf auth login`)"
            raise ValueError(f"{refusal}: {reason}") from None
    except HfHubHTTPError:
        return  # the hub can be reached; transformers reports why it refuses this
    except Exception as error:
        # Of a class that depends on huggingface_hub's version: requests', httpx's or its own.
        if not cached:
            reason = f"the hub cannot be reached ({error})"
            raise ValueError(f"{refusal}: {reason}") from None
        _go_offline()


def _go_offline() -> None:
    """Let huggingface_hub, transformers and datasets read their caches without asking the hub."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        print("the hub cannot be reached: models come from the cache", file=sys.stderr, flush=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
