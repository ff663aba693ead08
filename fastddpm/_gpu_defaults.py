"""Which kernels an op runs on a GPU where none are forced: Triton or CUDA C++, by the size of the call.

The one table of what measurements decided. ``python -m benchmarks.gpu_suite`` measures, and proposes its entries; who
enters them names the record they come from. How group_norm_silu is cut (slab, cluster) where CUDA C++ runs it is
decided beside its kernels, but for what fits no cluster; the suite sweeps that, too.
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

RECORD: str | None = None  # the record under benchmarks/results/ that RANGES comes from; None: not measured
RANGES: dict[str, tuple[Range, ...]] = {}  # by op, from small to large; an op that is not here takes UNMEASURED
UNMEASURED = Range(math.inf, TRITON)


# What fits no cluster in group_norm_silu by CUDA C++, or only in runs of less than 64 bytes, is for the cooperative
# kernel from so many elements of a call on, else read twice (or in such runs). Not measured: never for that kernel.
COOPERATIVE_FROM = {"forward": math.inf, "backward": math.inf}


def range_of(op: str, elements: int) -> Range:
    """The entry for a call of ``op`` whose first image, or whose parameters, have so many elements."""
    ranges = RANGES.get(op)
    if not ranges:
        return UNMEASURED
    return next((r for r in ranges if elements <= r.up_to), ranges[-1])


def source(op: str) -> str:
    """Where the order of an op comes from, in words."""
    return f"measured, see benchmarks/results/{RECORD}" if RECORD and op in RANGES else "not measured"
