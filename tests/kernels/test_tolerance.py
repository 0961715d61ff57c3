"""What the tolerance of the numerical tests lets through."""

import pytest
import torch

from tests.tolerance import assert_no_worse_than_eager


def test_a_row_whose_elements_are_all_as_wrong_as_eagers_worst_is_refused() -> None:
    truth = torch.ones(2, 100, dtype=torch.float64)
    eager, ours = truth.clone(), truth.clone()
    eager[0, 0] += 1e-3
    ours[0, 5] += 1e-3  # eager hit this element by luck
    assert_no_worse_than_eager(ours.float(), eager.float(), truth, "one element")
    ours[0] = 1 + 1e-3
    with pytest.raises(AssertionError, match="all elements: row 0 is off by 0.01, eager by 0.001"):
        assert_no_worse_than_eager(ours.float(), eager.float(), truth, "all elements")
