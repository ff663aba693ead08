"""3x3 convolutions as matrix products, where that is the faster way: on a CPU, on small maps and behind an upsampling.

With stride 1, and behind an upsampling:

    y[p] = sum_i W_i [x[p + (i, -1)] .. x[p + (i, 1)]] + b,   i = -1, 0, 1,   x = 0 outside

The three pixels side by side are one row of a matrix [H, B W, 3 I], made once; rows of the map come first there, so
that what row p + i gives to row p is a product of two blocks as they lie, without the rows outside. On a map of 4x4
pixels or less the convolutions of a CPU spend their time on what one row of an image leaves of their blocks, and on
bringing the weight, which is larger than the map, to an order of their own and its gradient back; the products do
neither.

A convolution of an image of repeated pixels, y[2p + a] with a in {0, 1}^2, sees 2x2 pixels of what was repeated: its
taps are sums of those of W, 16 in place of 36 for 4 pixels of y.

With stride 2 patches of 3x3 pixels overlap little: they are copied to be the rows of one matrix, [B H W, 9 I].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dispatch import once_differentiable
from ..ops.linear.interface import OP, linear


def conv3x3_products(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.conv2d(x, weight, bias, padding=1) as three matrix products.

    Args:
        x: [B, I, H, W], in half precision, too. weight: [O, I, 3, 3], copied unless channels_last. bias: [O].

    Returns: [B, O, H, W], channels_last, in the dtype of x.
    """
    return _products(x, weight.permute(0, 2, 3, 1).reshape(len(weight), 1, 3, -1), bias)


def upsampled_conv3x3_products(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.conv2d(F.interpolate(x, scale_factor=2), weight, bias, padding=1) as eight matrix products on x as it is.

    Args:
        x: [B, I, H, W], in half precision, too. weight: [O, I, 3, 3], copied unless channels_last. bias: [O].

    Returns: [B, O, 2H, 2W], channels_last, in the dtype of x.
    """
    sums = _sums_of_taps(weight.device, weight.dtype) @ weight.permute(0, 2, 3, 1).reshape(len(weight), 9, -1)
    return _products(x, sums.view(len(weight), 4, 2, -1), bias)


def strided_conv3x3_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.conv2d(x, weight, bias, stride=2) as a matrix product.

    Args:
        x: [B, I, H, W]. weight: [O, I, 3, 3], copied unless channels_last. bias: [O].

    Returns: [B, O, (H - 1) // 2, (W - 1) // 2], channels_last, in the dtype of x.
    """
    taps = weight.permute(0, 2, 3, 1).reshape(len(weight), -1)
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (x, taps, bias)):
        y: Tensor = _Strided.apply(x, taps, bias)  # type: ignore[no-untyped-call]
        return y
    return _strided(x, taps, bias)


