"""Merging: a folder of LoRA adapters becomes a plain model, which transformers loads without PEFT.

fastalign merge model=runs/sft/model output_dir=runs/sft-merged
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .command import run_stage
from .models.adapters import find_source, is_classifier, load_architecture, load_plain
from .models.loading import load_tokenizer, padding_id
from .runs.files import new_folder
from .stage_configs import MergeConfig


def run(config: MergeConfig) -> Path:
    """Merge as configured; return the folder.

    Raises ValueError for a model without adapters, a base that is not found or does not fit, and an
    output_dir that holds files.
    """
    source = find_source(config.model)
    if not source.adapters:
        raise ValueError(
            f"model: got {config.model!r}, expected a folder of adapters (with an adapter_config.json)"
        )
    folder = Path(config.output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"output_dir: got {config.output_dir!r}, which holds files, expected a new or empty folder"
        )
    tokenizer = load_tokenizer(config.model)
    architecture = load_architecture(config.model, task="SEQ_CLS")
    classifier = is_classifier(source, architecture)
    options: dict[str, Any] = {"num_labels": len(architecture.id2label)} if classifier else {}
    model = load_plain(
        config.model, task="SEQ_CLS" if classifier else "CAUSAL_LM", dtype=config.dtype, **options
    )
    text = model.config.get_text_config()
    if classifier and text.pad_token_id is None:
        # transformers finds the last token of each row by it
        text.pad_token_id = padding_id(tokenizer, text)
    with new_folder(folder) as unfinished:
        model.save_pretrained(str(unfinished))
        tokenizer.save_pretrained(str(unfinished))
    print(f"{config.output_dir}: {' and '.join(source.adapters)} merged into {source.base}", flush=True)
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: `--config FILE key=value …`."""
    run_stage("merge", run, argv)


if __name__ == "__main__":
    main()
