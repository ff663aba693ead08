"""Microseconds of a call, its work left out: `benchmarks.calls`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.calls import CASES, TIMES, calls_of, yardsticks
from benchmarks.conftest import Row, best_so_far, keep_row, turns
from benchmarks.report import CALL, YARDSTICKS


@pytest.mark.parametrize("op", [YARDSTICKS, *CASES])
def test_call(op: str, benchmark: Any, pytestconfig: pytest.Config) -> None:
    if torch.cuda.is_available():
        pytest.skip("on a GPU a call is a launch, which the GPU's suite times")
    calls = yardsticks() if op == YARDSTICKS else calls_of(op)
    if benchmark.disabled:  # each runs, to see that it runs
        for call in calls.values():
            call()
        benchmark(lambda: None)
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        timed = turns(calls, pytestconfig.getoption("--bench-seconds"))
    finally:
        torch.set_num_threads(before)
    best = best_so_far(pytestconfig, (CALL + op, "float32", 1), timed)
    seconds = {name: best[name] / TIMES for name in calls}
    for name, least in seconds.items():
        to_eager = seconds["eager"] / least if "eager" in seconds else 0.0
        keep_row(pytestconfig, Row(CALL + op, "float32", 1, name, least, 0, 0.0, to_eager))
    benchmark.pedantic(next(iter(calls.values())), rounds=3)
