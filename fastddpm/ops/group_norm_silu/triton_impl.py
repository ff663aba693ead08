"""group_norm_silu in Triton.

A program owns a slab: whole groups of one sample, over all pixels or over a chunk of them. A tile is [pixels, columns];
the columns are the channels of GROUPS groups, each group padded to a power of two.

- One read: all pixels of the slab are one tile, which stays in registers between the statistics and the result.
- Two reads, where that does not fit, or where a small batch would leave the GPU empty: a first kernel leaves the
  moments (in backward, the sums) of each chunk, and a second one merges them and makes the result.

Nothing is added by atomics: sums over chunks and over the batch are taken in a fixed order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._dispatch import dense_gradient
from ..philox import DROPOUT
from ..triton_common import (
    draw_arguments,
    drawing,
    launch,
    like_in_order,
    number_or_tensor,
    philox_words,
    reason_against,
    save,
    strides,
)

Saved = tuple[Tensor, ...]

TILE = 32768  # elements of a tile that stays in registers: 64 of 32 bits for each of 512 threads
BACKWARD_TILE = 16384  # x and dy stay there
CHUNK_TILE = 8192  # elements of a chunk
WIDTH, BACKWARD_WIDTH = 64, 32  # columns of a slab: runs of 128 and 64 bytes of bfloat16 from each pixel
FULL = 128  # programs that fill a large GPU; with fewer, a slab of more than a tile of chunks is cut
NUMBERS = ["seed_low", "seed_high", "step", "eps", "drop_below", "keep_scale"]


class Plan(NamedTuple):
    """How a call is cut: groups a slab, columns of a group (a power of two), pixels of a tile, chunks, warps."""

    groups: int
    columns: int
    pixels: int
    chunks: int
    warps: int


def plan(batch: int, channels: int, pixels: int, num_groups: int, tile: int, width: int) -> Plan:
    """One read where all pixels of one group fit a tile and the slabs fill the GPU; otherwise chunks."""
    columns = triton.next_power_of_2(channels // num_groups)
    rows = triton.next_power_of_2(max(pixels, 1))
    groups = max(1, min(width // columns, triton.next_power_of_2(num_groups)))
    one_read = groups
    while one_read > 1 and rows * one_read * columns > tile:
        one_read //= 2
    slabs = batch * triton.cdiv(num_groups, one_read)
    if rows * one_read * columns <= tile and (slabs >= FULL or rows * groups * columns <= CHUNK_TILE):
        size = rows * one_read * columns
        return Plan(one_read, columns, rows, 1, max(1, min(16, size // 1024)))
    per_tile = max(1, CHUNK_TILE // (groups * columns))
    slabs = batch * triton.cdiv(num_groups, groups)
    while per_tile > 16 and slabs * triton.cdiv(pixels, per_tile) < FULL:
        per_tile //= 2
    return Plan(groups, columns, per_tile, triton.cdiv(pixels, per_tile), 8)


@triton.jit
def slab(program, channels, of_group, DENSE: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr):
    """Channel of each column of a slab, and whether it is one. DENSE: no group is padded, columns are neighbours."""
    column = tl.arange(0, GROUPS * COLUMNS)
    if DENSE:
        channel = program * (GROUPS * COLUMNS) + column
        return channel, channel < channels
    else:
        group, within = program * GROUPS + column // COLUMNS, column % COLUMNS
        channel = group * of_group + within
        return channel, (channel < channels) & (within < of_group)


@triton.jit
def of_groups(x, GROUPS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum over the columns of each group, for each column."""
    sums = tl.sum(tl.reshape(x, [GROUPS, COLUMNS]), axis=1)
    return tl.reshape(tl.broadcast_to(sums[:, None], [GROUPS, COLUMNS]), [GROUPS * COLUMNS])


@triton.jit
def load_image(image, sample, pixel, channel, inside, elements, channel_stride, pixel_stride):
    at = pixel[:, None] * pixel_stride + channel[None, :] * channel_stride
    return tl.load(image + sample * elements + at, mask=inside, other=0).to(tl.float32)


