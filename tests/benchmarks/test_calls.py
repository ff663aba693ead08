"""What a call of an op is made of, where its time cannot be told: one operator, and so many functions of Python."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest
import torch

from benchmarks import report
from benchmarks.calls import CASES, TIMES, calls_of, operator_of
from fastddpm import _native

# Functions of Python that a call enters, without a gradient and with one (0: it has none), as counted with Python 3.11
# and torch 2.11 and 2.13, whose own are among them; later versions of Python enter fewer. Each takes some 0.1 us, and
# several times that where large images have gone through the caches since. Two of each are of the benchmark.
FUNCTIONS = {
    "normal": (19, 0), "q_sample": (19, 0), "diffusion_loss": (23, 37), "solver_step": (20, 0),
    "group_norm_silu": (12, 31), "rms_norm_silu": (12, 28), "conv3x3": (18, 37), "linear": (18, 40),
    "self_attention": (10, 22),
}  # fmt: skip

pytestmark = pytest.mark.skipif(not _native.available() or torch.cuda.is_available(), reason="of kernels for the CPU")


def functions_entered(call: Any) -> float:
    """Functions of Python that are entered in a call, over those of the loop that makes so many."""
    count = 0

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        count += event == "call"

    call()  # the first finds what is kept for the others
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count / TIMES


@pytest.mark.parametrize("op", CASES)
def test_a_call_is_one_operator_and_few_functions(op: str) -> None:
    """calls_of refuses a call that comes down to more than one operator."""
    calls = calls_of(op)
    without, with_gradient = FUNCTIONS[op]
    assert functions_entered(calls["fastddpm"]) < without + 1
    if with_gradient:
        assert functions_entered(calls["fastddpm, gradient"]) < with_gradient + 1


def test_more_than_one_operator_is_refused() -> None:
    x = torch.ones(3)
    with pytest.raises(ValueError, match="one operator"):
        operator_of(lambda: x + x * x)


def test_the_page_tells_what_python_adds() -> None:
    row: dict[str, Any] = dict(dtype="float32", threads=1, bytes=0, floor=0.0, to_eager=1.0)
    found = {"fastddpm": 9e-6, "operator": 4e-6, "eager": 8e-6, "fastddpm, gradient": 20e-6, "eager, gradient": 9e-6}
    rows = [row | dict(case="call of q_sample", contestant=name, seconds=s) for name, s in found.items()]
    rows += [row | dict(case="call of PyTorch", contestant="torch.empty_like", seconds=1e-6)]
    text = "\n".join(report.calls_in(rows))
    assert "| q_sample | 9.0 | 4.0 | 5.0 | 8.0 | 20.0 | 16.0 | 9.0 |" in text
    assert "at most 6.8 us: 5.0 (q_sample), met" in text and "at most 13.6 us: 16.0 (q_sample), NOT MET" in text
    assert "torch.empty_like 1.0" in text
    assert report.cases_of(rows) == [] and report.calls_in([]) == []


def test_the_page_takes_a_run_of_some_ops() -> None:
    row: dict[str, Any] = dict(dtype="float32", threads=1, bytes=0, floor=0.0, to_eager=1.0)
    found = {"fastddpm": 9e-6, "operator": 4e-6, "eager": 8e-6}
    of_op = [row | dict(case="call of normal", contestant=name, seconds=s) for name, s in found.items()]
    of_torch = [row | dict(case="call of PyTorch", contestant="torch.empty_like", seconds=1e-6)]
    assert "with gradient: at most" not in "\n".join(report.calls_in(of_op))
    text = "\n".join(report.calls_in(of_torch))
    assert "at most" not in text and "torch.empty_like 1.0" in text
