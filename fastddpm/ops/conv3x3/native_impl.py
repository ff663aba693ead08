"""conv3x3 by the kernels of csrc/conv3x3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kept import is_kept, kept
from ..native_common import contiguous, like_in_order, reason_against, register_fake

Saved = tuple[Tensor, ...]
HALF = (torch.bfloat16, torch.float16)
READ, TRANSFORMED, PACKED = 12, 32, 6
"""Tiles, see `_tile`, of weights that are read transformed, that are transformed before, too, and that are transformed
on the way to the product: measured with AVX-512."""
MOST_PIXELS = 4096
"""Of all maps of the batch, for which kept weights are read as they are: reading them transformed takes longer."""


def unsupported(*, x: Tensor, **_: Any) -> str | None:
    """Why these kernels cannot run, or None."""
    if x.is_cuda:
        return "the kernels are for the CPU: on a GPU torch.nn.functional.conv2d has tensor cores"
    return reason_against(x)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Saved]:
    """Returns y, and what backward wants beside the inputs: nothing."""
    bias = contiguous(bias)
    y: Tensor
    if not is_kept():
        y = torch.ops.fastddpm.conv3x3.default(x, weight, bias, False, _tile(x, x.dtype, TRANSFORMED))
    elif x.shape[0] * x.shape[2] * x.shape[3] <= MOST_PIXELS:
        packed, tile = kept(weight, 0, lambda: _packed(weight)), _tile(x, x.dtype, PACKED)
        y = torch.ops.fastddpm.conv3x3_packed.default(x, packed, bias, weight.shape[0], tile)
    else:
        tile = _tile(x, x.dtype, READ)
        weights = kept(weight, tile, lambda: torch.ops.fastddpm.conv3x3_weights.default(weight, False, tile))
        y = torch.ops.fastddpm.conv3x3_transformed.default(x, weights, bias, weight.shape[0])
    return y, ()


def backward(
    dy: Tensor,
    saved: Saved,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    wanted: tuple[bool, bool, bool],
    precision: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight and bias, as far as wanted, from that of y.

    Args:
        precision: the dtype whose rounding the gradient of weight may show, as far as x does.
    """
    dx = dweight = dbias = None
    if wanted[0]:
        dx = torch.ops.fastddpm.conv3x3.default(dy, weight, None, True, _tile(x, x.dtype, TRANSFORMED))
    if wanted[1] or wanted[2]:
        tile = _tile(x, precision, READ)
        of_weight = weight.float() if weight.dtype == torch.float64 else weight  # kernels write no float64
        found = torch.ops.fastddpm.conv3x3_gradient.default(dy, x, of_weight, bias if wanted[2] else None, tile)
        dweight = found[0].to(weight.dtype)
        dbias = found[1] if wanted[2] else None
    return dx, dweight if wanted[1] else None, dbias


def _packed(weight: Tensor) -> Tensor:
    """[N, K, 3, 3] to [ceil(N / 16), K, 9, 16], in half precision or float32: 0 in place of outputs beyond the last."""
    weight = weight.float() if weight.dtype == torch.float64 else weight
    padded = torch.nn.functional.pad(weight, (0, 0, 0, 0, 0, 0, 0, -len(weight) % 16))
    packed: Tensor = padded.unflatten(0, (-1, 16)).permute(0, 2, 3, 4, 1).flatten(2, 3).contiguous()
    return packed


def _tile(x: Tensor, output: torch.dtype, weights: int) -> int:
    """Of how many pixels a side tiles are: 4 where input and output are in half precision, and the map is large enough.

    Args:
        weights: how many tiles take as long as reading what a weight is transformed to, and transforming it.
    """
    if x.dtype not in HALF or output not in HALF:
        return 2
    batch, _, height, width = x.shape
    large, small = (batch * -(-height // side) * -(-width // side) for side in (4, 2))
    return 4 if 36 * (large + weights) < 16 * (small + weights) else 2


@register_fake("conv3x3_weights")
def _(weight: Tensor, turned: bool, tile: int) -> Tensor:
    outputs, channels = weight.shape[:2] if not turned else (weight.shape[1], weight.shape[0])
    return weight.new_empty(((outputs + 31) // 32, (tile + 2) ** 2, channels, 32), dtype=torch.float32)


@register_fake("conv3x3_transformed")
def _(x: Tensor, weights: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    return like_in_order(x, (x.shape[0], outputs, *x.shape[2:]))


@register_fake("conv3x3_packed")
def _(x: Tensor, weights: Tensor, bias: Tensor | None, outputs: int, tile: int) -> Tensor:
    return like_in_order(x, (x.shape[0], outputs, *x.shape[2:]))


@register_fake("conv3x3")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, turned: bool, tile: int) -> Tensor:
    return like_in_order(x, (x.shape[0], weight.shape[1 if turned else 0], *x.shape[2:]))


@register_fake("conv3x3_gradient")
def _(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, tile: int) -> list[Tensor]:
    dweight = torch.empty_like(weight, memory_format=torch.channels_last)
    return [dweight, *(() if bias is None else (torch.empty_like(bias),))]
