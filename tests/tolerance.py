"""The tolerance of every numerical test."""

import torch

EPS = torch.finfo(torch.float32).eps


def assert_no_worse_than_eager(
    ours: torch.Tensor,
    eager: torch.Tensor,
    truth: torch.Tensor,
    what: str,
    *,
    rounding: float = EPS,
    terms: float = 1,
) -> None:
    """|ours - truth| <= 2 |eager - truth| + floor for every element, truth in fp64.

    Elementwise eager can be right by luck, so the floor is what one rounding of the result (eps |truth|) and
    fp32 arithmetic on terms as large as the largest element (4 eps32 max|truth|) can cost anyone; eager's own
    largest error stands for elements it hit by luck. `rounding` is eps, fp32's where the results are many:
    then eager's largest error covers the rounding to bf16 or fp16. `terms`: how many times as large as the
    largest element the terms of its sum are, where they cancel.
    """
    assert truth.dtype == torch.float64 and ours.shape == truth.shape, what
    ours, eager = ours.double(), eager.double()
    finite = truth.isfinite()
    assert torch.equal(ours.isfinite(), finite) and torch.equal(ours.isnan(), truth.isnan()), (
        f"{what}: NaN or inf in other places"
    )
    if not finite.any():
        return
    ours, eager, truth = ours[finite], eager[finite], truth[finite]
    floor = 4 * terms * EPS * truth.abs().max() + rounding * truth.abs()
    allowed = 2 * (eager - truth).abs().clamp(min=(eager - truth).abs().max().item() / 2) + floor
    excess = (ours - truth).abs() - allowed
    worst = excess.argmax()
    assert excess[worst] <= 0, (
        f"{what}: element {int(worst)} is {ours[worst]:.9g}, truth {truth[worst]:.9g}, "
        f"error {(ours - truth)[worst].abs():.3g}, "
        f"eager's {(eager - truth)[worst].abs():.3g} (largest {(eager - truth).abs().max():.3g})"
    )
