"""Checks that every op's interface shares: a user only sees errors written here or beside the signature they are of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PIXELS = (torch.uint8, *FLOATS)
WIDE = (torch.float32, torch.float64)  # of tables, parameters and the numbers that they share
INTEGER = (torch.int64,)
NHWC = torch.channels_last


def check_dtype(op: str, name: str, x: Any, *dtypes: torch.dtype) -> None:
    """Expect a tensor of one of the given dtypes."""
    _check_tensor(op, name, x)
    if x.dtype not in dtypes:
        raise TypeError(f"{op}: expected {name} of dtype {_names(dtypes)}, got {x.dtype}; convert it with .to(dtype)")


def check_shape(op: str, name: str, x: Any, shape: tuple[int, ...], *others: tuple[int, ...]) -> None:
    """Expect a tensor of one of the given shapes."""
    _check_tensor(op, name, x)
    if x.shape != shape and all(x.shape != s for s in others):
        wanted = " or ".join(f"{list(s)}" for s in (shape, *others))
        raise ValueError(f"{op}: expected {name} of shape {wanted}, got {list(x.shape)}; pass a tensor of that shape")


def check_values(
    op: str, name: str, x: Any, like: Tensor, dtypes: tuple[torch.dtype, ...], *shapes: tuple[int, ...]
) -> None:
    """Expect a tensor of one of these dtypes and shapes on the device of ``like``."""
    if not (isinstance(x, Tensor) and x.shape in shapes and x.dtype in dtypes and x.device == like.device):
        check_shape(op, name, x, *shapes)
        check_dtype(op, name, x, *dtypes)
        check_device(op, like, **{name: x})


def check_image(op: str, name: str, x: Any, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """Expect a dense [B, C, H, W] tensor, NCHW or NHWC in memory, of one of these dtypes."""
    right = isinstance(x, Tensor) and x.dtype in dtypes and x.dim() == 4
    if right and (x.is_contiguous(memory_format=NHWC) or x.is_contiguous()):
        return
    check_dtype(op, name, x, *dtypes)
    if x.dim() != 4:
        raise ValueError(
            f"{op}: expected {name} of shape [B, C, H, W], got {list(x.shape)}; reshape it to four dimensions"
        )
    if not is_dense(x):
        raise ValueError(
            f"{op}: expected {name} to be dense in NCHW or NHWC order, got strides {list(x.stride())} for shape "
            f"{list(x.shape)}; call .contiguous(memory_format=torch.channels_last) or .contiguous() on it first"
        )


def check_image_like(
    op: str, name: str, x: Any, like: Tensor, *shapes: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = FLOATS
) -> None:
    """Expect such a tensor, of one of these shapes, on the device of ``like``."""
    right = isinstance(x, Tensor) and x.shape in shapes and x.dtype in dtypes and x.device == like.device
    if not (right and (x.is_contiguous(memory_format=NHWC) or x.is_contiguous())):
        check_image(op, name, x, dtypes)
        check_values(op, name, x, like, dtypes, *shapes)


def is_dense(x: Tensor) -> bool:
    """Whether a [B, C, H, W] tensor lies in NCHW or NHWC order without gaps, as the ops take it."""
    return x.is_contiguous() or is_nhwc(x)


def is_nhwc(x: Tensor) -> bool:
    """Whether a [B, C, H, W] tensor is dense in NHWC order; whatever is asked about an image is asked here.

    By its strides where torch.compile reads this: the method of torch 2.11 says no of every tensor of symbolic shape.
    """
    if not torch.compiler.is_compiling():
        return x.is_contiguous(memory_format=torch.channels_last)
    dense = 1
    for i in (1, 3, 2, 0):
        if x.shape[i] != 1 and x.stride(i) != dense:
            return False
        dense *= x.shape[i]
    return True


def check_rows(op: str, name: str, x: Any, like: Tensor, dtypes: tuple[torch.dtype, ...], *columns: int) -> None:
    """Expect a tensor [rows], or [rows, columns] where columns are given, of any number of rows, on that device."""
    right = isinstance(x, Tensor) and x.dim() == 1 + len(columns) and x.shape[1:] == columns
    if not (right and x.dtype in dtypes and x.device == like.device):
        _check_tensor(op, name, x)
        if not right:
            wanted = ", ".join(str(n) for n in ("rows", *columns))
            raise ValueError(
                f"{op}: expected {name} of shape [{wanted}], any number of rows, got {list(x.shape)}; "
                f"pass a tensor of that shape"
            )
        check_values(op, name, x, like, dtypes, x.shape)


def check_device(op: str, like: Tensor, **tensors: Tensor | float | None) -> None:
    """Expect all tensors on the device of ``like``; numbers and None are passed over."""
    device = like.device
    for name, x in tensors.items():
        if isinstance(x, Tensor) and x.device != device:
            raise ValueError(
                f"{op}: expected {name} on {device}, got {x.device}; move it there with .to({str(device)!r})"
            )


def check_scalar(op: str, name: str, x: Any, like: Tensor, *dtypes: torch.dtype) -> None:
    """Expect a number (an int, where the dtype is int64), or a tensor [] of one of these dtypes on that device."""
    if isinstance(x, Tensor):
        check_values(op, name, x, like, dtypes, ())
    elif not isinstance(x, int if dtypes == INTEGER else (int, float)):
        kind = "an int" if dtypes == INTEGER else "a number"
        raise TypeError(
            f"{op}: expected {name} to be {kind} or a tensor [] of dtype {_names(dtypes)}, got {type(x).__name__}; "
            f"pass one of these"
        )


def check_draw(op: str, batch: int, like: Tensor, seed: Any, sample: Any, step: Any) -> None:
    """Expect what counter-based noise needs: a seed, the sample index of each row, and a step."""
    if seed is None or sample is None or step is None:
        missing = ", ".join(n for n, v in (("seed", seed), ("sample", sample), ("step", step)) if v is None)
        raise ValueError(
            f"{op}: expected seed, sample and step together to draw noise, got no {missing}; "
            f"pass all three, or the noise itself"
        )
    if not isinstance(seed, int):
        check_scalar(op, "seed", seed, like, torch.int64)
    elif not 0 <= seed < 2**64:
        raise ValueError(f"{op}: expected seed in [0, 2^64), got {seed}; choose a non-negative 64-bit integer")
    if not isinstance(step, int):
        check_scalar(op, "step", step, like, torch.int64)
    elif not 0 <= step < 2**32:
        raise ValueError(f"{op}: expected step in [0, 2^32), got {step}; the counter of the noise has 32 bits for it")
    check_values(op, "sample", sample, like, INTEGER, (batch,))


def _check_tensor(op: str, name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{op}: expected {name} to be a torch.Tensor, got {type(x).__name__}; make one with torch.as_tensor(...)"
        )


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)
