"""The time of a call, and the rates of a machine that times are held against: copies and matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from ..nn.layers import linear

Call = Callable[[], object]
PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192}


def times(call: Call, device: torch.device, repeat: int = 20, seconds: float = 60.0) -> list[float]:
    """Seconds that each of ``repeat`` calls took, after one that is not counted.

    Args:
        call: what to time. device: where it computes; a GPU is waited for before and after each call.
        repeat: >= 1. seconds: stop there once three calls are timed, > 0.

    Raises:
        ValueError: a number out of its range.
    """
    if repeat < 1 or not seconds > 0:
        raise ValueError(
            f"times: expected repeat >= 1 and seconds > 0, got {repeat} and {seconds}; 20 and 60 are usual"
        )
    call()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < repeat and (len(found) < 3 or time.perf_counter() < end):
        wait(device)
        begin = time.perf_counter()
        call()
        wait(device)
        found.append(time.perf_counter() - begin)
    return found


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_rate(bytes_moved: int, device: torch.device, repeat: int = 20) -> float:
    """Bytes a second, read and written, of copying one float32 tensor to another: half of ``bytes_moved`` each."""
    source = torch.ones(max(1, bytes_moved // 8), device=device)
    target = torch.empty_like(source)
    return 8 * source.numel() / min(times(lambda: target.copy_(source), device, repeat))


def product_rate(dtype: torch.dtype, device: torch.device, repeat: int = 5, size: int | None = None) -> float:
    """Operations a second of one large matrix product, torch's or that of our layers, whichever takes less time: what
    this machine can do in this dtype and these threads."""
    n = PRODUCT_SIZE.get(device.type, 2048) if size is None else size
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    with torch.no_grad():
        return 2 * n**3 / min(min(times(product, device, repeat)) for product in (lambda: a @ b, lambda: linear(a, b)))
