"""The time of a call, and the rates of a machine that times are held against: copies and matrix products.

A step is what a user waits for: `times` has in it what the host does. What it is held against is what the device can
do: `least` leaves that out, on a GPU by `GpuClock`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from ..nn.layers import linear

Call = Callable[[], object]
PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192}
BATCH_SECONDS = 4e-4
"""Of work between two events: what an event costs is little beside it."""
MOST_CALLS = 64
"""Between two events: a GPU keeps no more than some 1000 launches, and then the host waits."""
CLOCK = 2e9
"""Cycles a second of a GPU, by which it sleeps; where it is another, so is the sleep, and is found too short."""
SHORTEST_SLEEP, LONGEST_SLEEP = 5e-5, 0.1


def times(call: Call, device: torch.device, repeat: int = 20, seconds: float = 60.0) -> list[float]:
    """Seconds that each of ``repeat`` calls took, after one that is not counted.

    Args:
        call: what to time. device: where it computes; a GPU is waited for before and after each call.
        repeat: >= 1. seconds: stop there once three calls are timed, > 0.

    Raises:
        ValueError: a number out of its range.
    """

    def once() -> float:
        wait(device)
        begin = time.perf_counter()
        call()
        wait(device)
        return time.perf_counter() - begin

    return _repeated(once, repeat, seconds)


def least(call: Call, device: torch.device, repeat: int = 20, seconds: float = 60.0) -> float:
    """Seconds of a call at the least: the best of `times` on a CPU, of ``repeat`` readings of a `GpuClock` on a GPU.

    Args:
        call, device, repeat, seconds: as of `times`.

    Raises:
        ValueError: a number out of its range.
    """
    if device.type != "cuda":
        return min(times(call, device, repeat, seconds))
    with torch.cuda.device(device):
        return min(_repeated(GpuClock(call).read, repeat, seconds))


class GpuClock:
    """Times a call on the current GPU, without what the host does to launch it.

    Some calls in a row lie between two events, and are launched while the GPU sleeps; where it wakes before all are,
    they are timed again behind a longer sleep. A call that waits for the GPU, or launches more than the GPU keeps
    (some 1000 kernels), has a part of its launches in its time whatever the sleep, and the longest one is taken.

    Args:
        call: what to time; it is called some times at once. fewest: calls in a row, >= 1.

    Attributes:
        count: calls in a row. sleep: seconds.
    """

    def __init__(self, call: Call, fewest: int = 1) -> None:
        self.call, self.count, self.sleep = call, 1, SHORTEST_SLEEP
        call()
        torch.cuda.synchronize()
        wanted = round(BATCH_SECONDS / max(self.read(), 1e-7))
        hidden = int(LONGEST_SLEEP / self.sleep)  # whose launches end while it sleeps
        self.count = max(fewest, min(wanted, hidden, MOST_CALLS))

    def read(self) -> float:
        """Seconds of a call, as one of ``count`` in a row."""
        while True:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(int(self.sleep * CLOCK))
            begin.record()
            start = time.perf_counter()
            for _ in range(self.count):
                self.call()
            launching = time.perf_counter() - start
            end.record()
            awake = begin.query()
            end.synchronize()
            taken: float = begin.elapsed_time(end) / 1e3
            if not awake or self.sleep >= LONGEST_SLEEP:
                return taken / self.count
            self.sleep = min(LONGEST_SLEEP, 2 * max(self.sleep, launching))


def _repeated(once: Callable[[], float], repeat: int, seconds: float) -> list[float]:
    """What ``once`` gives, after one that is not counted."""
    if repeat < 1 or not seconds > 0:
        raise ValueError(
            f"times: expected repeat >= 1 and seconds > 0, got {repeat} and {seconds}; 20 and 60 are usual"
        )
    once()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < repeat and (len(found) < 3 or time.perf_counter() < end):
        found.append(once())
    return found


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_rate(bytes_moved: int, device: torch.device, repeat: int = 20) -> float:
    """Bytes a second, read and written, of copying one float32 tensor to another: half of ``bytes_moved`` each."""
    source = torch.ones(max(1, bytes_moved // 8), device=device)
    target = torch.empty_like(source)
    return 8 * source.numel() / least(lambda: target.copy_(source), device, repeat)


def update_rate(bytes_moved: int, device: torch.device, repeat: int = 20) -> float:
    """Bytes a second, read and written, of negating one float32 tensor in place: as a copy, but that a CPU, which reads
    the memory that it writes unless it has read it before, moves no more than these."""
    x = torch.ones(max(1, bytes_moved // 8), device=device)
    return 8 * x.numel() / least(x.neg_, device, repeat)


def product_rate(dtype: torch.dtype, device: torch.device, repeat: int = 5, size: int | None = None) -> float:
    """Operations a second of one large matrix product, torch's or that of our layers, whichever takes less time: what
    this machine can do in this dtype and these threads."""
    n = PRODUCT_SIZE.get(device.type, 2048) if size is None else size
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    with torch.no_grad():
        return 2 * n**3 / min(least(product, device, repeat) for product in (lambda: a @ b, lambda: linear(a, b)))