class _Strided(torch.autograd.Function):
    """Keeps the inputs, in the dtype that they have; the matrix of patches is made again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, taps, bias)
        return _strided(x, taps, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, taps, bias = ctx.saved_tensors
        theirs, wanted = dy.permute(0, 2, 3, 1).contiguous(), ctx.needs_input_grad
        dx = dtaps = dbias = None
        if wanted[0]:
            dx = _strided_gradient(theirs, taps, x)
        if wanted[1] or wanted[2]:
            patches = _patches(x)
            product = OP.choose(patches, dict(x=patches, dtype=theirs.dtype))
            _, dtaps, dbias, _ = product.backward(theirs, (), patches, taps, bias, None, (False, *wanted[1:], False))
        return dx, dtaps, dbias


def _strided(x: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    return linear(_patches(x), taps, bias).permute(0, 3, 1, 2)


def _patches(x: Tensor) -> Tensor:
    """The 3x3 pixels from every other one on: [B, H, W, 9 I]."""
    of_pixel = x.permute(0, 2, 3, 1).unfold(1, 3, 2).unfold(2, 3, 2).permute(0, 1, 2, 4, 5, 3)
    return of_pixel.contiguous().flatten(3)


def _strided_gradient(dy: Tensor, taps: Tensor, x: Tensor) -> Tensor:
    """The gradient of x from that of y, [B, H, W, O].

    Row 2p of x is the first of the three that y[p] sees, and the last of those of y[p - 1]; row 2p + 1 the one in the
    middle of y[p]. So pixels of each of four kinds are one product of what sees them, rounded once.
    """
    around, of_tap = F.pad(dy, (0, 0, 1, 1, 1, 1)), taps.view(len(taps), 3, 3, -1)
    dx = dy.new_empty(*x.permute(0, 2, 3, 1).shape, dtype=x.dtype)
    seen = ((0, 1), (2, 0)), ((1, 1),)  # (tap, where y[p] is in ``around``, less p) of rows 2p and 2p + 1
    for i, rows in enumerate(seen):
        for j, columns in enumerate(seen):
            to = dx[:, i::2, j::2]
            h, w = to.shape[1:3]
            both = [(row, column) for row in rows for column in columns]
            parts = [around[:, y : y + h, z : z + w] for (_, y), (_, z) in both]
            weight = torch.cat([of_tap[:, row, column] for (row, _), (column, _) in both])
            to.copy_(linear(torch.cat(parts, dim=3), weight.T, dtype=x.dtype))
    return dx.permute(0, 3, 1, 2)


def _sums_of_taps(device: torch.device, dtype: torch.dtype) -> Tensor:
    """[16, 9]: which of the 3x3 taps fall on tap (p, q) of phase (a, b), rows in the order a, b, p, q.

    Along one axis the pixels before, at and after y[2p + a] are repetitions of x at p - 1, p, p (a = 0) or p, p, p + 1.
    """
    axis = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], device=device, dtype=dtype)  # [a, p, tap]
    return torch.einsum("api,bqj->abpqij", axis, axis).reshape(16, 9)


def _products(x: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """Sums of products of rows of x with taps [O, phases, rows, K], in the dtype of the taps; rounded to that of x.

    One phase has three rows of 3 I taps. Of four phases (a, b), phase (a, b) has two rows of 2 I taps: rows p + a - 1
    and p + a, pixels b - 1 and b.
    """
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (x, taps, bias)):
        y: Tensor = _Products.apply(x, taps, bias)  # type: ignore[no-untyped-call]
        return y
    return _forward(x, taps, bias)


class _Products(torch.autograd.Function):
    """Keeps x and the taps; the matrix of x, three times as large, is made again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, taps)
        return _forward(x, taps, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, taps = ctx.saved_tensors
        dy = _apart(dy, taps)
        beside = _beside(x, taps.dtype)
        dbeside, dtaps = torch.zeros_like(beside), torch.empty_like(taps)
        for phase, row, to, of, columns in _terms(x, taps):
            theirs = dy[phase, to].flatten(0, 1)
            dtaps[:, phase, row].addmm_(theirs.T, beside[of, :, columns].flatten(0, 1), beta=0)
            dbeside[of, :, columns].flatten(0, 1).addmm_(theirs, taps[:, phase, row])
        return _spread(dbeside, x), dtaps, dy.flatten(0, 2).sum(0) if ctx.needs_input_grad[2] else None


def _forward(x: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    beside = _beside(x, taps.dtype)
    start = taps.new_zeros(len(taps)) if bias is None else bias
    y = start.expand(taps.shape[1], *beside.shape[:2], -1).contiguous()
    for phase, row, to, of, columns in _terms(x, taps):
        y[phase, to].flatten(0, 1).addmm_(beside[of, :, columns].flatten(0, 1), taps[:, phase, row].T)
    return _together(y, x)


def _terms(x: Tensor, taps: Tensor) -> list[tuple[int, int, slice, slice, slice]]:
    """(phase, row of taps, rows of y that it gives to, rows of x that it takes from, columns of the matrix of x)."""
    c, height = x.shape[1:3]
    terms = []
    for phase in range(taps.shape[1]):
        a, b = divmod(phase, 2)
        for row in range(taps.shape[2]):
            shift = a + row - 1
            to, of = slice(max(0, -shift), height - max(0, shift)), slice(max(0, shift), height - max(0, -shift))
            terms.append((phase, row, to, of, slice(b * c, b * c + taps.shape[3])))
    return terms


def _together(y: Tensor, x: Tensor) -> Tensor:
    """Phases of rows, [phases, H, B W, O], as an image in the dtype of x: each pixel of four phases is one of 2x2."""
    b, _, h, w = x.shape
    side = 2 if len(y) == 4 else 1
    pixels = _copied(y.view(side, side, h, b, w, -1).permute(3, 2, 0, 4, 1, 5), x.dtype)
    return pixels.view(b, side * h, side * w, -1).permute(0, 3, 1, 2)


def _apart(y: Tensor, taps: Tensor) -> Tensor:
    """The inverse of `_together`, in the dtype of the taps."""
    side = 2 if taps.shape[1] == 4 else 1
    b, _, h, w = y.shape
    pixels = y.permute(0, 2, 3, 1).reshape(b, h // side, side, w // side, side, -1)
    return _copied(pixels.permute(2, 4, 1, 0, 3, 5), taps.dtype).view(side * side, h // side, b * w // side, -1)


def _beside(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Each pixel with its neighbours to the left and right, 0 outside: [H, B W, 3 I]."""
    b, c, h, w = x.shape
    padded = F.pad(x.permute(2, 0, 3, 1), (0, 0, 1, 1))
    return _copied(padded.unfold(2, 3, 1).permute(0, 1, 2, 4, 3), dtype).view(h, b * w, 3 * c)


def _copied(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In this dtype and in the order of its dimensions, in one pass."""
    return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x)


def _spread(beside: Tensor, x: Tensor) -> Tensor:
    """The transposed of `_beside`, in the dtype of x: what each pixel has in the three rows that it is in, summed."""
    b, c, h, w = x.shape
    left, total, right = beside.view(h, b, w, 3, c).permute(3, 1, 0, 2, 4)
    dx: Tensor = total.contiguous()
    dx[:, :, :-1] += left[:, :, 1:]
    dx[:, :, 1:] += right[:, :, :-1]
    return dx.permute(0, 3, 1, 2).to(x.dtype)
