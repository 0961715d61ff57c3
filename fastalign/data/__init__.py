"""Training data: from files of rows to batches of tokens. README.md says which file does what."""

from .errors import DataError
from .packing import check_packing, collate, pack
from .preference_pairs import (
    Pair,
    Unpaired,
    collate_pairs,
    collate_unpaired,
    mismatch,
    mismatch_bounds,
    tokenize_pairs,
    tokenize_unpaired,
)
from .readers import load_rows
from .rows import Rows
from .sequence_batches import last_tokens, pack_sequences, sequence_logps
from .tokenization import tokenize_prompts, tokenize_sft, tokenize_text, turn_ends
from .tokens import Prompt, Tokenized

__all__ = [
    "DataError",
    "Pair",
    "Prompt",
    "Rows",
    "Tokenized",
    "Unpaired",
    "check_packing",
    "collate",
    "collate_pairs",
    "collate_unpaired",
    "last_tokens",
    "load_rows",
    "mismatch",
    "mismatch_bounds",
    "pack",
    "pack_sequences",
    "sequence_logps",
    "tokenize_pairs",
    "tokenize_prompts",
    "tokenize_sft",
    "tokenize_text",
    "tokenize_unpaired",
    "turn_ends",
]
