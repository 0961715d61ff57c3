"""What bench.gpu.head_check says of a case."""

import pytest

pytest.importorskip("triton", reason="triton is not installed", exc_type=ImportError)

from bench.gpu import head_check  # noqa: E402


def test_a_case_that_an_engine_does_not_serve_is_not_counted_as_right() -> None:
    fp32 = next(case for case in head_check.CASES if case.dtype == head_check.FP32)
    assert head_check.run_job(head_check.check, (fp32, "epilogue")) == "not served"
    assert head_check.run_job(int, ("1",)) == "ok"
    assert head_check.run_job(int, ("x",)).startswith("ValueError: invalid literal")
