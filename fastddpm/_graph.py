"""Work that is the same at every call, as a CUDA graph: recorded once, then launched as a whole."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from contextlib import suppress

import torch

WARM_UP = 3
"""Calls before the recording, in which libraries and compilers set themselves up."""


class Replayed:
    """Work that is done again and again: called as it is for the first times, then from a CUDA graph.

    It happens in place on tensors that stay where they are, is the same at each call, and waits for nothing. Recording
    runs nothing, so no call is made twice and no state needs to be put back. Where the work cannot be recorded, it goes
    on being called as it is, and a warning gives the reason.

    Args:
        device: where it is done; only on a CUDA device is anything recorded.
        what: names the work in the warning. wanted: False never records.
    """

    def __init__(self, device: torch.device, what: str, wanted: bool = True) -> None:
        self.device, self.what = device, what
        self.calls = 0
        self.replay: Callable[[], None] | None = None
        self.records = wanted and can_record(device)

    def __call__(self, function: Callable[[], None]) -> None:
        """Do it once. The function is not kept, so it may refer to what holds the recording."""
        if self.replay is None and self.records and self.calls >= WARM_UP:
            try:
                self.replay = record(function, self.device)
            except RuntimeError as error:  # a wait for the device, or a copy from the host
                self.records = False
                warnings.warn(
                    f"{self.what} goes on without a CUDA graph, since it cannot be recorded: {error}; "
                    "turn cuda_graph off to leave out the attempt",
                    stacklevel=2,
                )
        if self.replay is not None:
            self.replay()
        elif self.records:
            beside(function, self.device)
        else:
            function()
        self.calls += 1


def can_record(device: torch.device) -> bool:
    """Whether there are CUDA graphs on a device."""
    return device.type == "cuda"


class _Streams(threading.local):
    def __init__(self) -> None:
        self.known: dict[tuple[str, torch.cuda.Stream], torch.cuda.Stream] = {}


_streams = _Streams()


def side_stream(device: torch.device, purpose: str) -> torch.cuda.Stream:
    """A stream beside the current one, the same each time: each stream keeps freed memory, and a workspace of cuBLAS.

    Each thread has its own, since a capture takes in whatever is launched on its stream; and each stream that work is
    done on, since two may work at once, and the graphs captured on one side stream share a workspace. That for captures
    is not that for warm-ups, whose workspace is no memory of a graph, and may be freed while there are graphs.
    """
    current = torch.cuda.current_stream(device)
    if (purpose, current) not in _streams.known:
        _streams.known[purpose, current] = torch.cuda.Stream(current.device)
    return _streams.known[purpose, current]


def beside(function: Callable[[], None], device: torch.device) -> None:
    """Call it on another stream, as what will be recorded must have run before."""
    stream, current = side_stream(device, "warm-up"), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        function()
    current.wait_stream(stream)


def record(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Record one call, without running it; returns what runs it."""

    def call() -> None:
        # Weights that autocast cast before are gone when its block ends, and then a graph would read anything.
        dtype, enabled = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
        with torch.autocast(device.type, dtype, enabled, cache_enabled=False):
            function()

    return capture(call, device)


def capture(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A CUDA graph of one call. What other threads do meanwhile, such as taking pinned memory, does not end it.

    Where it fails, the error says why, and torch is left so that work can go on. `torch.cuda.graph` does not see to
    that: the thread stays on the stream of the capture.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # for the memory of the graph, which is not shared
    with torch.cuda.stream(side_stream(device, "capture")):
        try:
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            function()
        except BaseException:
            with suppress(RuntimeError):  # which says only that something was wrong before
                end_capture(graph, pool)
            raise
        end_capture(graph, pool)
    replay: Callable[[], None] = graph.replay
    return replay


def end_capture(graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
    """End it; where that fails, with an error, end also what torch then leaves open (2.11 to 2.13)."""
    try:
        graph.capture_end()
    except RuntimeError:
        # Memory that was freed on another stream would not be reclaimed for as long as a capture seems under way. The
        # names are none that torch promises, and where the end came far enough to do this itself, they refuse.
        with suppress(AttributeError, RuntimeError):
            device = torch.cuda.current_device()
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
        with suppress(RuntimeError):
            graph.reset()
            capture_little()
        _failed.append(graph)
        raise


def capture_little() -> None:
    """Capture next to nothing on the current stream: at the end the generator of random numbers, which in torch 2.11
    refuses to draw any after a capture that failed, takes it that none is under way."""
    graph, x = torch.cuda.CUDAGraph(), torch.zeros((), device=torch.cuda.current_stream().device)
    graph.capture_begin(capture_error_mode="thread_local")
    x.zero_()
    graph.capture_end()


_failed: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture failed: what hands out pinned memory goes on asking them whether it is for them."""
