"""rms_norm_silu by the kernels of csrc/rms_norm_silu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..native_common import contiguous, like_in_order, reason_against, register_fake

Saved = tuple[Tensor, ...]


def unsupported(*, x: Tensor, **_: Any) -> str | None:
    """Why these kernels cannot run, or None."""
    return reason_against(x)


def forward(
    x: Tensor, weight: Tensor, *, scale: Tensor | None, shift: Tensor | None, eps: float, activation: bool
) -> tuple[Tensor, Saved]:
    """Returns y, and what backward wants beside the inputs: nothing."""
    y: Tensor = torch.ops.fastddpm.rms_norm_silu.default(
        x, weight.contiguous(), contiguous(scale), contiguous(shift), eps, activation
    )
    return y, ()


def backward(
    dy: Tensor,
    saved: Saved,
    x: Tensor,
    weight: Tensor,
    *,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    activation: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, scale and shift from that of y."""
    dx, dweight, *others = torch.ops.fastddpm.rms_norm_silu_backward.default(
        dy, x, weight.contiguous(), contiguous(scale), contiguous(shift), eps, activation
    )
    gradients = iter(others)
    return dx, dweight, *[None if p is None else next(gradients) for p in (scale, shift)]


@register_fake("rms_norm_silu")
def _(x: Tensor, *args: Any) -> Tensor:
    return like_in_order(x)


@register_fake("rms_norm_silu_backward")
def _(dy: Tensor, x: Tensor, *args: Any) -> list[Tensor]:
    return [like_in_order(x), *(torch.empty_like(p) for p in args[:3] if p is not None)]
