"""Sentences in the form of the demo's corpus."""

import io
import random
import tarfile
import zipfile
from pathlib import Path

from fastalign.demo import sentences
from fastalign.demo.sentences import Sentence

GOOD = ["warm", "bright", "lovely", "great", "fine"]


BAD = ["dull", "awful", "boring", "bad", "poor"]


NEUTRAL = [
    "the",
    "film",
    "a",
    "story",
    "of",
    "actors",
    "and",
    "scenes",
    "in",
    "it's",
    "well-made",
    "(2002)",
    "Touché",
    "café",
    "–",
]


def sentence(number: int) -> Sentence:
    """6 to 14 words whose sentiment and rating agree; no two alike."""
    chance = random.Random(number)
    words = chance.choices(NEUTRAL + (GOOD if number % 2 else BAD), k=chance.randrange(6, 15))
    return Sentence((number % 7 + 1) / 2 * (1 if number % 2 else -1), f"{' '.join(words)} {number}.")


SENTENCES = [sentence(number) for number in range(160)]


def lines_of(sentences: list[Sentence]) -> bytes:
    """As in the original: CRLF, none after the last line."""
    return "\r\n".join(
        f"{number}\t{sentence.rating}\t{sentence.text}" for number, sentence in enumerate(sentences, 1)
    ).encode()


def archive_of(
    content: bytes, path: Path, *, tar_name: str = "hutto_ICWSM_2014.tar.gz", name: str = sentences.INNER_FILE
) -> Path:
    """A zip laid out as vaderSentiment's source distribution."""
    tar_bytes = io.BytesIO()
    with tarfile.open(fileobj=tar_bytes, mode="w:gz") as tar:
        for member, data in (("_README_.txt", b"read me"), (name, content)):
            info = tarfile.TarInfo(f"hutto_ICWSM_2014/{member}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("vaderSentiment-0.5/setup.py", "")
        archive.writestr(f"vaderSentiment-0.5/additional_resources/{tar_name}", tar_bytes.getvalue())
    return path
