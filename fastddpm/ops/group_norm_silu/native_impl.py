"""group_norm_silu by the kernels of csrc/group_norm_silu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..native_common import NOTHING_DRAWN, contiguous, drawing, like_in_order, reason_against, register_fake

Saved = tuple[Tensor, ...]


def unsupported(*, x: Tensor, **_: Any) -> str | None:
    """Why these kernels cannot run, or None."""
    return reason_against(x)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    *,
    eps: float,
    channel_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    x2: Tensor | None,
    dropout: float,
    seed: Tensor | int | None,
    sample: Tensor | None,
    step: Tensor | int | None,
    layer: int,
    activation: bool,
) -> tuple[Tensor, Tensor | None, Saved]:
    """Returns y, h where a residual is given, and what backward wants beside the inputs: mean and 1 / std."""
    if not (channel_bias is scale is shift is None):
        channel_bias, scale, shift = contiguous(channel_bias), contiguous(scale), contiguous(shift)
    seeds = NOTHING_DRAWN if seed is None else drawing(seed, sample, step)
    y, mean, rstd, *h = torch.ops.fastddpm.group_norm_silu.default(
        x, weight.contiguous(), bias.contiguous(), num_groups, eps, channel_bias, scale, shift, residual, x2, dropout,
        *seeds, layer, activation,
    )  # fmt: skip
    return y, h[0] if h else None, (mean, rstd)


def backward(
    dy: Tensor | None,
    dh: Tensor | None,
    saved: Saved,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    *,
    channel_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    x2: Tensor | None,
    dropout: float,
    seed: Tensor | int | None,
    sample: Tensor | None,
    step: Tensor | int | None,
    layer: int,
    activation: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias, channel_bias, scale, shift, residual and x2; dropout is drawn again."""
    if dy is None:
        assert dh is not None
        dy = torch.zeros_like(dh)
    if residual is not None and residual.dtype == torch.float64:
        residual = residual.float()  # kernels write no float64; autograd widens the gradient
    dx, dweight, dbias, *others = torch.ops.fastddpm.group_norm_silu_backward.default(
        dy, dh, *saved, x,
        weight.contiguous(), bias.contiguous(), num_groups, contiguous(channel_bias), contiguous(scale),
        contiguous(shift), residual, x2, dropout, *drawing(seed, sample, step), layer, activation,
    )  # fmt: skip
    given = [p is not None for p in (channel_bias, scale, shift, residual, x2)]
    gradients = iter(others)
    return dx, dweight, dbias, *(next(gradients) if there else None for there in given)


@register_fake("group_norm_silu")
def _(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, *args: Any) -> list[Tensor]:
    residual = args[4]
    y = like_in_order(x, (x.shape[0], weight.shape[0], *x.shape[2:]))
    statistics = [x.new_empty((x.shape[0], num_groups), dtype=dtype) for dtype in (torch.float64, torch.float32)]
    return [y, *statistics, *([] if residual is None else [torch.empty_like(y)])]


@register_fake("group_norm_silu_backward")
def _(*args: Any) -> list[Tensor]:
    x, weight, bias = args[4:7]
    small = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in args[8:11] if p is not None]
    images = [like_in_order(p) for p in args[11:13] if p is not None]
    return [like_in_order(x), torch.empty_like(weight), torch.empty_like(bias), *small, *images]
