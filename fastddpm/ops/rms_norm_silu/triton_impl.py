"""rms_norm_silu in Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import as_float32, launch, like_in_order, reason_against, save, strides

Saved = tuple[Tensor, ...]

TILE = 8192  # elements of a tile of pixels with all their channels

# Integers become float32 by tl.cast: one that is 1 is a constant to Triton, and has no methods.


@triton.jit
def tile_of(x, sample, pixel, channel, inside, elements, channel_stride, pixel_stride):
    at = sample * elements + pixel[:, None] * pixel_stride + channel[None, :] * channel_stride
    return tl.load(x + at, mask=inside, other=0).to(tl.float32)


@triton.jit
def affine(weight, scale, shift, sample, channel, real, channels, SCALE: tl.constexpr, SHIFT: tl.constexpr):
    """gain = weight (1 + scale), factor = 1 + scale, shift."""
    w = tl.load(weight + channel, mask=real, other=0).to(tl.float32)
    factor, offset = w * 0.0 + 1.0, w * 0.0
    if SCALE:
        factor += tl.load(scale + sample * channels + channel, mask=real, other=0).to(tl.float32)
    if SHIFT:
        offset = tl.load(shift + sample * channels + channel, mask=real, other=0).to(tl.float32)
    return w, factor, offset


@triton.jit(do_not_specialize=["eps"])
def forward_kernel(
    x, weight, scale, shift, y, eps, channels, pixels, blocks, channel_stride, pixel_stride,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y = silu(n gain + shift), n = sqrt(C) x / max(||x||, eps) (Zhang and Sennrich 2019, eq. 4).

    A program takes a few pixels of one sample with all their channels, so that x is read once. Bytes an element in half
    precision: 2 read, 2 written. What limits it is memory.
    """
    eps = as_float32(eps)
    sample, part = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0) % blocks
    pixel, channel = part * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDE)
    real = channel < channels
    inside = (pixel < pixels)[:, None] & real[None, :]
    elements = channels * pixels
    v = tile_of(x, sample, pixel, channel, inside, elements, channel_stride, pixel_stride)
    w, factor, offset = affine(weight, scale, shift, sample, channel, real, channels, SCALE, SHIFT)
    norm = tl.sqrt_rn(tl.sum(v * v, axis=1))
    n = v * (tl.sqrt_rn(tl.cast(channels, tl.float32)) / tl.maximum(norm, eps))[:, None]
    a = n * (w * factor)[None, :] + offset[None, :]
    if ACTIVATION:
        a = a / (1.0 + tl.exp(-a))
    save(y + sample * elements + pixel[:, None] * pixel_stride + channel[None, :] * channel_stride, a, inside)


@triton.jit(do_not_specialize=["eps"])
def backward_kernel(
    dy, x, weight, scale, shift, dx, sums, eps, channels, pixels, blocks, channel_stride, pixel_stride,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dx = sqrt(C) / ||x|| (dn - n mean_c(dn n)), without the second term where eps stands for ||x||.

    The sums of da and da n over the pixels of a program go to memory, for the gradients of the parameters: no atomics.
    Bytes an element in half precision: 4 read, 2 written. What limits it is memory.
    """
    eps = as_float32(eps)
    sample, part = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0) % blocks
    pixel, channel = part * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDE)
    real = channel < channels
    inside = (pixel < pixels)[:, None] & real[None, :]
    elements = channels * pixels
    v = tile_of(x, sample, pixel, channel, inside, elements, channel_stride, pixel_stride)
    da = tile_of(dy, sample, pixel, channel, inside, elements, channel_stride, pixel_stride)
    w, factor, offset = affine(weight, scale, shift, sample, channel, real, channels, SCALE, SHIFT)
    norm = tl.sqrt_rn(tl.sum(v * v, axis=1))
    to_n = tl.sqrt_rn(tl.cast(channels, tl.float32)) / tl.maximum(norm, eps)
    n = v * to_n[:, None]
    gain = w * factor
    if ACTIVATION:
        a = n * gain[None, :] + offset[None, :]
        s = 1.0 / (1.0 + tl.exp(-a))
        da *= s * (1.0 + a * (1.0 - s))
    at = sums + tl.program_id(0).to(tl.int64) * 2 * channels + channel
    tl.store(at, tl.sum(da, axis=0), mask=real)
    tl.store(at + channels, tl.sum(da * n, axis=0), mask=real)
    dn = da * gain[None, :]
    mean = tl.where(norm > eps, tl.sum(dn * n, axis=1) / tl.cast(channels, tl.float32), 0.0)
    d = to_n[:, None] * (dn - n * mean[:, None])
    save(dx + sample * elements + pixel[:, None] * pixel_stride + channel[None, :] * channel_stride, d, inside)


def unsupported(*, x: Tensor, **_: Any) -> str | None:
    """Why these kernels cannot run, or None."""
    return reason_against(x)


def _arguments(x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float, activation: bool) -> dict[str, Any]:
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    wide = triton.next_power_of_2(channels)
    rows = max(1, min(TILE // wide, triton.next_power_of_2(max(pixels, 1))))
    channel_stride, pixel_stride = strides(x)
    return dict(
        scale=x if scale is None else scale, shift=x if shift is None else shift, eps=eps, channels=channels,
        pixels=pixels, blocks=triton.cdiv(pixels, rows), channel_stride=channel_stride, pixel_stride=pixel_stride,
        SCALE=scale is not None, SHIFT=shift is not None, ACTIVATION=activation, ROWS=rows, WIDE=wide,
        num_warps=8 if rows * wide > 2048 else 4,
    )  # fmt: skip


@torch.library.triton_op("fastddpm::triton_rms_norm_silu", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float, activation: bool
) -> Tensor:
    y = like_in_order(x)
    arguments = _arguments(x, scale, shift, eps, activation)
    launch(forward_kernel, (x.shape[0] * arguments["blocks"],), x=x, weight=weight, y=y, **arguments)
    return y


@torch.library.triton_op("fastddpm::triton_rms_norm_silu_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float, activation: bool
) -> list[Tensor]:
    dx = like_in_order(x)
    arguments = _arguments(x, scale, shift, eps, activation)
    batch, channels = x.shape[:2]
    sums = x.new_empty((batch, arguments["blocks"], 2, channels), dtype=torch.float32)
    launch(backward_kernel, (batch * arguments["blocks"],), dy=dy, x=x, weight=weight, dx=dx, sums=sums, **arguments)
    da, da_n = sums.sum(1).unbind(1)  # [B, C]
    factor = 1.0 if scale is None else 1 + scale.float()
    gradients = [dx, (factor * da_n).sum(0).to(weight.dtype)]
    if scale is not None:
        gradients.append((weight.float() * da_n).to(scale.dtype))
    if shift is not None:
        gradients.append(da.to(shift.dtype))
    return gradients


def forward(
    x: Tensor, weight: Tensor, *, scale: Tensor | None, shift: Tensor | None, eps: float, activation: bool
) -> tuple[Tensor, Saved]:
    """Returns y, and what backward wants beside the inputs: nothing."""
    scale, shift = (p if p is None else p.contiguous() for p in (scale, shift))
    return _forward(x, weight.contiguous(), scale, shift, eps, activation), ()


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
    scale, shift = (p if p is None else p.contiguous() for p in (scale, shift))
    dx, dweight, *others = _backward(dy, x, weight.contiguous(), scale, shift, eps, activation)
    gradients = iter(others)
    return dx, dweight, *(None if p is None else next(gradients) for p in (scale, shift))
