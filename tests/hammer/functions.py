"""Cases of the public functions, one drawn by its seed."""

from collections.abc import Callable

import torch

from tests.hammer.case import DTYPES, Case, Random, check
from tests.hammer.head_cases import (
    cross_entropy,
    linear_cross_entropy,
    linear_distillation,
    linear_dpo,
    linear_kto,
    linear_ppo,
    linear_token_stats,
    token_stats,
)
from tests.hammer.loss_cases import gae, kto, pairs, ppo, reward, sums, value, whiten

CASES: dict[str, Callable[[Random, torch.dtype], Case]] = {
    function.__name__: function
    for function in (
        *(
            cross_entropy,
            token_stats,
            linear_cross_entropy,
            linear_distillation,
            linear_token_stats,
            linear_ppo,
            linear_dpo,
            linear_kto,
        ),
        *(pairs, kto, reward, ppo, value, gae, whiten, sums),
    )
}


def fuzz(r: Random) -> str:
    """One case; its name."""
    name = r.choice(list(CASES))
    dtype = r.choice(DTYPES)
    torch.set_num_threads(r.choice((1, 1, 2)))
    check(CASES[name](r, dtype), r.getrandbits(40))
    return f"{name}, {str(dtype).removeprefix('torch.')}"
