"""What glibc's allocator does on a CPU with memory that is freed.

By itself it gives large blocks back to the system, which maps and clears every page anew for the next one: of a tensor
of 34 MB that takes ten times as long as its norm. Other allocators, and other systems, stay as they are.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt
KEPT, GIVEN_BACK = (2**31 - 1, 1 << 30), (1 << 15, 1 << 15)
USUAL = 64 << 20, 32 << 20
"""To where glibc itself raises the two, from 128 KiB, as large blocks are freed."""

_lock = threading.Lock()
_decided = False  # by a training, for the rest of the process
_blocks = 0  # of code within `freed_memory_kept`


def keep_freed_memory(keep: bool) -> None:
    """Have what is freed kept from now on, or blocks from 32 KiB on given back, whatever samplers ask for later.

    To get memory from the system again at every step takes time. But of what is kept some cannot be used again, since
    blocks of the same size, aligned, do not fit where one was (docs/memory.md).
    """
    global _decided
    with _lock:
        _decided = True
        _set(KEPT if keep else GIVEN_BACK)


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """On a CPU, keep what is freed within the block, unless `keep_freed_memory` was called.

    From its end on glibc does as it would by itself. What it has then it hands out again; a free piece at the end of
    its memory goes back to the system where it is over 64 MiB.
    """
    global _blocks
    if device.type != "cpu":
        yield
        return
    with _lock:
        _blocks += 1
        if _blocks == 1 and not _decided:
            _set(KEPT)
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if _blocks == 0 and not _decided:
                _set(USUAL)


def _set(thresholds: tuple[int, int]) -> None:
    if any(f"MALLOC_{name}_THRESHOLD_" in os.environ for name in ("TRIM", "MMAP")):
        return  # the user has chosen
    with suppress(OSError, AttributeError, TypeError):
        library: Any = ctypes.CDLL(None)
        library.mallopt(M_TRIM_THRESHOLD, thresholds[0])
        library.mallopt(M_MMAP_THRESHOLD, thresholds[1])
