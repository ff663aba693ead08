"""A GPU's queue on a CPU: what the host launches at one time is done at another. No clock runs: both are counted."""

from __future__ import annotations

import contextlib
from collections import deque
from types import SimpleNamespace

import pytest
import torch

from fastddpm.bench import timing


class Gpu:
    """A host that launches, and a GPU that does one thing after the other, in the order in which they are launched.

    Attributes:
        now: seconds of the host. until: when the GPU will have done all that it has. slept: how often it slept.
        clock: its cycles a second.
    """

    KEEPS = 1000
    """Launches; for one more the host waits."""

    def __init__(self, clock: float = 1.8e9) -> None:
        self.now = self.until = 0.0
        self.slept, self.clock = 0, clock
        self.pending: deque[float] = deque()

    def launch(self, host: float, seconds: float) -> None:
        """A kernel of so many seconds, for which the host takes some of its own."""
        self.now += host
        while self.pending and self.pending[0] <= self.now:
            self.pending.popleft()
        if len(self.pending) == self.KEEPS:
            self.now = self.pending.popleft()
        self.until = max(self.until, self.now) + seconds
        self.pending.append(self.until)

    def sleep(self, cycles: int) -> None:
        self.slept += 1
        self.launch(5e-6, cycles / self.clock)

    def synchronize(self, device: torch.device | None = None) -> None:
        self.now = max(self.now, self.until) + 2e-5

    def event(self, enable_timing: bool) -> Event:
        assert enable_timing
        return Event(self)


class Event:
    """As torch.cuda.Event is called."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.at = gpu, float("nan")

    def record(self) -> None:
        self.gpu.launch(1e-6, 0.0)
        self.at = self.gpu.until

    def query(self) -> bool:
        return self.at <= self.gpu.now

    def synchronize(self) -> None:
        self.gpu.now = max(self.gpu.now, self.at)

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.at - self.at)


def launch_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Have timings of a GPU read the clocks of one that is not there."""
    gpu = Gpu()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: gpu.now))
    for name, fake in (
        ("Event", gpu.event), ("_sleep", gpu.sleep), ("synchronize", gpu.synchronize),
        ("device", lambda device: contextlib.nullcontext()),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake, raising=False)
    return gpu
