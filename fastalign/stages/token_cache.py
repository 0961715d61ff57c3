"""Tokenized rows in memory-mapped files, so that one process tokenizes and all read.

A folder of the cache is named by the hash of all on which its rows depend: the data, the tokenizer with its
chat template, the tokenization and its options, and the code. It holds

    tokens.npy: int32, the tokens of all sequences, one after another.
    trained.npy: bool, of the same length.
    sequences.npy, rows.npy: int64, where each sequence and each row begins and ends.
    extra.npy, extra-places.npy: what a row holds beside its sequences, as JSON, and where it lies.
    meta.json: the kind of the rows, the ids that end turns, and the warnings that tokenization gave.
    manifest.sha256: the hashes of these files.

It is written to a temporary folder, synced and renamed. With several processes the first one on each disk
tokenizes or finds the folder, and verifies it. The others map it.
"""

import hashlib
import inspect
import json
import time
import warnings
from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np
from transformers import PreTrainedTokenizerBase

from .. import data
from ..data.preference_pairs import Pair, Unpaired
from ..data.readers import load_rows, note_fingerprint
from ..data.rows import Rows
from ..data.tokens import Prompt, Tokenized
from .config import TrainConfig
from .runs.checkpoint_storage import Ranks
from .runs.distributed import World
from .runs.files import MANIFEST, find_change, list_hashes, new_folder, write_hashes
from .runs.run_folder import held

Row = TypeVar("Row")
ARRAYS = ("tokens", "trained", "sequences", "rows", "extra", "extra-places")


class TokenizedRows(NamedTuple):
    """The rows of a source, and the ids that end a turn in them."""

    rows: Sequence[Any]
    ends: list[int]


class Kind(NamedTuple):
    """How a type of rows becomes sequences and what JSON holds, and back."""

    flatten: Callable[[Any], tuple[list[Tokenized], Any]]
    build: Callable[[list[Tokenized], Any], Any]


KINDS = {
    "list": Kind(lambda row: (row, None), lambda sequences, extra: sequences),
    "Pair": Kind(
        lambda pair: ([pair.chosen, pair.rejected], pair.margin),
        lambda sequences, margin: Pair(sequences[0], sequences[1], margin),
    ),
    "Unpaired": Kind(
        lambda row: ([row.answered], row.desirable), lambda sequences, label: Unpaired(sequences[0], label)
    ),
    "Prompt": Kind(
        lambda prompt: ([Tokenized(prompt.input_ids, [False] * len(prompt.input_ids))], dict(prompt.row)),
        lambda sequences, columns: Prompt(sequences[0].input_ids, columns),
    ),
}


class CachedRows(Sequence[Row]):
    """The rows in a folder of the cache, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS]
        self._tokens, self._trained, self._sequences, self._rows, self._extra, self._places = arrays
        self._build = KINDS[json.loads((folder / "meta.json").read_text(encoding="utf-8"))["kind"]].build

    def __len__(self) -> int:
        return len(self._rows) - 1

    @overload
    def __getitem__(self, key: int) -> Row: ...
    @overload
    def __getitem__(self, key: slice) -> list[Row]: ...
    def __getitem__(self, key: int | slice) -> Row | list[Row]:
        if isinstance(key, slice):
            return [self[number] for number in range(len(self))[key]]
        number = range(len(self))[key]
        first, end = self._rows[number : number + 2].tolist()
        bounds = self._sequences[first : end + 1].tolist()
        sequences = [
            Tokenized(self._tokens[begin:stop].tolist(), self._trained[begin:stop].tolist())
            for begin, stop in zip(bounds, bounds[1:], strict=False)
        ]
        begin, stop = self._places[number : number + 2].tolist()
        row: Row = self._build(sequences, json.loads(self._extra[begin:stop].tobytes()))
        return row


class TokenCache:
    """The cache of a run: where it lies, and which process of a disk fills it."""

    def __init__(self, config: TrainConfig, world: World, tokenizer: PreTrainedTokenizerBase) -> None:
        self.folder = Path(config.cache_dir or Path(config.output_dir, "tokens"))
        self.world, self.tokenizer = world, tokenizer
        self.ranks = Ranks(world, self.folder)

    def read(
        self, source: str, split: str, tokenize: partial[Any], ends_of: Callable[[Rows], list[int]]
    ) -> TokenizedRows:
        """The rows of a source by `tokenize`, of which all but the tokenizer's keywords are in the hash.

        Every rank calls it. Rows that JSON cannot hold are tokenized by each process, which is said.
        """
        name, reason = None, ""
        if self.ranks.leads:
            name, reason = self._fill(source, split, tokenize, ends_of)
        self._wait_for_leader(source, split)
        names = self.ranks.gather((name, reason))
        name, reason = names[self.ranks.disks[self.world.rank]]
        if name is None:
            self.world.say(f"cache_dir: {source} is tokenized by each process, because {reason}")
            loaded = load_rows(source, split=split)
            return TokenizedRows(tokenize(loaded), ends_of(loaded))
        meta = json.loads((self.folder / name / "meta.json").read_text(encoding="utf-8"))
        note_fingerprint(source, split=split, fingerprint=meta["data"])
        return TokenizedRows(CachedRows(self.folder / name), meta["ends"])

    def _fill(
        self, source: str, split: str, tokenize: partial[Any], ends_of: Callable[[Rows], list[int]]
    ) -> tuple[str | None, str]:
        """The name of the source's folder, which is written if it is not there; or None and why not."""
        loaded = load_rows(source, split=split)
        name = key_of(loaded, self.tokenizer, tokenize)
        path = self.folder / name
        # Another run that shares the folder may be at it.
        with held("cache_dir", self.folder, name=f"{name}.lock", wait=True):
            if path.exists() and (damage := _find_damage(path)):
                self.world.say(f"cache_dir: {path} is damaged ({damage}) and written again")
            elif path.exists():
                meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
                for text, file, line in meta["warnings"]:
                    warnings.warn_explicit(text, UserWarning, file, line)
                self.world.say(f"tokens: the {meta['number']:,} rows of {source} are read from {path}")
                return name, ""
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                rows = tokenize(loaded)
            for warning in caught:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
            told = [[str(warning.message), warning.filename, warning.lineno] for warning in caught]
            meta = {"data": loaded.fingerprint, "ends": ends_of(loaded), "warnings": told}
            try:
                with new_folder(path) as unfinished:
                    write_rows(unfinished, rows, meta)
            except _NotJson as error:
                return None, str(error)
            self.world.say(f"tokens: the {len(rows):,} rows of {source} are written to {path}")
        return name, ""

    def _wait_for_leader(self, source: str, split: str) -> None:
        """Wait however long it takes: a collective would fail after `timeout` minutes."""
        watch = self.world.watch
        if watch is None:
            self.ranks.barrier()
            return
        done = f"tokens/{self.ranks.disks[self.world.rank]}/{source}/{split}"
        if self.ranks.leads:
            watch.store.set(done, "")
        while not watch.store.check([done]):
            time.sleep(0.2)


