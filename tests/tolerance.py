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
    """Each element's error, |ours - truth| with truth in fp64, is at most twice eager's or eager's largest,
    whichever is more, and a floor. So is each row's norm of a matrix at most twice eager's, and a floor.

    Elementwise eager can be right by luck, so its largest error stands for elements that it hit. The rows
    bound what that lets through: many elements that are as wrong as eager's worst. Their floor has two more
    roundings to the result's dtype (eps |truth|), which eager's row can be spared by luck: a GEMM rounds
    dlogits before the result, and where one token decides a row all its elements share that rounding; a
    frozen head rounds dlogp / dhidden, and then its product with the upstream gradient. The floor is what one
    rounding of the result (eps |truth|) and fp32 arithmetic on terms as large as the largest element (4 eps32
    max|truth|) can cost anyone. `rounding` is eps, fp32's where the results are many: then eager's errors
    cover the rounding to bf16 or fp16. `terms`: how many times as large as the largest element the terms of
    its sum are, where they cancel.
    """
    assert truth.dtype == torch.float64 and ours.shape == truth.shape, what
    two_roundings = torch.finfo(ours.dtype).eps * truth.abs()
    ours, eager = ours.double(), eager.double()
    finite = truth.isfinite()
    assert torch.equal(ours.isfinite(), finite) and torch.equal(ours.isnan(), truth.isnan()), (
        f"{what}: NaN or inf in other places"
    )
    if not finite.any():
        return
    floor = 4 * terms * EPS * truth[finite].abs().max() + rounding * truth.abs()
    if truth.dim() > 1 and finite.all():
        _assert_rows(ours - truth, eager - truth, floor + two_roundings, what)
    ours, eager, truth, floor = ours[finite], eager[finite], truth[finite], floor[finite]
    allowed = 2 * (eager - truth).abs().clamp(min=(eager - truth).abs().max().item() / 2) + floor
    excess = (ours - truth).abs() - allowed
    worst = excess.argmax()
    assert excess[worst] <= 0, (
        f"{what}: element {int(worst)} is {ours[worst]:.9g}, truth {truth[worst]:.9g}, "
        f"error {(ours - truth)[worst].abs():.3g}, "
        f"eager's {(eager - truth)[worst].abs():.3g} (largest {(eager - truth).abs().max():.3g})"
    )


def _assert_rows(ours: torch.Tensor, eager: torch.Tensor, floor: torch.Tensor, what: str) -> None:
    """The norm of each row of errors is at most twice eager's, and the floor's."""
    found, allowed = ours.norm(dim=-1), 2 * eager.norm(dim=-1) + floor.norm(dim=-1)
    excess = (found - allowed).flatten()
    worst = int(excess.argmax())
    assert excess[worst] <= 0, (
        f"{what}: row {worst} is off by {found.flatten()[worst]:.3g}, eager by "
        f"{eager.norm(dim=-1).flatten()[worst]:.3g}, the floor is {floor.norm(dim=-1).flatten()[worst]:.3g}"
    )
