"""Work that is the same at every call, as a CUDA graph: recorded once, then launched as a whole."""

from __future__ import annotations

import warnings
from collections.abc import Callable

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


def beside(function: Callable[[], None], device: torch.device) -> None:
    """Call it on another stream, as what will be recorded must have run before."""
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
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
    """A CUDA graph of one call. What other threads do meanwhile, such as taking pinned memory, does not end it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
        function()
    replay: Callable[[], None] = graph.replay
    return replay
