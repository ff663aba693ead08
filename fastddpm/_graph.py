"""Work that is the same at every call, as a CUDA graph: recorded once, then launched as a whole."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

WARM_UP = 3
"""Calls before the recording, in which libraries and compilers set themselves up."""


class Replayed:
    """A function that is called again and again: as it is for the first calls, then from a CUDA graph.

    It works in place on tensors that stay where they are, does the same work at each call, and waits for nothing.
    Recording runs nothing, so no call is made twice and no state needs to be put back. Where the function cannot be
    recorded, it goes on being called as it is, and a warning gives the reason.

    Args:
        function: what to call. device: where it works; only on a CUDA device is anything recorded.
        what: names the function in the warning.
    """

    def __init__(self, function: Callable[[], None], device: torch.device, what: str) -> None:
        self.function, self.device, self.what = function, device, what
        self.calls = 0
        self.replay: Callable[[], None] | None = None
        self.records = device.type == "cuda"

    def __call__(self) -> None:
        """Do it once."""
        if self.replay is None and self.records and self.calls >= WARM_UP:
            try:
                self.replay = record(self.function)
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
            beside(self.function, self.device)
        else:
            self.function()
        self.calls += 1


def beside(function: Callable[[], None], device: torch.device) -> None:
    """Call it on another stream, as what will be recorded must have run before."""
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        function()
    current.wait_stream(stream)


def record(function: Callable[[], None]) -> Callable[[], None]:
    """Record one call, without running it; returns what runs it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    replay: Callable[[], None] = graph.replay
    return replay
