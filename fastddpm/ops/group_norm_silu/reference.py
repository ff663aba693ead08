"""group_norm_silu in plain PyTorch: the specification of every implementation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import philox

Saved = tuple[Tensor, ...]


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
    """Returns y, h where a residual is given, and what backward wants beside the inputs: mean, 1 / std, kept or not."""
    h = _before_norm(x, x2, channel_bias, residual)
    gain, offset = _gain_offset(weight, bias, scale, shift, h.dtype)
    mean = _mean_of_groups(h, num_groups)
    centred = h - mean
    rstd = torch.rsqrt(_mean_of_groups(centred.square(), num_groups) + eps)
    y = torch.addcmul(offset, centred, gain * rstd)
    if activation:
        y = torch.nn.functional.silu(y, inplace=True)
    saved: Saved = (mean, rstd)
    if dropout > 0:
        assert seed is not None and sample is not None and step is not None
        size, stream = math.prod(y.shape[1:]), philox.DROPOUT + layer
        words = philox.integers(size, seed=seed, sample=sample, step=step, stream=stream)
        keep = (words >= round(dropout * 2**32)).reshape(y.shape)
        y, saved = y * (keep.to(y.dtype) / (1 - dropout)), (mean, rstd, keep)
    return _stored(y, x), None if residual is None else _stored(h, x), saved


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
    """Gradients of x, weight, bias, channel_bias, scale, shift, residual and x2, from those of y and h.

    With a = n gain + offset before the activation: da is dy through dropout and SiLU; dn = da gain; through the norm,
    dx = (dn - mean(dn) - n mean(dn n)) / std + dh, the means over each group.
    """
    h = _before_norm(x, x2, channel_bias, residual)
    gain, offset = _gain_offset(weight, bias, scale, shift, h.dtype)
    mean, rstd, *keep = saved
    centred = h - mean
    da = torch.zeros_like(h) if dy is None else dy.to(h.dtype)
    if dropout > 0:
        da = da * (keep[0].to(da.dtype) / (1 - dropout))
    if activation:
        da = torch.ops.aten.silu_backward(da, torch.addcmul(offset, centred, gain * rstd))

    def per_pixel(sums: Tensor) -> Tensor:
        return sums[..., None, None] / (x.shape[2] * x.shape[3])

    # [B, C]: the parameters need no more than these
    sum_da, sum_da_n = da.sum(dim=(2, 3)), (da * centred).sum(dim=(2, 3)) * rstd[..., 0, 0]
    mean_dn = _mean_of_groups(gain * per_pixel(sum_da), num_groups)
    mean_dn_n = _mean_of_groups(gain * per_pixel(sum_da_n), num_groups)
    dx = centred.mul_(-rstd.square() * mean_dn_n).addcmul_(da, rstd * gain).sub_(rstd * mean_dn)
    if dh is not None:
        dx += dh

    factor = 1 if scale is None else 1 + scale.to(h.dtype)
    dweight, dbias = (factor * sum_da_n).sum(0).to(weight.dtype), (factor * sum_da).sum(0).to(bias.dtype)
    dchannel_bias = dscale = dshift = None
    if channel_bias is not None:
        of_channel = dx.sum(dim=(2, 3))
        dchannel_bias = (of_channel if channel_bias.dim() == 2 else of_channel.sum(0)).to(channel_bias.dtype)
    if scale is not None:
        dscale = (weight * sum_da_n + bias * sum_da).to(scale.dtype)
    if shift is not None:
        dshift = sum_da.to(shift.dtype)
    dresidual = None if residual is None else _stored(dx, residual)
    dx1, dx2 = (dx, None) if x2 is None else (dx[:, : x.shape[1]], _stored(dx[:, x.shape[1] :], x2))
    return _stored(dx1, x), dweight, dbias, dchannel_bias, dscale, dshift, dresidual, dx2


def _before_norm(x: Tensor, x2: Tensor | None, channel_bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """h = [x, x2] + channel_bias + residual, in float32; in float64 for float64 x."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    h = (x if x2 is None else torch.cat([x, x2], dim=1)).to(dtype)
    if channel_bias is not None:
        h = h + _per_channel(channel_bias, dtype)
    if residual is not None:
        h = h + residual.to(dtype)
    return h


def _gain_offset(
    weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(n weight + bias) (1 + scale) + shift = n gain + offset."""
    gain, offset = _per_channel(weight, dtype), _per_channel(bias, dtype)
    if scale is not None:
        factor = 1 + _per_channel(scale, dtype)
        gain, offset = gain * factor, offset * factor
    if shift is not None:
        offset = offset + _per_channel(shift, dtype)
    return gain, offset


def _per_channel(p: Tensor, dtype: torch.dtype) -> Tensor:
    """[C] or [B, C] to [1 or B, C, 1, 1]."""
    return p.to(dtype).reshape(-1, p.shape[-1], 1, 1)


def _mean_of_groups(a: Tensor, num_groups: int) -> Tensor:
    """The mean over each group of channels and the pixels, for each channel of the group: [B, C, 1, 1]; 0 of none."""
    if a.numel() == 0:
        return a.new_zeros((*a.shape[:2], 1, 1))
    channels = a.mean(dim=(2, 3), keepdim=True).unflatten(1, (num_groups, -1))  # [B, G, C/G, 1, 1]
    mean: Tensor = channels.mean(dim=2, keepdim=True).expand_as(channels).flatten(1, 2)
    return mean


def _stored(a: Tensor, like: Tensor) -> Tensor:
    """In the dtype and memory order of ``like``: the one rounding."""
    layout = torch.contiguous_format if like.is_contiguous() else torch.channels_last
    return a.to(like.dtype).contiguous(memory_format=layout)
