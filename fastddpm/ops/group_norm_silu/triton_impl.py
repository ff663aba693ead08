"""group_norm_silu in Triton.

A program owns a slab: whole groups of one sample, which are neighbouring channels, over all pixels or over a chunk of
them. A tile is [lanes, rows, columns]: pixel = lanes row + lane, and the columns are the channels of the slab, padded
to a power of two. There are four lanes where dropout draws, since one counter serves four pixels, and one otherwise.

- One read: all pixels of the slab are one tile, which stays in registers between the statistics and the result.
- Two reads, where that does not fit, or where a small batch would leave the GPU empty: a first kernel leaves the
  moments (in backward, the sums) of each chunk, a tiny one merges them, and the last makes the result.

Slabs of one sample are neighbours in the grid, so that programs that run together share lines of memory. Nothing is
added by atomics: sums over chunks and over the batch are taken in a fixed order.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..philox import DROPOUT
from ..triton_common import (
    as_float32,
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

TILE = 32768  # elements of a tile that stays in registers; half as many with a residual or dropout
BACKWARD_TILE = 16384  # x and dy stay there
CHUNK_TILE = 8192  # elements of a chunk
WARP, BACKWARD_WARP = 2048, 1024  # elements of a tile to a warp, as long as there are no more warps than these:
WARPS, BACKWARD_WARPS = 16, 8  # 65,536 registers are 128 for each of 512 threads, or 255 for each of 256
WIDTH = 64  # columns of a slab: runs of 128 bytes of bfloat16 from each pixel
BACKWARD_WIDTH = 32  # and in one read, where x and dy have to fit
WIDEST = 256  # columns of a slab of several groups, where fewer would be wasted or off a 16-byte boundary
SECTOR = 16  # channels of the shortest run worth one read, in NHWC: 32 bytes of bfloat16
VECTOR = 8  # channels of a 16-byte access of bfloat16: slabs begin at a multiple of it where they can
FULL = 128  # programs that fill a large GPU; with fewer, a slab of more than a tile of chunks is cut
MERGED = 4096  # numbers of chunks that a program merges at a time
NUMBERS = ["seed_low", "seed_high", "step", "eps", "drop_below", "keep_scale"]


class Plan(NamedTuple):
    """How a call is cut: groups and columns of a slab, pixels of a tile, chunks, warps."""

    groups: int
    columns: int
    pixels: int
    chunks: int
    warps: int


def plan(
    batch: int, channels: int, pixels: int, num_groups: int, tile: int, width: int, *, backward: bool = False,
    nhwc: bool = True,
) -> Plan:  # fmt: skip
    """One read where all pixels of a slab fit a tile and the slabs fill the GPU; otherwise chunks.

    A slab takes as many groups as waste the fewest columns, and about ``width`` columns. In NHWC its channels are a run
    of memory from each pixel: runs off a 16-byte boundary, or shorter than a sector, count double, and are never worth
    one read.
    """
    of_group = channels // num_groups
    rows = triton.next_power_of_2(max(pixels, 1))

    def columns(groups: int) -> int:
        return int(triton.next_power_of_2(groups * of_group))

    def runs(groups: int) -> bool:
        run = groups * of_group
        return not nhwc or run == channels or (run >= SECTOR and (run % VECTOR == 0 or channels % VECTOR != 0))

    def cost(groups: int, wanted: int) -> tuple[int, float]:
        total = triton.cdiv(num_groups, groups) * columns(groups)
        return total * (1 if runs(groups) else 2), abs(math.log2(columns(groups) / wanted))

    sizes = range(1, max(1, min(num_groups, WIDEST // of_group)) + 1)
    fit = [groups for groups in sizes if rows * columns(groups) <= tile and runs(groups)]
    if fit:
        groups = min(fit, key=lambda groups: cost(groups, width))
        size = rows * columns(groups)
        if batch * triton.cdiv(num_groups, groups) >= FULL or size <= CHUNK_TILE:
            warp, most = (BACKWARD_WARP, BACKWARD_WARPS) if backward else (WARP, WARPS)
            return Plan(groups, columns(groups), rows, 1, max(1, min(most, size // warp)))
    groups = min(sizes, key=lambda groups: cost(groups, WIDTH))
    slabs, per_tile = batch * triton.cdiv(num_groups, groups), max(1, CHUNK_TILE // columns(groups))
    while per_tile > 16 and slabs * triton.cdiv(pixels, per_tile) < FULL:
        per_tile //= 2
    return Plan(groups, columns(groups), per_tile, triton.cdiv(max(pixels, 1), per_tile), 8)


@triton.jit
def place(
    channels, pixels, slabs, chunks, EVEN: tl.constexpr, GROUPS: tl.constexpr, OF_GROUP: tl.constexpr,
    LANES: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Of this program: sample, chunk, pixel [LANES, ROWS / LANES, 1], channel [WIDE], and which of them are real.

    EVEN: 2, all are, so that no access is masked; 1, all pixels are, so that one mask of the channels does; 0, neither.
    """
    program = tl.program_id(0)
    column, part = tl.arange(0, WIDE), program // slabs
    sample, chunk = (part // chunks).to(tl.int64), part % chunks
    channel = program % slabs * (GROUPS * OF_GROUP) + column
    row, lane = tl.arange(0, ROWS // LANES), tl.arange(0, LANES)
    pixel = chunk * ROWS + row[None, :, None] * LANES + lane[:, None, None]
    if EVEN == 2:
        real = tl.full([WIDE], 1, tl.int1)
        inside = tl.full([LANES, ROWS // LANES, WIDE], 1, tl.int1)
    else:
        real = (column < GROUPS * OF_GROUP) & (channel < channels)
        if EVEN == 1:
            inside = tl.broadcast_to(real[None, None, :], [LANES, ROWS // LANES, WIDE])
        else:
            inside = (pixel < pixels) & real[None, None, :]
    return sample, chunk, pixel, channel, real, inside


@triton.jit
def of_channels(x):
    """The sum over the pixels of a tile, for each channel."""
    return tl.sum(tl.sum(x, axis=0), axis=0)


@triton.jit
def of_groups(x, real, GROUPS: tl.constexpr, OF_GROUP: tl.constexpr, WIDE: tl.constexpr):
    """The sum over the columns of each group, for each column."""
    if GROUPS == 1:
        return tl.zeros([WIDE], tl.float32) + tl.sum(tl.where(real, x, 0.0), axis=0)
    elif GROUPS * OF_GROUP == WIDE:
        sums = tl.sum(tl.reshape(x, [GROUPS, OF_GROUP]), axis=1)
        return tl.reshape(tl.broadcast_to(sums[:, None], [GROUPS, OF_GROUP]), [WIDE])
    else:  # groups that are no power of two: through a table of which column belongs to which group
        POWER: tl.constexpr = triton.next_power_of_2(GROUPS)
        group = tl.arange(0, WIDE)[:, None] // OF_GROUP == tl.arange(0, POWER)[None, :]
        sums = tl.sum(tl.where(group & real[:, None], x[:, None], 0.0), axis=0)
        return tl.sum(tl.where(group, sums[None, :], 0.0), axis=1)


@triton.jit
def within(pixel, channel, pixel_stride, channel_stride):
    """Where the elements of a tile lie in a sample.

    The lanes of a pixel row belong in one thread (see `kept`). Triton deals out a tile along the dimension of the
    longest runs first, then along the next; rows and lanes are equal in that, and 3.6 takes the lanes first where 3.9
    takes the rows. The hint decides it: of the dimensions that are not the first nothing else is made of it.
    """
    at = pixel * pixel_stride
    if pixel.shape[0] > 1:
        at = tl.max_contiguous(at, [1, 2, 1])
    return at + channel[None, None, :] * channel_stride


@triton.jit
def load_image(image, sample, pixel, channel, inside, elements, channel_stride, pixel_stride):
    at = within(pixel, channel, pixel_stride, channel_stride)
    return tl.load(image + sample * elements + at, mask=inside, other=0).to(tl.float32)


@triton.jit
def load_channels(p, sample, channel, real, stride):
    """Numbers of each channel, of each sample where stride is not 0."""
    return tl.load(p + sample * stride + channel, mask=real, other=0).to(tl.float32)


@triton.jit
def before_norm(
    x, x2, residual, channel_bias, sample, pixel, channel, inside, real, channels, channels1, pixels,
    x_channel, x_pixel, x2_channel, x2_pixel, residual_channel, residual_pixel, bias_stride,
    X2: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """h = [x, x2] + channel_bias + residual of a tile."""
    if X2:
        first = inside & (channel < channels1)[None, None, :]
        second = inside & (channel >= channels1)[None, None, :]
        h = load_image(x, sample, pixel, channel, first, channels1 * pixels, x_channel, x_pixel)
        elements2 = (channels - channels1) * pixels
        h += load_image(x2, sample, pixel, channel - channels1, second, elements2, x2_channel, x2_pixel)
    else:
        h = load_image(x, sample, pixel, channel, inside, channels * pixels, x_channel, x_pixel)
    if RESIDUAL:
        elements = channels * pixels
        h += load_image(residual, sample, pixel, channel, inside, elements, residual_channel, residual_pixel)
    if BIAS:
        h += load_channels(channel_bias, sample, channel, real, bias_stride)[None, None, :]
    return h


@triton.jit
def gain_offset(weight, bias, scale, shift, sample, channel, real, channels, SCALE: tl.constexpr, SHIFT: tl.constexpr):
    """(n weight + bias) (1 + scale) + shift = n gain + offset."""
    gain = load_channels(weight, sample, channel, real, 0)
    offset = load_channels(bias, sample, channel, real, 0)
    if SCALE:
        factor = 1.0 + load_channels(scale, sample, channel, real, channels)
        gain, offset = gain * factor, offset * factor
    if SHIFT:
        offset += load_channels(shift, sample, channel, real, channels)
    return gain, offset


@triton.jit
def kept(
    sample_index, seed_tensor, seed_low, seed_high, step_tensor, step, drop_below, sample, pixel, channel, pixels,
    first, STREAM: tl.constexpr, SEED: tl.constexpr, STEP: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Which elements dropout keeps: bit ``lane`` of [1, ROWS / LANES, WIDE].

    With four lanes the pixels of a channel are a multiple of four, as is ``first``, that of the tile: a thread has the
    four pixels of a counter, draws once for them, and keeps four bits in place of four words.
    """
    low, high, step_word = drawing(seed_tensor, seed_low, seed_high, step_tensor, step, SEED, STEP)
    number, bound = (tl.load(sample_index + sample) & 0xFFFFFFFF).to(tl.uint32), tl.cast(drop_below, tl.uint32)
    if LANES == 4:
        block = channel[None, None, :] * (pixels // 4) + first // 4 + tl.arange(0, ROWS // 4)[None, :, None]
        w0, w1, w2, w3 = philox_words(block.to(tl.uint32), number, step_word, STREAM, low, high)
        k0, k1 = tl.where(w0 >= bound, 1, 0), tl.where(w1 >= bound, 2, 0)
        k2, k3 = tl.where(w2 >= bound, 4, 0), tl.where(w3 >= bound, 8, 0)
        return k0 + k1 + k2 + k3
    else:
        element = channel[None, None, :] * pixels + pixel
        w0, w1, w2, w3 = philox_words((element // 4).to(tl.uint32), number, step_word, STREAM, low, high)
        lane = element % 4
        word = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
        return tl.where(word >= bound, 1, 0)


@triton.jit
def dropped(a, keep, keep_scale, LANES: tl.constexpr):
    """a / (1 - p) where an element is kept, else 0."""
    bit = tl.full([LANES, 1, 1], 1, tl.int32) << tl.arange(0, LANES)[:, None, None]
    return tl.where((keep & bit) != 0, a * keep_scale, 0.0)


@triton.jit
def moments(
    h, inside, real, count, EVEN: tl.constexpr, GROUPS: tl.constexpr, OF_GROUP: tl.constexpr, WIDE: tl.constexpr
):
    """Of each column's group in a tile: the mean, what its rounding took away, and the squares of the deviations.

    What columns that are not real sum up to enters no group: only pixels that are not need a mask, and it has a cost.
    """
    mean = of_groups(of_channels(h if EVEN else tl.where(inside, h, 0.0)), real, GROUPS, OF_GROUP, WIDE) / count
    d = h - mean[None, None, :]
    if EVEN == 0:
        d = tl.where(inside, d, 0.0)
    rest = of_groups(of_channels(d), real, GROUPS, OF_GROUP, WIDE) / count
    squares = of_groups(of_channels(d * d), real, GROUPS, OF_GROUP, WIDE) - count * rest * rest
    return mean, rest, squares


@triton.jit(do_not_specialize=NUMBERS)
def forward_kernel(
    x, x2, residual, channel_bias, weight, bias, scale, shift, y, h_out, mean, rstd, sample_index,
    seed_tensor, seed_low, seed_high, step_tensor, step, eps, drop_below, keep_scale, channels, channels1, pixels,
    num_groups, slabs, chunks, x_channel, x_pixel, x2_channel, x2_pixel, residual_channel, residual_pixel,
    y_channel, y_pixel, bias_stride,
    X2: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    DROP: tl.constexpr, ACTIVATION: tl.constexpr, ONE_READ: tl.constexpr, STREAM: tl.constexpr, SEED: tl.constexpr,
    STEP: tl.constexpr, EVEN: tl.constexpr, GROUPS: tl.constexpr, OF_GROUP: tl.constexpr, LANES: tl.constexpr,
    ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y = drop(silu((h - mean) rstd gain + offset)) of a slab, or of a chunk of its pixels (Wu and He 2018, eq. 1-2).

    With ONE_READ mean and rstd are made here, and otherwise read. Bytes an element in half precision: 2 read, 2 written
    (with chunks 4 read in all). What limits it is memory.
    """
    eps = as_float32(eps)
    keep_scale = as_float32(keep_scale)
    sample, chunk, pixel, channel, real, inside = place(
        channels, pixels, slabs, chunks, EVEN, GROUPS, OF_GROUP, LANES, ROWS, WIDE
    )
    h = before_norm(
        x, x2, residual, channel_bias, sample, pixel, channel, inside, real, channels, channels1, pixels, x_channel,
        x_pixel, x2_channel, x2_pixel, residual_channel, residual_pixel, bias_stride, X2, RESIDUAL, BIAS,
    )  # fmt: skip
    if DROP:  # while x is on its way
        keep = kept(
            sample_index, seed_tensor, seed_low, seed_high, step_tensor, step, drop_below, sample, pixel, channel,
            pixels, chunk * ROWS, STREAM, SEED, STEP, LANES, ROWS,
        )  # fmt: skip
    of_group = sample * num_groups + channel // OF_GROUP
    if ONE_READ:
        count = tl.cast(pixels * OF_GROUP, tl.float32)
        m, rest, squares = moments(h, inside, real, count, EVEN, GROUPS, OF_GROUP, WIDE)
        r = 1.0 / tl.sqrt_rn(squares / count + eps)
        first_of_group = real & (channel % OF_GROUP == 0)
        tl.store(mean + of_group * 2, m, mask=first_of_group)
        tl.store(mean + of_group * 2 + 1, rest, mask=first_of_group)
        tl.store(rstd + of_group, r, mask=first_of_group)
    else:
        m = tl.load(mean + of_group * 2, mask=real, other=0)
        rest = tl.load(mean + of_group * 2 + 1, mask=real, other=0)
        r = tl.load(rstd + of_group, mask=real, other=0)

    gain, offset = gain_offset(weight, bias, scale, shift, sample, channel, real, channels, SCALE, SHIFT)
    gain *= r
    a = (h - m[None, None, :]) * gain[None, None, :] + (offset - rest * gain)[None, None, :]
    if ACTIVATION:
        a = a / (1.0 + tl.exp(-a))
    if DROP:
        a = dropped(a, keep, keep_scale, LANES)
    at = sample * channels * pixels + within(pixel, channel, y_pixel, y_channel)
    save(y + at, a, inside)
    if RESIDUAL:
        save(h_out + at, h, inside)


@triton.jit
def moments_kernel(
    x, x2, residual, channel_bias, partial, channels, channels1, pixels, num_groups, slabs, chunks,
    x_channel, x_pixel, x2_channel, x2_pixel, residual_channel, residual_pixel, bias_stride,
    X2: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, GROUPS: tl.constexpr,
    OF_GROUP: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The `moments` of each group in a chunk, to partial [B, 3, num_groups, chunks]. Bytes an element in half: 2."""
    sample, chunk, pixel, channel, real, inside = place(
        channels, pixels, slabs, chunks, EVEN, GROUPS, OF_GROUP, LANES, ROWS, WIDE
    )
    h = before_norm(
        x, x2, residual, channel_bias, sample, pixel, channel, inside, real, channels, channels1, pixels, x_channel,
        x_pixel, x2_channel, x2_pixel, residual_channel, residual_pixel, bias_stride, X2, RESIDUAL, BIAS,
    )  # fmt: skip
    count = (tl.minimum(ROWS, pixels - chunk * ROWS) * OF_GROUP).to(tl.float32)
    mean, rest, squares = moments(h, inside, real, count, EVEN, GROUPS, OF_GROUP, WIDE)
    first_of_group = real & (channel % OF_GROUP == 0)
    of_all = num_groups * chunks
    at = partial + sample * 3 * of_all + channel // OF_GROUP * chunks + chunk
    tl.store(at, mean, mask=first_of_group)
    tl.store(at + of_all, rest, mask=first_of_group)
    tl.store(at + 2 * of_all, squares, mask=first_of_group)


@triton.jit(do_not_specialize=["eps"])
def merge_moments_kernel(
    partial, mean_out, rstd_out, eps, pixels, num_groups, chunks, OF_GROUP: tl.constexpr, ROWS: tl.constexpr,
    MERGE: tl.constexpr,
):  # fmt: skip
    """Mean, what its rounding took away, and 1 / std of a group of a sample from its chunks (Chan et al. 1983).

    A program each. It reads 12 bytes a chunk of thousands of elements; what limits it is the time of a launch.
    """
    eps = as_float32(eps)
    sample, group = tl.program_id(0).to(tl.int64) // num_groups, tl.program_id(0) % num_groups
    of_all, n = num_groups * chunks, tl.cast(pixels, tl.float32)
    at = partial + sample * 3 * of_all + group * chunks
    total = tl.zeros([MERGE], tl.float32)
    for begin in range(0, chunks, MERGE):
        k = begin + tl.arange(0, MERGE)
        size = tl.minimum(ROWS, pixels - k * ROWS).to(tl.float32)
        total += tl.where(k < chunks, tl.load(at + k, mask=k < chunks, other=0) * size, 0.0)
    mean = tl.sum(total, axis=0) / n
    squares, rest = tl.zeros([MERGE], tl.float32), tl.zeros([MERGE], tl.float32)
    for begin in range(0, chunks, MERGE):
        k = begin + tl.arange(0, MERGE)
        there = k < chunks
        size = tl.minimum(ROWS, pixels - k * ROWS).to(tl.float32)
        m, r = tl.load(at + k, mask=there, other=0), tl.load(at + of_all + k, mask=there, other=0)
        d = (m - mean) + r
        rest += tl.where(there, d * size, 0.0)
        squares += tl.where(there, tl.load(at + 2 * of_all + k, mask=there, other=0) + d * d * (size * OF_GROUP), 0.0)
    off = tl.sum(rest, axis=0) / n
    variance = tl.sum(squares, axis=0) / (n * OF_GROUP) - off * off
    tl.store(mean_out + tl.program_id(0) * 2, mean)
    tl.store(mean_out + tl.program_id(0) * 2 + 1, off)
    tl.store(rstd_out + tl.program_id(0), 1.0 / tl.sqrt_rn(variance + eps))


@triton.jit
def of_parameters(
    da, da_n, n, dh, mean_dn, mean_dn_n, gain, rstd, weight, bias, scale, small, dscale, dshift, sample, channel, real,
    batch, channels, pixels, SCALE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """What the parameters need, from the sums over all pixels of each channel of a sample: no further pass.

    ``small`` [3, B, C] takes the share of a sample in dgamma and dbeta, and the sum of dx, which is the gradient of the
    channel bias: sum(dx) = rstd (gain sum(da) - pixels mean(dn) - sum(n) mean(dn n)) + sum(dh).
    """
    factor, at, size = 1.0, sample * channels + channel, tl.cast(batch, tl.int64) * channels
    if SCALE:
        factor = 1.0 + load_channels(scale, sample, channel, real, channels)
        w, b = load_channels(weight, sample, channel, real, 0), load_channels(bias, sample, channel, real, 0)
        save(dscale + at, w * da_n + b * da, real)
    if SHIFT:
        save(dshift + at, da, real)
    tl.store(small + at, factor * da_n, mask=real)
    tl.store(small + size + at, factor * da, mask=real)
    of_dx = rstd * (gain * da - tl.cast(pixels, tl.float32) * mean_dn - n * mean_dn_n) + dh
    tl.store(small + 2 * size + at, of_dx, mask=real)


@triton.jit(do_not_specialize=NUMBERS)
def backward_kernel(
    dy, dh, x, x2, residual, channel_bias, weight, bias, scale, shift, mean_in, rstd_in, sums, means, dx, dx2,
    dresidual, small, dscale, dshift, sample_index, seed_tensor, seed_low, seed_high, step_tensor, step, drop_below,
    keep_scale, batch, channels, channels1, pixels, num_groups, slabs, chunks, x_channel, x_pixel, x2_channel,
    x2_pixel, residual_channel, residual_pixel, dy_channel, dy_pixel, dh_channel, dh_pixel, bias_stride,
    X2: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    DROP: tl.constexpr, ACTIVATION: tl.constexpr, DY: tl.constexpr, DH: tl.constexpr, PASS: tl.constexpr,
    STREAM: tl.constexpr, SEED: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr, GROUPS: tl.constexpr,
    OF_GROUP: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dx = rstd (dn - mean(dn) - n mean(dn n)) + dh, dn = da gain, da = dy through dropout and the activation.

    PASS 0 does all in one read; 1 leaves sums [B, chunks, 4, C], of da, da n, n and dh; 2 reads what
    `merge_sums_kernel` made of them, means [B, num_groups, 2], and makes dx. Bytes an element in half precision: 4
    read, 2 written (8 and 2 in two passes). Memory limits it.
    """
    keep_scale = as_float32(keep_scale)
    sample, chunk, pixel, channel, real, inside = place(
        channels, pixels, slabs, chunks, EVEN, GROUPS, OF_GROUP, LANES, ROWS, WIDE
    )
    elements = channels * pixels
    h = before_norm(
        x, x2, residual, channel_bias, sample, pixel, channel, inside, real, channels, channels1, pixels, x_channel,
        x_pixel, x2_channel, x2_pixel, residual_channel, residual_pixel, bias_stride, X2, RESIDUAL, BIAS,
    )  # fmt: skip
    of_group = sample * num_groups + channel // OF_GROUP
    mean = tl.load(mean_in + of_group * 2, mask=real, other=0)
    rest = tl.load(mean_in + of_group * 2 + 1, mask=real, other=0)
    rstd = tl.load(rstd_in + of_group, mask=real, other=0)
    gain, offset = gain_offset(weight, bias, scale, shift, sample, channel, real, channels, SCALE, SHIFT)
    n = tl.where(inside, ((h - mean[None, None, :]) - rest[None, None, :]) * rstd[None, None, :], 0.0)
    if DY:
        da = load_image(dy, sample, pixel, channel, inside, elements, dy_channel, dy_pixel)
        if DROP:
            keep = kept(
                sample_index, seed_tensor, seed_low, seed_high, step_tensor, step, drop_below, sample, pixel, channel,
                pixels, chunk * ROWS, STREAM, SEED, STEP, LANES, ROWS,
            )  # fmt: skip
            da = dropped(da, keep, keep_scale, LANES)
        if ACTIVATION:
            a = n * gain[None, None, :] + offset[None, None, :]
            s = 1.0 / (1.0 + tl.exp(-a))
            da *= s * (1.0 + a * (1.0 - s))
    else:
        da = n * 0.0

    if PASS != 2:
        total_da, total_da_n, total_n = of_channels(da), of_channels(da * n), of_channels(n)
        total_dh = total_n * 0.0
    if PASS == 1:
        if DH:
            total_dh = of_channels(load_image(dh, sample, pixel, channel, inside, elements, dh_channel, dh_pixel))
        at = sums + (sample * chunks + chunk) * 4 * channels + channel
        tl.store(at, total_da, mask=real)
        tl.store(at + channels, total_da_n, mask=real)
        tl.store(at + 2 * channels, total_n, mask=real)
        tl.store(at + 3 * channels, total_dh, mask=real)
    else:
        if PASS == 2:
            mean_dn = tl.load(means + of_group * 2, mask=real, other=0)
            mean_dn_n = tl.load(means + of_group * 2 + 1, mask=real, other=0)
        else:
            count = tl.cast(pixels * OF_GROUP, tl.float32)
            mean_dn = of_groups(gain * total_da, real, GROUPS, OF_GROUP, WIDE) / count
            mean_dn_n = of_groups(gain * total_da_n, real, GROUPS, OF_GROUP, WIDE) / count
        d = rstd[None, None, :] * (da * gain[None, None, :] - mean_dn[None, None, :] - n * mean_dn_n[None, None, :])
        if DH:
            of_sum = load_image(dh, sample, pixel, channel, inside, elements, dh_channel, dh_pixel)
            d += of_sum
            if PASS == 0:
                total_dh = of_channels(of_sum)
        if X2:
            at = sample * channels1 * pixels + within(pixel, channel, x_pixel, x_channel)
            save(dx + at, d, inside & (channel < channels1)[None, None, :])
            at = sample * (channels - channels1) * pixels + within(pixel, channel - channels1, x2_pixel, x2_channel)
            save(dx2 + at, d, inside & (channel >= channels1)[None, None, :])
        else:
            save(dx + sample * elements + within(pixel, channel, x_pixel, x_channel), d, inside)
        if RESIDUAL:
            at = sample * elements + within(pixel, channel, residual_pixel, residual_channel)
            save(dresidual + at, d, inside)
        if PASS == 0:
            of_parameters(
                total_da, total_da_n, total_n, total_dh, mean_dn, mean_dn_n, gain, rstd, weight, bias, scale, small,
                dscale, dshift, sample, channel, real, batch, channels, pixels, SCALE, SHIFT,
            )  # fmt: skip


@triton.jit
def merge_sums_kernel(
    sums, rstd_in, weight, bias, scale, shift, means, small, dscale, dshift, batch, channels, pixels, num_groups,
    chunks, SCALE: tl.constexpr, SHIFT: tl.constexpr, OF_GROUP: tl.constexpr, COLUMNS: tl.constexpr,
    MERGE: tl.constexpr,
):  # fmt: skip
    """mean(dn) and mean(dn n) of a group of a sample, and what its parameters need, from the sums of the chunks.

    A program each. It reads 16 bytes a channel of a chunk; what limits it is the time of a launch.
    """
    sample, group = tl.program_id(0).to(tl.int64) // num_groups, tl.program_id(0) % num_groups
    column = tl.arange(0, COLUMNS)
    channel, real = group * OF_GROUP + column, column < OF_GROUP
    at = sums + sample * chunks * 4 * channels + channel[None, :]
    da, da_n = tl.zeros([MERGE, COLUMNS], tl.float32), tl.zeros([MERGE, COLUMNS], tl.float32)
    n, dh = tl.zeros([MERGE, COLUMNS], tl.float32), tl.zeros([MERGE, COLUMNS], tl.float32)
    for begin in range(0, chunks, MERGE):
        k = begin + tl.arange(0, MERGE)
        there = (k < chunks)[:, None] & real[None, :]
        of_chunk = at + k[:, None].to(tl.int64) * 4 * channels
        da += tl.load(of_chunk, mask=there, other=0)
        da_n += tl.load(of_chunk + channels, mask=there, other=0)
        n += tl.load(of_chunk + 2 * channels, mask=there, other=0)
        dh += tl.load(of_chunk + 3 * channels, mask=there, other=0)
    total_da, total_da_n = tl.sum(da, axis=0), tl.sum(da_n, axis=0)
    gain, _ = gain_offset(weight, bias, scale, shift, sample, channel, real, channels, SCALE, False)
    count = tl.cast(pixels * OF_GROUP, tl.float32)
    mean_dn = tl.sum(gain * total_da, axis=0) / count
    mean_dn_n = tl.sum(gain * total_da_n, axis=0) / count
    tl.store(means + tl.program_id(0) * 2, mean_dn)
    tl.store(means + tl.program_id(0) * 2 + 1, mean_dn_n)
    of_parameters(
        total_da, total_da_n, tl.sum(n, axis=0), tl.sum(dh, axis=0), mean_dn, mean_dn_n, gain,
        tl.load(rstd_in + tl.program_id(0)), weight, bias, scale, small, dscale, dshift, sample, channel, real, batch,
        channels, pixels, SCALE, SHIFT,
    )  # fmt: skip


def unsupported(*, x: Tensor, **_: Any) -> str | None:
    """Why these kernels cannot run, or None."""
    return reason_against(x)


def _arguments(
    x: Tensor, weight: Tensor, num_groups: int, channel_bias: Tensor | None, residual: Tensor | None, x2: Tensor | None,
    cut: Plan, dropout: float,
) -> dict[str, Any]:  # fmt: skip
    """What every kernel over the image takes, by the names of its arguments."""
    channels, pixels = weight.shape[0], x.shape[2] * x.shape[3]
    of_slab = cut.groups * (channels // num_groups)
    fours = dropout > 0 and pixels % 4 == 0 and cut.pixels % 4 == 0
    arguments: dict[str, Any] = dict(
        x=x, x2=x if x2 is None else x2, residual=x if residual is None else residual,
        channel_bias=x if channel_bias is None else channel_bias, channels=channels, channels1=x.shape[1],
        pixels=pixels, num_groups=num_groups, slabs=triton.cdiv(num_groups, cut.groups), chunks=cut.chunks,
        bias_stride=channels if channel_bias is not None and channel_bias.dim() == 2 else 0,
        X2=x2 is not None, RESIDUAL=residual is not None, BIAS=channel_bias is not None,
        EVEN=0 if pixels % cut.pixels else 2 if of_slab == cut.columns and channels % of_slab == 0 else 1,
        GROUPS=cut.groups,
        OF_GROUP=channels // num_groups, LANES=4 if fours else 1, ROWS=cut.pixels, WIDE=cut.columns,
        num_warps=cut.warps,
    )  # fmt: skip
    for name in ("x", "x2", "residual"):
        arguments[f"{name}_channel"], arguments[f"{name}_pixel"] = strides(arguments[name])
    return arguments


def _options(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, dropout: float, seed: int,
    seed_tensor: Tensor | None, sample: Tensor | None, step: int, step_tensor: Tensor | None, layer: int,
    activation: bool,
) -> dict[str, Any]:  # fmt: skip
    """What the kernels that make the result take beside `_arguments`."""
    draw, given = draw_arguments(seed, seed_tensor, step, step_tensor, x)
    below = min(round(dropout * 2**32), 2**32 - 1)
    return dict(
        weight=weight, bias=bias, scale=x if scale is None else scale, shift=x if shift is None else shift,
        sample_index=x if sample is None else sample, **draw, drop_below=below - 2**32 if below >= 2**31 else below,
        keep_scale=1 / (1 - dropout), SCALE=scale is not None, SHIFT=shift is not None, DROP=dropout > 0,
        ACTIVATION=activation, STREAM=DROPOUT + layer, **given,
    )  # fmt: skip


@torch.library.triton_op("fastddpm::triton_group_norm_silu", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, channel_bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, x2: Tensor | None, dropout: float, seed: int,
    seed_tensor: Tensor | None, sample: Tensor | None, step: int, step_tensor: Tensor | None, layer: int,
    activation: bool,
) -> list[Tensor]:  # fmt: skip
    batch, channels, pixels = x.shape[0], weight.shape[0], x.shape[2] * x.shape[3]
    y = like_in_order(x, (batch, channels, *x.shape[2:]))
    y_channel, y_pixel = strides(y)
    tile = TILE if residual is None and dropout == 0 else TILE // 2
    cut = plan(batch, channels, pixels, num_groups, tile, WIDTH, nhwc=y_channel == 1)
    shared = _arguments(x, weight, num_groups, channel_bias, residual, x2, cut, dropout)
    options = _options(
        x, weight, bias, scale, shift, dropout, seed, seed_tensor, sample, step, step_tensor, layer, activation
    )
    h = like_in_order(y) if residual is not None else y
    # the mean is two numbers: one, and what its rounding took away
    mean = x.new_empty((batch, num_groups, 2), dtype=torch.float32)
    rstd = x.new_empty((batch, num_groups), dtype=torch.float32)
    grid = (batch * cut.chunks * shared["slabs"],)
    if cut.chunks > 1:
        partial = x.new_empty((batch, 3, num_groups, cut.chunks), dtype=torch.float32)
        launch(moments_kernel, grid, partial=partial, **shared)
        launch(
            merge_moments_kernel, (batch * num_groups,), partial=partial, mean_out=mean, rstd_out=rstd, eps=eps,
            pixels=pixels, num_groups=num_groups, chunks=cut.chunks, OF_GROUP=shared["OF_GROUP"], ROWS=cut.pixels,
            MERGE=min(MERGED, triton.next_power_of_2(cut.chunks)), num_warps=4,
        )  # fmt: skip
    launch(
        forward_kernel, grid, y=y, h_out=h, mean=mean, rstd=rstd, eps=eps, y_channel=y_channel, y_pixel=y_pixel,
        ONE_READ=cut.chunks == 1, **shared, **options,
    )  # fmt: skip
    return [y, mean, rstd] if residual is None else [y, mean, rstd, h]


@torch.library.triton_op("fastddpm::triton_group_norm_silu_backward", mutates_args=())
def _backward(
    dy: Tensor | None, dh: Tensor | None, mean: Tensor, rstd: Tensor, x: Tensor, weight: Tensor, bias: Tensor,
    num_groups: int, channel_bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
    x2: Tensor | None, dropout: float, seed: int, seed_tensor: Tensor | None, sample: Tensor | None, step: int,
    step_tensor: Tensor | None, layer: int, activation: bool,
) -> list[Tensor]:  # fmt: skip
    batch, channels, pixels = x.shape[0], weight.shape[0], x.shape[2] * x.shape[3]
    dx = like_in_order(x)
    nhwc = strides(x)[0] == 1
    cut = plan(batch, channels, pixels, num_groups, BACKWARD_TILE, BACKWARD_WIDTH, backward=True, nhwc=nhwc)
    shared = _arguments(x, weight, num_groups, channel_bias, residual, x2, cut, dropout)
    options = _options(
        x, weight, bias, scale, shift, dropout, seed, seed_tensor, sample, step, step_tensor, layer, activation
    )
    dx2 = dx if x2 is None else like_in_order(x2)
    dresidual = dx if residual is None else like_in_order(residual)
    dscale = dx if scale is None else torch.empty_like(scale)
    dshift = dx if shift is None else torch.empty_like(shift)
    small = x.new_empty((3, batch, channels), dtype=torch.float32)  # of weight, bias and channel bias, by sample
    sums = means = small
    if cut.chunks > 1:
        sums = x.new_empty((batch, cut.chunks, 4, channels), dtype=torch.float32)
        means = x.new_empty((batch, num_groups, 2), dtype=torch.float32)
    at = {}
    for name, gradient in (("dy", dy), ("dh", dh)):
        at[f"{name}_channel"], at[f"{name}_pixel"] = strides(x if gradient is None else gradient)

    def image_pass(number: int) -> None:
        launch(
            backward_kernel, (batch * cut.chunks * shared["slabs"],), dy=x if dy is None else dy,
            dh=x if dh is None else dh, mean_in=mean, rstd_in=rstd, sums=sums, means=means, dx=dx, dx2=dx2,
            dresidual=dresidual, small=small, dscale=dscale, dshift=dshift, batch=batch, **at, DY=dy is not None,
            DH=dh is not None, PASS=number, **shared, **options,
        )  # fmt: skip

    if cut.chunks == 1:
        image_pass(0)
    else:
        image_pass(1)
        columns = triton.next_power_of_2(shared["OF_GROUP"])
        launch(
            merge_sums_kernel, (batch * num_groups,), sums=sums, rstd_in=rstd, means=means, small=small, dscale=dscale,
            dshift=dshift, batch=batch, channels=channels, pixels=pixels, num_groups=num_groups, chunks=cut.chunks,
            OF_GROUP=shared["OF_GROUP"], COLUMNS=columns,
            MERGE=max(1, min(MERGED // columns, triton.next_power_of_2(cut.chunks))), num_warps=4,
            **{name: options[name] for name in ("weight", "bias", "scale", "shift", "SCALE", "SHIFT")},
        )  # fmt: skip
        image_pass(2)
    of_weight, of_bias, of_dx = small.unbind()
    gradients = [dx, of_weight.sum(0).to(weight.dtype), of_bias.sum(0).to(bias.dtype)]
    if channel_bias is not None:
        of_dx = of_dx.clone() if channel_bias.dim() == 2 else of_dx.sum(0)
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
        dy, dh, *saved, x,
        weight.contiguous(), bias.contiguous(), num_groups, *parameters, residual, x2,
        dropout, *number_or_tensor(seed), *_contiguous(sample), *number_or_tensor(step), layer, activation,
    )  # fmt: skip
    given = [p is not None for p in (*parameters, residual, x2)]
    gradients = iter(others)
    return dx, dweight, dbias, *(next(gradients) if there else None for there in given)


def _contiguous(*parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(p if p is None else p.contiguous() for p in parameters)
