"""solver_step in Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._checks import is_nhwc
from ..philox import SAMPLER_NOISE, TRAINING_NOISE
from ..triton_common import (
    INTERPRETED,
    as_float32,
    draw_arguments,
    drawing,
    float_or_tensor,
    launch,
    like_in_order,
    normals,
    number_or_tensor,
    offsets,
    order,
    places,
    reason_against,
    save,
    strides,
    tiling,
)

NUMBERS = ["seed_low", "seed_high", "step", "guidance_number", "clamp_number"]


@triton.jit
def lerp(start, end, weight):
    """start + weight (end - start), exact at both ends."""
    return tl.where(weight < 0.5, start + weight * (end - start), end - (end - start) * (1.0 - weight))


@triton.jit(do_not_specialize=NUMBERS)
def solver_step_kernel(
    x, out, x_next, pred_out, table, pred_prev, uncond, guidance, guidance_number, clamp, clamp_number, noise, mask,
    known, known_table, known_noise, sample, seed_tensor, seed_low, seed_high, step_tensor, step,
    channels, pixels, blocks, mask_sample, mask_channel, mask_pixel,
    x_channel, x_pixel, out_channel, out_pixel, uncond_channel, uncond_pixel, prev_channel, prev_pixel,
    noise_channel, noise_pixel, known_channel, known_pixel, eps_channel, eps_pixel, pred_channel, pred_pixel,
    LEARNED: tl.constexpr, PREV: tl.constexpr, UNCOND: tl.constexpr, GUIDANCE: tl.constexpr, CLAMP: tl.constexpr,
    NOISE: tl.constexpr, MASK: tl.constexpr, KNOWN_NOISE: tl.constexpr, X_ORDER: tl.constexpr,
    OUT_ORDER: tl.constexpr, UNCOND_ORDER: tl.constexpr, PREV_ORDER: tl.constexpr, NOISE_ORDER: tl.constexpr,
    KNOWN_ORDER: tl.constexpr, EPS_ORDER: tl.constexpr, PRED_ORDER: tl.constexpr, STREAM: tl.constexpr,
    KNOWN_STREAM: tl.constexpr, SEED: tl.constexpr, STEP: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    APPROX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """pred = clamp(k0 x + k1 o), x' = k2 pred + k3 x + k4 pred_prev + k5 z + k6 o, and the blend with what is known.

    A program takes BLOCK elements of one sample, in C, H, W order or, where x is NHWC, a tile of pixels by channels:
    four from each counter of the noise. The row of the table is read by the step on the device. Bytes an element,
    float32: 8 read, 8 written. What limits it is memory.
    """
    guidance_number = as_float32(guidance_number)
    clamp_number = as_float32(clamp_number)
    b, part = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    counter, element, channel, pixel, inside = places(part, channels, pixels, LANES, VECTOR, BLOCK)
    elements = channels * pixels
    base = b.to(tl.int64) * elements
    row = tl.load(step_tensor) if STEP else tl.cast(step, tl.int64)
    k = table + row * 9
    k0, k1, k2 = tl.load(k).to(tl.float32), tl.load(k + 1).to(tl.float32), tl.load(k + 2).to(tl.float32)
    k3, k4, k5 = tl.load(k + 3).to(tl.float32), tl.load(k + 4).to(tl.float32), tl.load(k + 5).to(tl.float32)
    k6, least, most = tl.load(k + 6).to(tl.float32), tl.load(k + 7).to(tl.float32), tl.load(k + 8).to(tl.float32)

    at_x = base + offsets(element, channel, pixel, x_channel, x_pixel, X_ORDER)
    of_out = base * 2 if LEARNED else base
    at_out = of_out + offsets(element, channel, pixel, out_channel, out_pixel, OUT_ORDER)
    state = tl.load(x + at_x, mask=inside, other=0).to(tl.float32)
    o = tl.load(out + at_out, mask=inside, other=0).to(tl.float32)
    if UNCOND:
        weight = tl.load(guidance).to(tl.float32) if GUIDANCE else guidance_number
        at = of_out + offsets(element, channel, pixel, uncond_channel, uncond_pixel, UNCOND_ORDER)
        o = lerp(tl.load(uncond + at, mask=inside, other=0).to(tl.float32), o, weight)
    pred = k0 * state + k1 * o
    if CLAMP:
        bound = tl.load(clamp + b).to(tl.float32) if CLAMP == 2 else clamp_number
        pred = tl.where(pred < -bound, -bound, pred)
        pred = tl.where(pred > bound, bound, pred)
    y = k2 * pred + k3 * state + k6 * o
    if PREV:
        at = base + offsets(element, channel, pixel, prev_channel, prev_pixel, PREV_ORDER)
        y += k4 * tl.load(pred_prev + at, mask=inside, other=0).to(tl.float32)

    if NOISE == 2 or KNOWN_NOISE == 2:
        low, high, step_word = drawing(seed_tensor, seed_low, seed_high, step_tensor, step, SEED, STEP)
        number = (tl.load(sample + b) & 0xFFFFFFFF).to(tl.uint32)
    if NOISE:
        if NOISE == 2:
            z = normals(counter, number, step_word, STREAM, low, high, LANES, VECTOR, APPROX)
        else:
            at = base + offsets(element, channel, pixel, noise_channel, noise_pixel, NOISE_ORDER)
            z = tl.load(noise + at, mask=inside, other=0).to(tl.float32)
        if LEARNED:
            # the second half of out lies C channels on
            v = tl.load(out + at_out + channels * out_channel, mask=inside, other=0).to(tl.float32)
            f = (v + 1.0) * 0.5
            y += tl.where(k5 != 0, tl.exp(0.5 * (f * most + (1.0 - f) * least)), k5) * z
        else:
            y += k5 * z
    if MASK:
        signal = tl.load(known_table + 2 * row).to(tl.float32)
        sigma = tl.load(known_table + 2 * row + 1).to(tl.float32)
        at = base + offsets(element, channel, pixel, known_channel, known_pixel, KNOWN_ORDER)
        x_known = signal * tl.load(known + at, mask=inside, other=0).to(tl.float32)
        if KNOWN_NOISE == 2:
            z = normals(counter, number, step_word, KNOWN_STREAM, low, high, LANES, VECTOR, APPROX)
            x_known += sigma * z
        else:
            at = base + offsets(element, channel, pixel, eps_channel, eps_pixel, EPS_ORDER)
            x_known += sigma * tl.load(known_noise + at, mask=inside, other=0).to(tl.float32)
        at = b.to(tl.int64) * mask_sample + offsets(element, channel, pixel, mask_channel, mask_pixel, 0)
        y = lerp(y, x_known, tl.load(mask + at, mask=inside, other=0).to(tl.float32))

    save(x_next + at_x, y, inside)
    save(pred_out + base + offsets(element, channel, pixel, pred_channel, pred_pixel, PRED_ORDER), pred, inside)


def unsupported(*, x: Tensor, **_: Any) -> str | None:
    """Why this kernel cannot run, or None."""
    return reason_against(x)


def _run(
    x: Tensor, out: Tensor, table: Tensor, step: int, step_tensor: Tensor | None, pred_prev: Tensor | None,
    out_uncond: Tensor | None, guidance_scale: float | None, guidance: Tensor | None, clamp_bound: float | None,
    clamp: Tensor | None, noise: Tensor | None, seed: int, seed_tensor: Tensor | None, sample: Tensor | None,
    mask: Tensor | None, known: Tensor | None, known_table: Tensor | None, known_noise: Tensor | None,
    x_next: Tensor, pred: Tensor,
) -> None:  # fmt: skip
    """Launch the kernel; x_next may be x, and pred may be pred_prev."""
    batch, channels, height, width = x.shape
    pixels = height * width
    blocks, tile = tiling(x_next, channels)
    draw, given = draw_arguments(seed, seed_tensor, step, step_tensor, x)
    learned = out.shape[1] == 2 * channels
    images = dict(x=x, out=out, uncond=out_uncond, prev=pred_prev, noise=noise, known=known, eps=known_noise, pred=pred)
    at, orders = {}, {}
    for name, image in images.items():
        at[f"{name}_channel"], at[f"{name}_pixel"] = strides(x if image is None else image)
        orders[f"{name.upper()}_ORDER"] = order(image, tile["LANES"], channels)
    mask_sample, mask_channel, mask_pixel = 0, 0, 1
    if mask is not None:
        mask_channel, mask_pixel = strides(mask)
        mask_sample = 0 if mask.shape[0] == 1 else mask.shape[1] * pixels
        mask_channel = 0 if mask.shape[1] == 1 else mask_channel

    launch(
        solver_step_kernel, (batch * blocks,),
        x=x, out=out, x_next=x_next, pred_out=pred, table=table, pred_prev=x if pred_prev is None else pred_prev,
        uncond=x if out_uncond is None else out_uncond, guidance=x if guidance is None else guidance,
        guidance_number=1.0 if guidance_scale is None else guidance_scale, clamp=x if clamp is None else clamp,
        clamp_number=1.0 if clamp_bound is None else clamp_bound, noise=x if noise is None else noise,
        mask=x if mask is None else mask, known=x if known is None else known,
        known_table=table if known_table is None else known_table,
        known_noise=x if known_noise is None else known_noise,
        sample=x if sample is None else sample, **draw, channels=channels, pixels=pixels, blocks=blocks,
        mask_sample=mask_sample, mask_channel=mask_channel, mask_pixel=mask_pixel, **at,
        LEARNED=learned, PREV=pred_prev is not None, UNCOND=out_uncond is not None, GUIDANCE=guidance is not None,
        CLAMP=2 if clamp is not None else 1 if clamp_bound is not None else 0,
        NOISE=1 if noise is not None else 2 if sample is not None else 0, MASK=mask is not None,
        KNOWN_NOISE=0 if mask is None else 1 if known_noise is not None else 2,
        STREAM=SAMPLER_NOISE, KNOWN_STREAM=TRAINING_NOISE, **orders, **given, **tile, APPROX=not INTERPRETED,
    )  # fmt: skip


@torch.library.triton_op("fastddpm::triton_solver_step", mutates_args=())
def _solver_step(
    x: Tensor, out: Tensor, table: Tensor, step: int, step_tensor: Tensor | None, pred_prev: Tensor | None,
    out_uncond: Tensor | None, guidance_scale: float | None, guidance: Tensor | None, clamp_bound: float | None,
    clamp: Tensor | None, noise: Tensor | None, seed: int, seed_tensor: Tensor | None, sample: Tensor | None,
    mask: Tensor | None, known: Tensor | None, known_table: Tensor | None, known_noise: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    x_next, pred = like_in_order(x), like_in_order(x)
    _run(
        x, out, table, step, step_tensor, pred_prev, out_uncond, guidance_scale, guidance, clamp_bound, clamp, noise,
        seed, seed_tensor, sample, mask, known, known_table, known_noise, x_next, pred,
    )  # fmt: skip
    return [x_next, pred]


@torch.library.triton_op("fastddpm::triton_solver_step_", mutates_args=("x", "pred"))
def _solver_step_(
    x: Tensor, pred: Tensor, has_prev: bool, out: Tensor, table: Tensor, step: int, step_tensor: Tensor | None,
    out_uncond: Tensor | None, guidance_scale: float | None, guidance: Tensor | None, clamp_bound: float | None,
    clamp: Tensor | None, noise: Tensor | None, seed: int, seed_tensor: Tensor | None, sample: Tensor | None,
    mask: Tensor | None, known: Tensor | None, known_table: Tensor | None, known_noise: Tensor | None,
) -> None:  # fmt: skip
    _run(
        x, out, table, step, step_tensor, pred if has_prev else None, out_uncond, guidance_scale, guidance, clamp_bound,
        clamp, noise, seed, seed_tensor, sample, mask, known, known_table, known_noise, x, pred,
    )  # fmt: skip


def forward(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    step: Tensor | int,
    *,
    pred_prev: Tensor | None,
    out_uncond: Tensor | None,
    guidance_scale: Tensor | float,
    clamp: Tensor | float | None,
    noise: Tensor | None,
    seed: Tensor | int | None,
    sample: Tensor | None,
    mask: Tensor | None,
    known: Tensor | None,
    known_table: Tensor | None,
    known_noise: Tensor | None,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """See the interface."""
    known_table, sample = (p if p is None else p.contiguous() for p in (known_table, sample))
    clamp = clamp.contiguous() if isinstance(clamp, Tensor) else clamp
    if mask is not None and not is_nhwc(mask):
        mask = mask.contiguous()
    where = (table.contiguous(), *number_or_tensor(step))
    options = (
        out_uncond, *float_or_tensor(guidance_scale), *float_or_tensor(clamp), noise, *number_or_tensor(seed),
        None if seed is None else sample, mask, known, known_table, known_noise,
    )  # fmt: skip
    if inplace:
        pred = like_in_order(x) if pred_prev is None else pred_prev
        _solver_step_(x, pred, pred_prev is not None, out, *where, *options)
        return x, pred
    x_next, pred = _solver_step(x, out, *where, pred_prev, *options)
    return x_next, pred
