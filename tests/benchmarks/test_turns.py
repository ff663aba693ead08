"""What a contestant takes on a GPU: an op without its launches, a step with them."""

from __future__ import annotations

import itertools
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import conftest
from tests.launched import launch_on_cpu


@pytest.mark.parametrize(
    ("kernels", "host", "seconds"), [(1, 5e-6, 2e-6), (12, 2e-5, 2e-6), (40, 3e-5, 1e-5), (800, 1.5e-5, 5e-6)]
)
def test_an_op_is_timed_without_its_launches_and_a_step_with_them(
    kernels: int, host: float, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as an op, one with its gradient, an eager Adam and a training step have."""
    gpu = launch_on_cpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(conftest, "time", SimpleNamespace(perf_counter=lambda: gpu.now))

    def call() -> None:
        for _ in range(kernels):
            gpu.launch(host, seconds)

    calls = {"eager": call, "copy": lambda: gpu.launch(1e-5, 3e-6)}
    best = conftest.turns(calls, 0.0, launches=False)
    assert best["eager"] == pytest.approx(kernels * seconds) and best["copy"] == pytest.approx(3e-6)
    assert conftest.turns(calls, 0.0)["eager"] >= kernels * host


@pytest.mark.gpu
def test_an_op_of_a_slow_host() -> None:
    """100,000 cycles are some 50 us; the host takes 2 ms to launch them."""

    def call() -> None:
        time.sleep(2e-3)
        torch.cuda._sleep(100_000)

    assert 2e-5 < conftest.turns({"slow": call}, 0.0, launches=False)["slow"] < 5e-4
    assert conftest.turns({"slow": call}, 0.0)["slow"] > 2e-3


def test_no_contestant_always_comes_after_the_same() -> None:
    calls: list[str] = []
    conftest.turns({name: lambda name=name: calls.append(name) for name in "abc"}, 0.02, launches=False)  # type: ignore[misc]
    turns = [name for name, _ in itertools.groupby(calls)]
    assert set(itertools.pairwise(turns)) >= {(a, b) for a in "abc" for b in "abc" if a != b}
