"""How close the results of GPU engines are in tiny tiles, and how their tests run."""

import pytest
import torch

# Relative error of a sum of terms that are rounded once. Triton's interpreter truncates to bf16, which costs
# twice the rounding and is biased.
CLOSE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
MARKS = [
    pytest.mark.usefixtures("poisoned_memory", "tiny_tiles"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy's, in the interpreter
]
