"""Marks that several test files share."""

import pytest

# numpy's warnings come from Triton's interpreter, where an overflow to inf is meant,
# and inf * 0 is not selected.
KERNELS = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
