"""A step of the loop as a CUDA graph: recorded once, then launched as a whole."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WARM_UP = 2
"""Calls before the recording, in which libraries and compilers set themselves up."""


def replayed(step: Callable[[], None], state: Sequence[Tensor]) -> Callable[[], None]:
    """A function that does what ``step`` does, by a CUDA graph where that can be recorded; else step, with a warning.

    Args:
        step: works in place on tensors that stay where they are, and does not wait for the device.
        state: all tensors that step changes and reads again; they are as before when this returns.

    Returns: the function, to be called as often as the step is wanted.
    """
    before = [tensor.clone() for tensor in state]
    try:
        run = record(step)
    except RuntimeError as error:  # what cannot be recorded: a wait for the device, a copy from the host
        warnings.warn(
            f"sampling without a CUDA graph, which this network does not allow: {error}; pass cuda_graph=False to "
            "leave out the attempt",
            stacklevel=2,
        )
        run = step
    for tensor, values in zip(state, before, strict=True):
        tensor.copy_(values)
    return run


def record(step: Callable[[], None]) -> Callable[[], None]:
    """Run ``step`` a few times, and record it once more."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    replay: Callable[[], None] = graph.replay
    return replay
