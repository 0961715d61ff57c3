"""The files of a model's folder, checked by their names and sizes: nothing large is read or imported."""

import json
from pathlib import Path

INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# One of these makes a tokenizer.
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "vocab.bpe"),
    *("spiece.model", "sentencepiece.bpe.model", "tekken.json", "tiktoken.model"),
)
_POINTER = b"version https://git-lfs"
_LONGEST_HEADER = 10**8  # bytes, of safetensors


def check_weights(field: str, folder: Path) -> None:
    """Raise ValueError, which begins with `field`, for a file of weights that is missing or cut off."""
    listed: set[str] = set()
    for index in (folder / name for name in INDICES):
        if index.is_file():
            listed.update(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
            missing = sorted(name for name in listed if not (folder / name).is_file())
            if missing:
                raise ValueError(
                    f"{field}: got folder {str(folder)!r} without {', '.join(missing[:3])}, expected the "
                    f"{len(listed)} files that {index.name} lists"
                )
    parts = sorted(folder.glob("model-*-of-*.safetensors"))
    if parts and not listed and not (folder / "model.safetensors").is_file():
        raise ValueError(
            f"{field}: got folder {str(folder)!r} with {parts[0].name} and without {INDICES[0]}, expected "
            "both"
        )
    for path in sorted(folder.glob("*.safetensors")):
        if fault := _find_fault(path):
            raise ValueError(f"{field}: got {str(path)!r}, which is {fault}, expected a whole file")


def has_tokenizer(name: str) -> bool:
    """Whether a folder has the files of a tokenizer. A name of the hub counts as having them."""
    folder = Path(name)
    return not folder.is_dir() or any((folder / file).is_file() for file in TOKENIZER)


def check_tokenizer(field: str, folder: Path) -> None:
    """Raise ValueError, which begins with `field`, for a folder without the files of a tokenizer."""
    if not has_tokenizer(str(folder)):
        raise ValueError(
            f"{field}: got folder {str(folder)!r} without a tokenizer, expected one there (tokenizer.json), "
            "or tokenizer=FOLDER"
        )


def _find_fault(path: Path) -> str | None:
    """What is wrong with a safetensors file by its size; None if nothing is."""
    size = path.stat().st_size
    with path.open("rb") as file:
        begin = file.read(8)
        if begin == _POINTER[:8]:
            return "a pointer of Git LFS (git lfs pull brings the file)"
        length = int.from_bytes(begin, "little")
        if size < 8 or not 2 <= length <= min(size - 8, _LONGEST_HEADER):
            return f"cut off or damaged at {size} bytes"
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return "damaged in its header"
    expected = 8 + length + max(ends, default=0)
    return None if size == expected else f"of {size} bytes, not of the {expected} that its header says"
