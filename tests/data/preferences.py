"""A tokenizer, sequences and files for the tests of preferences."""

from collections.abc import Sequence

import torch

from fastalign.data import Tokenized


def random_sequences(lengths: Sequence[int], *, seed: int = 0) -> list[Tokenized]:
    """The second half of each is scored."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Tokenized(
            torch.randint(3, 320, (n,), generator=generator).tolist(),
            [place >= max(n // 2, 1) for place in range(n)],
        )
        for n in lengths
    ]
