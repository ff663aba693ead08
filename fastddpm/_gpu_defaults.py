"""What runs on a GPU where nothing is forced: Triton or CUDA C++, by the size of the call, and how CUDA C++ cuts it.

The one table of what measurements decided. ``python -m benchmarks.gpu_suite`` measures, and proposes its entries; who
enters them names the record they come from. Where there is no entry, group_norm_silu goes by estimates that stand
beside its kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """Calls of up to so many elements, and the order in which backends are tried on them."""

    up_to: float
    prefer: tuple[str, ...]


TRITON, CUDA = ("triton", "native", "reference"), ("native", "triton", "reference")


@dataclass(frozen=True)
class Cut:
    """How group_norm_silu by CUDA C++ cuts images in NHWC order, of so many channels and pixels, both ends included.

    ``size`` is that of a number in bytes. A cluster: slabs of ``slab`` channels, each in the shared memory of ``parts``
    blocks; ``two reads``; ``cooperative``: slabs in so many parts. 0 leaves slab or parts to the kernels, which go by
    their estimates, too, where an image does not fit what is said here, or a device cannot run it.
    """

    direction: str  # forward or backward
    channels: tuple[int, int]
    pixels: tuple[int, int]
    size: int
    way: str  # of WAYS
    slab: int = 0
    parts: int = 0

    def numbers(self) -> tuple[int, ...]:
        """As the kernels take it: GroupNormCut."""
        backward = ("forward", "backward").index(self.direction)
        return (backward, *self.channels, *self.pixels, self.size, WAYS.index(self.way), self.slab, self.parts)


WAYS = ("cluster", "two reads", "cooperative")
RECORD: str | None = None  # the record under benchmarks/results/ that RANGES and CUTS come from; None: not measured
RANGES: dict[str, tuple[Range, ...]] = {}  # by op, from small to large; an op that is not here takes UNMEASURED
UNMEASURED = Range(math.inf, TRITON)
CUTS: tuple[Cut, ...] = ()  # the first that fits a call


def range_of(op: str, elements: int) -> Range:
    """The entry for a call of ``op`` whose first image, or whose parameters, have so many elements."""
    ranges = RANGES.get(op)
    if not ranges:
        return UNMEASURED
    return next((r for r in ranges if elements <= r.up_to), ranges[-1])


def source(op: str) -> str:
    """Where the order of an op comes from, in words."""
    return f"measured, see benchmarks/results/{RECORD}" if RECORD and op in RANGES else "not measured"