class _NotJson(ValueError):
    """A row holds what JSON does not give back."""


def write_rows(folder: Path, rows: Sequence[Any], meta: Mapping[str, Any]) -> None:
    """Write the files of a folder. Raises _NotJson for a row whose columns JSON does not give back."""
    kind = type(rows[0]).__name__
    tokens, trained, extra = array("i"), bytearray(), bytearray()
    sequence_places, row_places, extra_places = array("q", [0]), array("q", [0]), array("q", [0])
    for number, row in enumerate(rows):
        sequences, beside = KINDS[kind].flatten(row)
        for sequence in sequences:
            tokens.extend(sequence.input_ids)
            trained.extend(sequence.trained)
            sequence_places.append(len(tokens))
        row_places.append(len(sequence_places) - 1)
        extra += _to_json(beside, number)
        extra_places.append(len(extra))
    values = (
        np.frombuffer(tokens, np.int32),
        np.frombuffer(trained, np.bool_),
        *(np.frombuffer(places, np.int64) for places in (sequence_places, row_places)),
        np.frombuffer(extra, np.uint8),
        np.frombuffer(extra_places, np.int64),
    )
    for name, value in zip(ARRAYS, values, strict=True):
        np.save(folder / f"{name}.npy", value)
    (folder / "meta.json").write_text(json.dumps({**meta, "kind": kind, "number": len(rows)}))
    write_hashes(folder, folder / MANIFEST, [*(f"{name}.npy" for name in ARRAYS), "meta.json"])


def _to_json(value: Any, number: int) -> bytes:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError) as error:
        raise _NotJson(f"its row {number + 1} holds what JSON cannot: {error}") from error
    if json.loads(text) != value:
        raise _NotJson(f"JSON changes the columns of its row {number + 1}")
    return text.encode()


def _find_damage(folder: Path) -> str | None:
    manifest = folder / MANIFEST
    if not manifest.exists():
        return f"it has no {MANIFEST}"
    hashes = list_hashes(manifest)
    if hashes is None or "meta.json" not in hashes:
        return f"{MANIFEST} is not whole"
    return find_change(folder, manifest, hashes)


def key_of(rows: Rows, tokenizer: PreTrainedTokenizerBase, tokenize: partial[Any]) -> str:
    """A hash of all on which the tokens of rows depend; the name of their folder."""
    parts = {
        "data": rows.fingerprint,
        "tokenizer": describe_tokenizer(tokenizer),
        "tokenization": f"{tokenize.func.__module__}.{tokenize.func.__qualname__}",
        "options": {name: value for name, value in tokenize.keywords.items() if name != "tokenizer"},
        "code": _hash_code(inspect.getfile(tokenize.func)),
        "packages": [version(package) for package in ("transformers", "tokenizers")],
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """All of a tokenizer that decides tokens, special ones and the chat template included."""
    options = {name: value for name, value in tokenizer.init_kwargs.items() if name != "name_or_path"}
    described = (*_vocabulary_and_template(tokenizer), options)
    return [type(tokenizer).__name__, *(json.dumps(part, sort_keys=True, default=str) for part in described)]


def _vocabulary_and_template(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, Any, Any]:
    """The vocabulary, the special tokens and the chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    return vocabulary, tokenizer.special_tokens_map, tokenizer.chat_template


def note_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let `tokenizer_digest` answer for the tokenizer of this process's run."""
    described = repr(_vocabulary_and_template(tokenizer))
    _digests[:] = [hashlib.blake2b(described.encode(), digest_size=16).hexdigest()]


def tokenizer_digest() -> str | None:
    """A hash of the vocabulary, special tokens and chat template of the run's tokenizer, or None."""
    return _digests[0] if _digests else None


_digests: list[str] = []


@lru_cache
def _hash_code(tokenization: str) -> str:
    """A hash of the source files that read and tokenize."""
    digest = hashlib.blake2b(digest_size=16)
    files = [path for module in data.__path__ for path in sorted(Path(module).rglob("*.py"))]
    for path in [*files, Path(__file__), Path(tokenization)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()
