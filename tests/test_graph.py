"""Recording and replaying: what is called when. On a GPU: tests/sampling/test_sample_loop.py, tests/training."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch

from fastddpm import _graph
from fastddpm._graph import WARM_UP, Replayed

CUDA = torch.device("cuda")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done to a function, in order, on a device that is imagined."""
    done: list[str] = []

    def beside(function: Callable[[], None], device: torch.device) -> None:
        done.append("beside")
        function()

    def record(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
        done.append("record")
        return lambda: done.append("replay")

    monkeypatch.setattr(_graph, "beside", beside)
    monkeypatch.setattr(_graph, "record", record)
    return done


def test_the_first_calls_run_then_one_recording_is_replayed(calls: list[str]) -> None:
    run = Replayed(CUDA, "sampling")
    for _ in range(WARM_UP + 2):
        run(lambda: calls.append("function"))
    assert calls == ["beside", "function"] * WARM_UP + ["record", "replay", "replay"]


def test_on_a_cpu_nothing_is_recorded(calls: list[str]) -> None:
    run = Replayed(torch.device("cpu"), "sampling")
    for _ in range(WARM_UP + 2):
        run(lambda: calls.append("function"))
    assert calls == ["function"] * (WARM_UP + 2)


def test_what_cannot_be_recorded_goes_on_with_a_warning(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def record(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(_graph, "record", record)
    run = Replayed(CUDA, "training")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(WARM_UP):
            run(lambda: calls.append("function"))
    with pytest.warns(UserWarning, match="training goes on without a CUDA graph.*not permitted.*turn cuda_graph off"):
        run(lambda: calls.append("function"))
    run(lambda: calls.append("function"))
    assert calls.count("function") == WARM_UP + 2
