"""What the native implementations share: why they cannot run, and how their operators take arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import _dispatch, _native

AVAILABLE = _native.available()  # which loads the module, and so registers its operators

Fake = TypeVar("Fake", bound=Callable[..., Any])


def reason_against(*tensors: Tensor, dtype: torch.dtype | None = None) -> str | None:
    """Why the kernels written in C++ cannot compute in ``dtype`` (that of the first tensor, by default) where it is."""
    if not AVAILABLE:
        return f"fastddpm was installed without native code: {_native.reason()}"
    device = tensors[0].device
    if device.type == "cuda":
        why = _against_cuda(device.index)
        if why is not None:
            return f"the CUDA C++ kernels cannot run on {device}: {why}"
    elif device.type != "cpu":
        return f"the native kernels are for the CPU and for CUDA, and the tensors are on {device}"
    if (dtype or tensors[0].dtype) == torch.float64:
        return "the native kernels compute in float32; the reference computes in float64"
    return None


@_dispatch._constant
def _against_cuda(index: int | None) -> str | None:
    return _native.cuda_reason(torch.cuda.get_device_capability(index))


def contiguous(x: Tensor | None) -> Tensor | None:
    """An argument that may be left out, as operators take it."""
    return x if x is None else x.contiguous()


def number_or_tensor(x: Tensor | int | None) -> tuple[int, Tensor | None]:
    """An argument that may be either, as the pair that an operator takes; 64 bits, with or without a sign."""
    if isinstance(x, Tensor):
        return 0, x
    x = x or 0
    return x - 2**64 if x >= 2**63 else x, None


def float_or_tensor(x: Tensor | float | None) -> tuple[float | None, Tensor | None]:
    """An argument that may be either, as the pair that an operator takes."""
    return (1.0, x) if isinstance(x, Tensor) else (None if x is None else float(x), None)


NOTHING_DRAWN = (0, None, None, 0, None)


def drawing(
    seed: Tensor | int | None, sample: Tensor | None, step: Tensor | int | None
) -> tuple[int, Tensor | None, Tensor | None, int, Tensor | None]:
    """Where noise is drawn, as operators take it; without a seed nothing is."""
    if seed is None:
        return NOTHING_DRAWN
    return *number_or_tensor(seed), contiguous(sample), *number_or_tensor(step)


def register_fake(name: str) -> Callable[[Fake], Fake]:
    """Decorates what says the shapes, dtypes and strides that operator ``name`` returns, for tensors without values."""
    if not AVAILABLE:
        return lambda fake: fake
    register: Callable[[Fake], Fake] = torch.library.register_fake(f"fastddpm::{name}")
    return register


def like_in_order(like: Tensor, shape: Any = None, dtype: torch.dtype | None = None) -> Tensor:
    """What an operator returns for an image, without its values: dense in the memory order of ``like``."""
    layout = torch.contiguous_format if like.is_contiguous() else torch.channels_last
    shape = like.shape if shape is None else shape
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=layout)