@triton.jit
def load_channels(p, sample, channel, real, stride, other):
    """Numbers of each channel, of each sample where stride is not 0."""
    return tl.load(p + sample * stride + channel, mask=real, other=other).to(tl.float32)


@triton.jit
def before_norm(
    x, x2, residual, channel_bias, sample, pixel, channel, inside, real, channels, channels1, pixels,
    x_channel, x_pixel, x2_channel, x2_pixel, residual_channel, residual_pixel, bias_stride,
    X2: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """h = [x, x2] + channel_bias + residual of a tile."""
    if X2:
        first = inside & (channel < channels1)[None, :]
        second = inside & (channel >= channels1)[None, :]
        h = load_image(x, sample, pixel, channel, first, channels1 * pixels, x_channel, x_pixel)
        elements2 = (channels - channels1) * pixels
        h += load_image(x2, sample, pixel, channel - channels1, second, elements2, x2_channel, x2_pixel)
    else:
        h = load_image(x, sample, pixel, channel, inside, channels * pixels, x_channel, x_pixel)
    if RESIDUAL:
        elements = channels * pixels
        h += load_image(residual, sample, pixel, channel, inside, elements, residual_channel, residual_pixel)
    if BIAS:
        h += load_channels(channel_bias, sample, channel, real, bias_stride, 0.0)[None, :]
    return h


@triton.jit
def gain_offset(
    weight, bias, scale, shift, sample, channel, real, channels, SCALE: tl.constexpr, SHIFT: tl.constexpr
):
    """(n weight + bias) (1 + scale) + shift = n gain + offset."""
    gain = load_channels(weight, sample, channel, real, 0, 0.0)
    offset = load_channels(bias, sample, channel, real, 0, 0.0)
    if SCALE:
        factor = 1.0 + load_channels(scale, sample, channel, real, channels, 0.0)
        gain, offset = gain * factor, offset * factor
    if SHIFT:
        offset += load_channels(shift, sample, channel, real, channels, 0.0)
    return gain, offset


@triton.jit
def kept(
    sample_index, seed_tensor, seed_low, seed_high, step_tensor, step, drop_below, keep_scale, sample, pixel, channel,
    pixels, first, STREAM: tl.constexpr, SEED: tl.constexpr, STEP: tl.constexpr, FOURS: tl.constexpr,
    ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """1 / (1 - p) where an element is kept by dropout, else 0: [ROWS, WIDE]; its first pixel is ``first``.

    With FOURS the pixels of a channel are a multiple of four, as is ``first``: one counter then serves four pixels.
    """
    low, high, step_word = drawing(seed_tensor, seed_low, seed_high, step_tensor, step, SEED, STEP)
    number = (tl.load(sample_index + sample) & 0xFFFFFFFF).to(tl.uint32)
    bound = drop_below.to(tl.uint32)
    if FOURS:
        block = (channel[None, :] * pixels + first) // 4 + tl.arange(0, ROWS // 4)[:, None]
        w0, w1, w2, w3 = philox_words(block.to(tl.uint32), number, step_word, STREAM, low, high)
        k0, k1 = tl.where(w0 >= bound, keep_scale, 0.0), tl.where(w1 >= bound, keep_scale, 0.0)
        k2, k3 = tl.where(w2 >= bound, keep_scale, 0.0), tl.where(w3 >= bound, keep_scale, 0.0)
        lanes = tl.join(tl.join(k0, k2), tl.join(k1, k3))  # [ROWS / 4, WIDE, 2, 2]
        return tl.reshape(tl.permute(lanes, (0, 2, 3, 1)), [ROWS, WIDE])
    else:
        element = channel[None, :] * pixels + pixel[:, None]
        w0, w1, w2, w3 = philox_words((element // 4).to(tl.uint32), number, step_word, STREAM, low, high)
        lane = element % 4
        word = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
        return tl.where(word >= bound, keep_scale, 0.0)


@triton.jit
def centred_squares(h, mean, inside):
    d = tl.where(inside, h - mean[None, :], 0.0)
    return tl.sum(d * d, axis=0)


@triton.jit(do_not_specialize=NUMBERS)
def forward_kernel(
    x, x2, residual, channel_bias, weight, bias, scale, shift, y, h_out, mean_out, rstd_out, moments, sample_index,
    seed_tensor, seed_low, seed_high, step_tensor, step, eps, drop_below, keep_scale, channels, channels1, pixels,
    num_groups, of_group, chunks, x_channel, x_pixel, x2_channel, x2_pixel, residual_channel, residual_pixel,
    y_channel, y_pixel, bias_stride,
    X2: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    DROP: tl.constexpr, ACTIVATION: tl.constexpr, ONE_READ: tl.constexpr, STREAM: tl.constexpr, SEED: tl.constexpr,
    STEP: tl.constexpr, FOURS: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    MERGE: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """y = drop(silu((h - mean) rstd gain + offset)) of a slab, or of a chunk of its pixels (Wu and He 2018, eq. 1-2).

    Bytes an element in half precision: 2 read, 2 written (with chunks 4 read). What limits it is memory.
    """
    WIDE: tl.constexpr = GROUPS * COLUMNS
    sample, chunk = tl.program_id(0).to(tl.int64) // chunks, tl.program_id(0) % chunks
    channel, real = slab(tl.program_id(1), channels, of_group, DENSE, GROUPS, COLUMNS)
    pixel = chunk * ROWS + tl.arange(0, ROWS)
    inside = (pixel < pixels)[:, None] & real[None, :]
    h = before_norm(
        x, x2, residual, channel_bias, sample, pixel, channel, inside, real, channels, channels1, pixels, x_channel,
        x_pixel, x2_channel, x2_pixel, residual_channel, residual_pixel, bias_stride, X2, RESIDUAL, BIAS,
    )  # fmt: skip
    group = channel // of_group
    if ONE_READ:
        count = (pixels * of_group).to(tl.float32)
        mean = of_groups(tl.sum(tl.where(inside, h, 0.0), axis=0), GROUPS, COLUMNS) / count
        rest = of_groups(tl.sum(tl.where(inside, h - mean[None, :], 0.0), axis=0), GROUPS, COLUMNS) / count
        variance = of_groups(centred_squares(h, mean, inside), GROUPS, COLUMNS) / count - rest * rest
    else:
        mean, rest, variance = merged(
            moments, sample, group, real, num_groups, pixels, of_group, chunks, ROWS, WIDE, MERGE
        )
    rstd = 1.0 / tl.sqrt_rn(variance + eps)
    first_of_group = real & (channel % of_group + chunk == 0)
    tl.store(mean_out + (sample * num_groups + group) * 2, mean, mask=first_of_group)
    tl.store(mean_out + (sample * num_groups + group) * 2 + 1, rest, mask=first_of_group)
    tl.store(rstd_out + sample * num_groups + group, rstd, mask=first_of_group)

    gain, offset = gain_offset(weight, bias, scale, shift, sample, channel, real, channels, SCALE, SHIFT)
    a = (h - mean[None, :]) * (gain * rstd)[None, :] + (offset - rest * (gain * rstd))[None, :]
    if ACTIVATION:
        a = a / (1.0 + tl.exp(-a))
    if DROP:
        a *= kept(
            sample_index, seed_tensor, seed_low, seed_high, step_tensor, step, drop_below, keep_scale, sample, pixel,
            channel, pixels, chunk * ROWS, STREAM, SEED, STEP, FOURS, ROWS, WIDE,
        )  # fmt: skip
    at = sample * channels * pixels + pixel[:, None] * y_pixel + channel[None, :] * y_channel
    save(y + at, a, inside)
    if RESIDUAL:
        save(h_out + at, h, inside)


@triton.jit
def merged(
    moments, sample, group, real, num_groups, pixels, of_group, chunks, ROWS: tl.constexpr, WIDE: tl.constexpr,
    MERGE: tl.constexpr,
):  # fmt: skip
    """Mean and variance of each column's group from the moments of the chunks (Chan et al. 1983).

    The mean comes in two numbers: one, and what its rounding took away.
    """
    at = moments + (sample * chunks) * num_groups * 3 + group * 3
    total = tl.zeros([WIDE], tl.float32)
    for begin in range(0, chunks, MERGE):
        k = begin + tl.arange(0, MERGE)
        size = tl.minimum(ROWS, pixels - k * ROWS).to(tl.float32)
        there = (k < chunks)[:, None] & real[None, :]
        m = tl.load(at[None, :] + k[:, None] * num_groups * 3, mask=there, other=0)
        total += tl.sum(tl.where(there, m * size[:, None], 0.0), axis=0)
    mean = total / pixels.to(tl.float32)
    squares, rest = tl.zeros([WIDE], tl.float32), tl.zeros([WIDE], tl.float32)
    for begin in range(0, chunks, MERGE):
        k = begin + tl.arange(0, MERGE)
        size = tl.minimum(ROWS, pixels - k * ROWS).to(tl.float32)
        there = (k < chunks)[:, None] & real[None, :]
        m = tl.load(at[None, :] + k[:, None] * num_groups * 3, mask=there, other=0)
        r = tl.load(at[None, :] + k[:, None] * num_groups * 3 + 1, mask=there, other=0)
        s = tl.load(at[None, :] + k[:, None] * num_groups * 3 + 2, mask=there, other=0)
        d = (m - mean[None, :]) + r
        rest += tl.sum(tl.where(there, d * size[:, None], 0.0), axis=0)
        squares += tl.sum(tl.where(there, s + d * d * (size * of_group)[:, None], 0.0), axis=0)
    rest /= pixels.to(tl.float32)
    return mean, rest, squares / (pixels * of_group).to(tl.float32) - rest * rest


@triton.jit
def moments_kernel(
    x, x2, residual, channel_bias, moments, channels, channels1, pixels, num_groups, of_group, chunks,
    x_channel, x_pixel, x2_channel, x2_pixel, residual_channel, residual_pixel, bias_stride,
    X2: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Mean (in two numbers) and squares of the deviations of each group in a chunk. Bytes an element in half: 2."""
    sample, chunk = tl.program_id(0).to(tl.int64) // chunks, tl.program_id(0) % chunks
    channel, real = slab(tl.program_id(1), channels, of_group, DENSE, GROUPS, COLUMNS)
    pixel = chunk * ROWS + tl.arange(0, ROWS)
    inside = (pixel < pixels)[:, None] & real[None, :]
    h = before_norm(
        x, x2, residual, channel_bias, sample, pixel, channel, inside, real, channels, channels1, pixels, x_channel,
        x_pixel, x2_channel, x2_pixel, residual_channel, residual_pixel, bias_stride, X2, RESIDUAL, BIAS,
    )  # fmt: skip
    count = (tl.minimum(ROWS, pixels - chunk * ROWS) * of_group).to(tl.float32)
    mean = of_groups(tl.sum(tl.where(inside, h, 0.0), axis=0), GROUPS, COLUMNS) / count
    rest = of_groups(tl.sum(tl.where(inside, h - mean[None, :], 0.0), axis=0), GROUPS, COLUMNS) / count
    squares = of_groups(centred_squares(h, mean, inside), GROUPS, COLUMNS) - count * rest * rest
    first_of_group = real & (channel % of_group == 0)
    at = moments + (tl.program_id(0).to(tl.int64) * num_groups + channel // of_group) * 3
    tl.store(at, mean, mask=first_of_group)
    tl.store(at + 1, rest, mask=first_of_group)
    tl.store(at + 2, squares, mask=first_of_group)


@triton.jit(do_not_specialize=NUMBERS)
def backward_kernel(
    dy, dh, x, x2, residual, channel_bias, weight, bias, scale, shift, mean_in, rstd_in, sums, dx, dx2, dresidual,
    small, dscale, dshift, sample_index, seed_tensor, seed_low, seed_high, step_tensor, step, drop_below, keep_scale,
    batch, channels, channels1, pixels, num_groups, of_group, chunks, x_channel, x_pixel, x2_channel, x2_pixel,
    residual_channel, residual_pixel, dy_channel, dy_pixel, dh_channel, dh_pixel, bias_stride,
    X2: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    DROP: tl.constexpr, ACTIVATION: tl.constexpr, DY: tl.constexpr, DH: tl.constexpr, PASS: tl.constexpr,
    STREAM: tl.constexpr, SEED: tl.constexpr, STEP: tl.constexpr, FOURS: tl.constexpr, GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, MERGE: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """dx = rstd (dn - mean(dn) - n mean(dn n)) + dh, dn = da gain, da = dy through dropout and the activation.

    PASS 0 does all in one read; 1 leaves the sums of each chunk; 2 adds them up and makes dx. By channel the sums of da
    and da n give dgamma and dbeta, and with those of n and dh the sum of dx, which is the gradient of the channel bias:
    no further pass. Bytes an element in half precision: 4 read, 2 written (8 and 2 in two passes). Memory limits it.
    """
    WIDE: tl.constexpr = GROUPS * COLUMNS
    sample, chunk = tl.program_id(0).to(tl.int64) // chunks, tl.program_id(0) % chunks
    channel, real = slab(tl.program_id(1), channels, of_group, DENSE, GROUPS, COLUMNS)
    pixel = chunk * ROWS + tl.arange(0, ROWS)
    inside = (pixel < pixels)[:, None] & real[None, :]
    elements = channels * pixels
    h = before_norm(
        x, x2, residual, channel_bias, sample, pixel, channel, inside, real, channels, channels1, pixels, x_channel,
        x_pixel, x2_channel, x2_pixel, residual_channel, residual_pixel, bias_stride, X2, RESIDUAL, BIAS,
    )  # fmt: skip
    group = channel // of_group
    mean = tl.load(mean_in + (sample * num_groups + group) * 2, mask=real, other=0)
    rest = tl.load(mean_in + (sample * num_groups + group) * 2 + 1, mask=real, other=0)
    rstd = tl.load(rstd_in + sample * num_groups + group, mask=real, other=0)
    n = tl.where(inside, ((h - mean[None, :]) - rest[None, :]) * rstd[None, :], 0.0)
    gain, offset = gain_offset(weight, bias, scale, shift, sample, channel, real, channels, SCALE, SHIFT)
    if DY:
        da = load_image(dy, sample, pixel, channel, inside, elements, dy_channel, dy_pixel)
        if DROP:
            da *= kept(
                sample_index, seed_tensor, seed_low, seed_high, step_tensor, step, drop_below, keep_scale, sample,
                pixel, channel, pixels, chunk * ROWS, STREAM, SEED, STEP, FOURS, ROWS, WIDE,
            )  # fmt: skip
        if ACTIVATION:
            a = n * gain[None, :] + offset[None, :]
            s = 1.0 / (1.0 + tl.exp(-a))
            da *= s * (1.0 + a * (1.0 - s))
    else:
        da = n * 0.0
    if DH:
        of_sum = load_image(dh, sample, pixel, channel, inside, elements, dh_channel, dh_pixel)

    if PASS == 2:
        at = sums + sample * chunks * 4 * channels + channel
        total_da, total_da_n = tl.zeros([WIDE], tl.float32), tl.zeros([WIDE], tl.float32)
        total_n, total_dh = tl.zeros([WIDE], tl.float32), tl.zeros([WIDE], tl.float32)
        for begin in range(0, chunks, MERGE):
            k = begin + tl.arange(0, MERGE)
            there = (k < chunks)[:, None] & real[None, :]
            of_chunk = at[None, :] + k[:, None] * 4 * channels
            total_da += tl.sum(tl.load(of_chunk, mask=there, other=0), axis=0)
            total_da_n += tl.sum(tl.load(of_chunk + channels, mask=there, other=0), axis=0)
            total_n += tl.sum(tl.load(of_chunk + 2 * channels, mask=there, other=0), axis=0)
            total_dh += tl.sum(tl.load(of_chunk + 3 * channels, mask=there, other=0), axis=0)
    else:
        total_da, total_da_n, total_n = tl.sum(da, axis=0), tl.sum(da * n, axis=0), tl.sum(n, axis=0)
        total_dh = tl.sum(of_sum, axis=0) if DH else total_n * 0.0
    if PASS == 1:
        at = sums + tl.program_id(0).to(tl.int64) * 4 * channels + channel
        tl.store(at, total_da, mask=real)
        tl.store(at + channels, total_da_n, mask=real)
        tl.store(at + 2 * channels, total_n, mask=real)
        tl.store(at + 3 * channels, total_dh, mask=real)
    else:
        count = (pixels * of_group).to(tl.float32)
        mean_dn = of_groups(tl.where(real, gain * total_da, 0.0), GROUPS, COLUMNS) / count
        mean_dn_n = of_groups(tl.where(real, gain * total_da_n, 0.0), GROUPS, COLUMNS) / count
        d = rstd[None, :] * (da * gain[None, :] - mean_dn[None, :] - n * mean_dn_n[None, :])
        if DH:
            d += of_sum
        by_pixel = pixel[:, None]
        if X2:
            at = sample * channels1 * pixels + by_pixel * x_pixel + channel[None, :] * x_channel
            save(dx + at, d, inside & (channel < channels1)[None, :])
            at = sample * (channels - channels1) * pixels + by_pixel * x2_pixel
            at += (channel - channels1)[None, :] * x2_channel
            save(dx2 + at, d, inside & (channel >= channels1)[None, :])
        else:
            save(dx + sample * elements + by_pixel * x_pixel + channel[None, :] * x_channel, d, inside)
        if RESIDUAL:
            at = sample * elements + by_pixel * residual_pixel + channel[None, :] * residual_channel
            save(dresidual + at, d, inside)

        once = real & (channel * 0 + chunk == 0)
        factor = 1.0
        at = sample * channels + channel
        if SCALE:
            factor = 1.0 + load_channels(scale, sample, channel, real, channels, 0.0)
            w = load_channels(weight, sample, channel, real, 0, 0.0)
            c = load_channels(bias, sample, channel, real, 0, 0.0)
            save(dscale + at, w * total_da_n + c * total_da, once)
        if SHIFT:
            save(dshift + at, total_da, once)
        tl.store(small + at, factor * total_da_n, mask=once)
        tl.store(small + batch * channels + at, factor * total_da, mask=once)
        of_dx = rstd * (gain * total_da - pixels.to(tl.float32) * mean_dn - total_n * mean_dn_n) + total_dh
        tl.store(small + 2 * batch * channels + at, of_dx, mask=once)


def unsupported(*, x: Tensor, **_: Any) -> str | None:
    """Why these kernels cannot run, or None."""
    return reason_against(x)


def _arguments(
    x: Tensor, weight: Tensor, num_groups: int, channel_bias: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    residual: Tensor | None, x2: Tensor | None, dropout: float, sample: Tensor | None, layer: int, activation: bool,
) -> dict[str, Any]:  # fmt: skip
    """What forward and backward share, by the names of the kernels' arguments."""
    channels, pixels = weight.shape[0], x.shape[2] * x.shape[3]
    arguments: dict[str, Any] = dict(
        x=x, x2=x if x2 is None else x2, residual=x if residual is None else residual,
        channel_bias=x if channel_bias is None else channel_bias, channels=channels, channels1=x.shape[1],
        pixels=pixels, num_groups=num_groups, of_group=channels // num_groups,
        bias_stride=channels if channel_bias is not None and channel_bias.dim() == 2 else 0,
        X2=x2 is not None, RESIDUAL=residual is not None, BIAS=channel_bias is not None,
    )  # fmt: skip
    for name in ("x", "x2", "residual"):
        arguments[f"{name}_channel"], arguments[f"{name}_pixel"] = strides(arguments[name])
    return arguments


def _options(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, dropout: float, seed: int,
    seed_tensor: Tensor | None, sample: Tensor | None, step: int, step_tensor: Tensor | None, layer: int,
    activation: bool, rows: int,
) -> dict[str, Any]:  # fmt: skip
    """What the kernels that make the result take beside `_arguments`."""
    draw, given = draw_arguments(seed, seed_tensor, step, step_tensor, x)
    below = min(round(dropout * 2**32), 2**32 - 1)
    return dict(
        weight=weight, bias=bias, scale=x if scale is None else scale, shift=x if shift is None else shift,
        sample_index=x if sample is None else sample, **draw, drop_below=below - 2**32 if below >= 2**31 else below,
        keep_scale=1 / (1 - dropout), SCALE=scale is not None, SHIFT=shift is not None, DROP=dropout > 0,
        ACTIVATION=activation, STREAM=DROPOUT + layer, **given,
        FOURS=x.shape[2] * x.shape[3] % 4 == 0 and rows % 4 == 0,
    )  # fmt: skip


def _tiles(cut: Plan, of_group: int) -> dict[str, Any]:
    dense = cut.columns == of_group
    return dict(DENSE=dense, GROUPS=cut.groups, COLUMNS=cut.columns, ROWS=cut.pixels, num_warps=cut.warps)


@torch.library.triton_op("fastddpm::triton_group_norm_silu", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, channel_bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, x2: Tensor | None, dropout: float, seed: int,
    seed_tensor: Tensor | None, sample: Tensor | None, step: int, step_tensor: Tensor | None, layer: int,
    activation: bool,
) -> list[Tensor]:  # fmt: skip
    shared = _arguments(
        x, weight, num_groups, channel_bias, scale, shift, residual, x2, dropout, sample, layer, activation
    )
    batch, channels, pixels = x.shape[0], shared["channels"], shared["pixels"]
    cut = plan(batch, channels, pixels, num_groups, TILE, WIDTH)
    y = like_in_order(x, (batch, channels, *x.shape[2:]))
    h = like_in_order(y) if residual is not None else y
    # the mean is two numbers: one, and what its rounding took away
    mean = x.new_empty((batch, num_groups, 2), dtype=torch.float32)
    rstd = x.new_empty((batch, num_groups), dtype=torch.float32)
    grid = (batch * cut.chunks, triton.cdiv(num_groups, cut.groups))
    tiles = _tiles(cut, channels // num_groups)
    moments = mean
    if cut.chunks > 1:
        moments = x.new_empty((batch, cut.chunks, num_groups, 3), dtype=torch.float32)
        launch(moments_kernel, grid, moments=moments, chunks=cut.chunks, **shared, **tiles)
    options = _options(
        x, weight, bias, scale, shift, dropout, seed, seed_tensor, sample, step, step_tensor, layer, activation,
        cut.pixels,
    )  # fmt: skip
    y_channel, y_pixel = strides(y)
    launch(
        forward_kernel, grid, y=y, h_out=h, mean_out=mean, rstd_out=rstd, moments=moments, eps=eps, chunks=cut.chunks,
        y_channel=y_channel, y_pixel=y_pixel, ONE_READ=cut.chunks == 1, MERGE=16, **shared, **options, **tiles,
    )  # fmt: skip
    return [y, mean, rstd] if residual is None else [y, mean, rstd, h]


@torch.library.triton_op("fastddpm::triton_group_norm_silu_backward", mutates_args=())
def _backward(
    dy: Tensor | None, dh: Tensor | None, mean: Tensor, rstd: Tensor, x: Tensor, weight: Tensor, bias: Tensor,
    num_groups: int, channel_bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
    x2: Tensor | None, dropout: float, seed: int, seed_tensor: Tensor | None, sample: Tensor | None, step: int,
    step_tensor: Tensor | None, layer: int, activation: bool,
) -> list[Tensor]:  # fmt: skip
    shared = _arguments(
        x, weight, num_groups, channel_bias, scale, shift, residual, x2, dropout, sample, layer, activation
    )
    batch, channels, pixels = x.shape[0], shared["channels"], shared["pixels"]
    cut = plan(batch, channels, pixels, num_groups, BACKWARD_TILE, BACKWARD_WIDTH)
    dx = like_in_order(x)
    dx2 = dx if x2 is None else like_in_order(x2)
    dresidual = dx if residual is None else like_in_order(residual)
    dscale = dx if scale is None else torch.empty_like(scale)
    dshift = dx if shift is None else torch.empty_like(shift)
    small = x.new_empty((3, batch, channels), dtype=torch.float32)  # of weight, bias and channel bias, by sample
    sums = small
    if cut.chunks > 1:
        sums = x.new_empty((batch, cut.chunks, 4, channels), dtype=torch.float32)
    options = _options(
        x, weight, bias, scale, shift, dropout, seed, seed_tensor, sample, step, step_tensor, layer, activation,
        cut.pixels,
    )  # fmt: skip
    at = {}
    for name, gradient in (("dy", dy), ("dh", dh)):
        at[f"{name}_channel"], at[f"{name}_pixel"] = strides(x if gradient is None else gradient)
    for number in (0,) if cut.chunks == 1 else (1, 2):
        launch(
            backward_kernel, (batch * cut.chunks, triton.cdiv(num_groups, cut.groups)),
            dy=x if dy is None else dy, dh=x if dh is None else dh, mean_in=mean, rstd_in=rstd, sums=sums, dx=dx,
            dx2=dx2, dresidual=dresidual, small=small, dscale=dscale, dshift=dshift, batch=batch,
            chunks=cut.chunks, **at,
            DY=dy is not None, DH=dh is not None, PASS=number, MERGE=16, **shared, **options,
            **_tiles(cut, channels // num_groups),
        )  # fmt: skip
    gradients = [dx, small[0].sum(0).to(weight.dtype), small[1].sum(0).to(bias.dtype)]
    if channel_bias is not None:
        of_dx = small[2].clone() if channel_bias.dim() == 2 else small[2].sum(0)
        gradients.append(of_dx.to(channel_bias.dtype))
    gradients += [g for g, p in ((dscale, scale), (dshift, shift), (dresidual, residual), (dx2, x2)) if p is not None]
    return gradients


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
    channel_bias, scale, shift, sample = _contiguous(channel_bias, scale, shift, sample)
    y, mean, rstd, *h = _forward(
        x, weight.contiguous(), bias.contiguous(), num_groups, eps, channel_bias, scale, shift, residual, x2, dropout,
        *number_or_tensor(seed), sample, *number_or_tensor(step), layer, activation,
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
    parameters = _contiguous(channel_bias, scale, shift)
    dx, dweight, dbias, *others = _backward(
        None if dy is None else dense_gradient("group_norm_silu", x, dy),
        None if dh is None else dense_gradient("group_norm_silu", x, dh), *saved, x,
        weight.contiguous(), bias.contiguous(), num_groups, *parameters, residual, x2,
        dropout, *number_or_tensor(seed), *_contiguous(sample), *number_or_tensor(step), layer, activation,
    )  # fmt: skip
    given = [p is not None for p in (*parameters, residual, x2)]
    gradients = iter(others)
    return dx, dweight, dbias, *(next(gradients) if there else None for there in given)


def _contiguous(*parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(p if p is None else p.contiguous() for p in parameters)
