"""How many images fit into memory at a time."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

SHARE = 0.5
"""Of the free memory: what libraries take for their work, and what the allocator cannot use, is not counted."""


def fitting_batch(num_images: int, most: int, bytes_per_image: int, free: int) -> int:
    """Images at a time: all, at most ``most``, halved until they take at most half of the free memory.

    Args:
        num_images: that are wanted, >= 1. most: >= 1. bytes_per_image: >= 0. free: bytes.
    """
    batch = max(1, min(num_images, most))
    while batch > 1 and batch * bytes_per_image > SHARE * free:
        batch = (batch + 1) // 2
    return batch


def free_memory(device: torch.device) -> int:
    """Bytes that may still be taken on a device; on a GPU with those that torch holds and does not use."""
    if device.type != "cuda":
        return available_memory()
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def available_memory() -> int:
    """Bytes that this process may still take, as far as the system tells: of the machine, and of its control group."""
    limits = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = (line.split() for line in meminfo.read_text().splitlines())
        limits += [1024 * int(line[1]) for line in lines if line[0] == "MemAvailable:"]
    if not limits and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError, KeyError):  # no such group, or a limit of "max"
        most, taken = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        limits.append(most - taken + int(statistics["file"]))  # copies of files, which give way
    return max(0, min(limits, default=2**31))
