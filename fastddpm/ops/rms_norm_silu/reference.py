"""rms_norm_silu in plain PyTorch: the specification of every implementation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Saved = tuple[Tensor, ...]


def forward(
    x: Tensor, weight: Tensor, *, scale: Tensor | None, shift: Tensor | None, eps: float, activation: bool
) -> tuple[Tensor, Saved]:
    """Returns y, and what backward wants beside the inputs: nothing."""
    n, _, _ = _normalised(x, eps)
    y = _affine(n, weight, scale, shift)
    if activation:
        y = torch.nn.functional.silu(y, inplace=True)
    return _stored(y, x), ()


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
    """Gradients of x, weight, scale and shift from that of y.

    With a = n gain + shift before the activation: da is dy through the SiLU; dn = da gain; and through the norm
    dx = sqrt(C) / ||x|| (dn - n mean_c(dn n)), without the second term where the constant eps stands for ||x||.
    """
    n, factor, is_norm = _normalised(x, eps)
    da = dy.to(n.dtype)
    if activation:
        da = torch.ops.aten.silu_backward(da, _affine(n, weight, scale, shift))

    sum_da, sum_da_n = da.sum(dim=(2, 3)), (da * n).sum(dim=(2, 3))  # [B, C]: the parameters need no more than these
    gain = 1 if scale is None else 1 + scale.to(n.dtype)
    dweight = (gain * sum_da_n).sum(0).to(weight.dtype)
    dscale = None if scale is None else (weight * sum_da_n).to(scale.dtype)
    dshift = None if shift is None else sum_da.to(shift.dtype)

    dn = da * _per_channel(weight * gain, n.dtype)
    dx = factor * (dn - n * ((dn * n).mean(dim=1, keepdim=True) * is_norm))
    return _stored(dx, x), dweight, dscale, dshift


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """n = x factor, factor = sqrt(C) / max(||x||, eps), and where ||x|| is the larger of the two."""
    x = x if x.dtype == torch.float64 else x.to(torch.float32)
    norm = x.square().sum(dim=1, keepdim=True).sqrt()  # over the channels: [B, 1, H, W]
    factor = math.sqrt(x.shape[1]) / norm.clamp(min=eps)
    return x * factor, factor, norm > eps


def _affine(n: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """n weight (1 + scale) + shift."""
    gain = _per_channel(weight, n.dtype)
    if scale is not None:
        gain = gain * (1 + _per_channel(scale, n.dtype))
    return n * gain if shift is None else torch.addcmul(_per_channel(shift, n.dtype), n, gain)


def _per_channel(p: Tensor, dtype: torch.dtype) -> Tensor:
    """[C] or [B, C] to [1 or B, C, 1, 1]."""
    return p.to(dtype).reshape(-1, p.shape[-1], 1, 1)


def _stored(a: Tensor, like: Tensor) -> Tensor:
    """In the dtype and memory order of ``like``: the one rounding."""
    layout = torch.contiguous_format if like.is_contiguous() else torch.channels_last
    return a.to(like.dtype).contiguous(memory_format=layout)
