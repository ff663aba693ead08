"""A 3x3 convolution of small feature maps as one matrix product.

    y[p] = W [x[p + (-1, -1)] .. x[p + (1, 1)]] + b,   x = 0 outside,   W [O, 9 I] the weight as it lies, channels_last

On a map of 4x4 pixels or less the library of convolutions of a CPU spends its time on what one row of an image leaves
of its blocks, and on bringing the weight, which is larger than the map, to an order of its own and its gradient back.
The product does neither. Forward and backward of 16 x 512 x 4 x 4 with 512 outputs, float32, one thread of a Xeon:
10.3 to 7.0 ms and 23.7 to 13.2 ms; from 8x8 on it loses.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MOST_PIXELS = 16
"""Of a map on which the product is the faster of the two."""


class Conv3x3(nn.Conv2d):
    """`torch.nn.Conv2d` of kernel 3 and padding 1, by the faster way.

    Args:
        in_channels, out_channels: I and O.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, I, H, W] to [B, O, H, W]."""
        if self.bias is not None and is_small(x) and x.dtype == self.weight.dtype:
            return conv3x3_by_patches(x, self.weight, self.bias)
        return super().forward(x)


def is_small(x: Tensor) -> bool:
    """Whether `conv3x3_by_patches` is the faster way for x [B, I, H, W]; it knows nothing of autocast."""
    small = x.device.type == "cpu" and x.shape[2] * x.shape[3] <= MOST_PIXELS
    return small and x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")


def conv3x3_by_patches(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.conv2d(x, weight, bias, padding=1) as a matrix product.

    Args:
        x: [B, I, H, W]. weight: [O, I, 3, 3], copied unless channels_last. bias: [O].

    Returns: [B, O, H, W], channels_last.
    """
    if torch.is_grad_enabled() and any(p.requires_grad for p in (x, weight, bias)):
        y: Tensor = _Conv3x3ByPatches.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return y
    return _product(x, weight, bias)


class _Conv3x3ByPatches(torch.autograd.Function):
    """Keeps x and weight; the patches, nine times x, are made again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = dy.permute(0, 2, 3, 1).reshape(-1, dy.shape[1])
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = _spread(rows @ _matrix(weight), x)
        if ctx.needs_input_grad[1]:
            dweight = (rows.T @ _patches(x)).view(len(weight), 3, 3, -1).permute(0, 3, 1, 2)
        return dx, dweight, rows.sum(0) if ctx.needs_input_grad[2] else None


def _product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    b, _, h, w = x.shape
    return F.linear(_patches(x), _matrix(weight), bias).view(b, h, w, -1).permute(0, 3, 1, 2)


def _matrix(weight: Tensor) -> Tensor:
    """[O, 9 I]: a view of what is channels_last."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


def _patches(x: Tensor) -> Tensor:
    """The 3x3 surroundings of each pixel, [B H W, 9 I], 0 outside."""
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    around = padded.unfold(1, 3, 1).unfold(2, 3, 1)  # [B, H, W, I, 3, 3]
    return around.permute(0, 1, 2, 4, 5, 3).reshape(-1, 9 * x.shape[1])


def _spread(patches: Tensor, like: Tensor) -> Tensor:
    """The transposed of `_patches`: what each pixel has in all the patches that it is in, summed."""
    b, c, h, w = like.shape
    patches = patches.view(b, h, w, 3, 3, c)
    total = patches[:, :, :, 1, 1].clone()
    for i in range(3):
        for j in range(3):
            if (i, j) != (1, 1):
                to = (
                    _inside(h, i - 1),
                    _inside(w, j - 1),
                )  # pixel p of the map is tap (i, j) of the one at p - (i, j) + 1
                of = _inside(h, 1 - i), _inside(w, 1 - j)
                total[:, to[0], to[1]] += patches[:, of[0], of[1], i, j]
    return total.permute(0, 3, 1, 2)


def _inside(size: int, shift: int) -> slice:
    """The pixels p with p - shift inside the map, too."""
    return slice(max(0, shift), size + min(0, shift))
