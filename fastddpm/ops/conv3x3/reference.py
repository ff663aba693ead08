"""conv3x3 in plain PyTorch: the specification of every implementation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Saved = tuple[Tensor, ...]


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Saved]:
    """Returns y, and what backward wants beside the inputs: nothing."""
    dtype = _computed_in(x)
    if 0 in x.shape[2:]:  # conv2d refuses an image without pixels
        return _stored(x.new_empty((x.shape[0], weight.shape[0], *x.shape[2:])), x), ()
    with torch.autocast(x.device.type, enabled=False):
        y = F.conv2d(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), padding=1)
    return _stored(y, x), ()


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

    dx is dy * w with filters turned by 180 degrees and channels exchanged; dw[n, k, i, j] = sum dy[n] x[k], moved by
    (i - 1, j - 1); db[n] = sum dy[n].
    """
    dtype = _computed_in(x)
    g = dy.to(dtype)
    dx = dweight = dbias = None
    with torch.autocast(x.device.type, enabled=False):
        if wanted[0]:  # conv_transpose2d refuses them, too
            dx = g.new_empty(x.shape) if 0 in x.shape[2:] else F.conv_transpose2d(g, weight.to(dtype), padding=1)
            dx = _stored(dx, x)
        if wanted[1]:
            h, w = x.shape[2:]
            patches = F.pad(x.to(dtype), (1, 1, 1, 1)).unfold(2, h, 1).unfold(3, w, 1)  # [B, C, 3, 3, H, W]
            dweight = _stored(torch.einsum("bnhw,bkijhw->nkij", g, patches), weight)
        if wanted[2]:
            assert bias is not None
            dbias = g.sum((0, 2, 3)).to(bias.dtype)
    return dx, dweight, dbias


def _computed_in(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype == torch.float64 else torch.float32


def _stored(a: Tensor, like: Tensor) -> Tensor:
    """In the dtype and memory order of ``like``: the one rounding."""
    layout = torch.contiguous_format if like.is_contiguous() else torch.channels_last
    return a.to(like.dtype).contiguous(memory_format=layout)
