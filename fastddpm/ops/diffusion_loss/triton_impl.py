"""diffusion_loss in Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..philox import TRAINING_NOISE
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
    turned,
)

OBJECTIVES = ("eps", "x0", "v")
NUMBERS = ["seed_low", "seed_high", "step", "pixel_scale", "pixel_shift", "vlb_number", "gradient_scale", "half_bin"]


@triton.jit
def exp_minus_two_terms(x):
    """e^x - 1 - x without cancellation."""
    p = x * 2.7557319e-6 + 2.4801587e-5  # Taylor: 1/9! .. 1/2!
    p = p * x + 1.9841270e-4
    p = p * x + 1.3888889e-3
    p = p * x + 8.3333333e-3
    p = p * x + 4.1666667e-2
    p = p * x + 1.6666667e-1
    p = p * x + 0.5
    return tl.where(tl.abs(x) < 0.5, p * x * x, (tl.exp(x) - 1.0) - x)


@triton.jit
def erfc(x):
    """The complementary error function, to a relative 5e-7 down to 1e-36, beside the error of the exponential.

    erfc(x) = e^(-x^2) t p(t) for x >= 0, t = 1 / (1 + 0.4 x), with p fitted by least squares reweighted towards equal
    relative errors (3e-8 on 0 <= x <= 12). The upper half of the digits of x is squared without rounding.
    """
    z = tl.abs(x)
    z = tl.where(z > 20.0, 20.0, z)
    t = 1.0 / (1.0 + 0.4 * z)
    p = t * -0.02602676302 + 0.17882896960
    p = p * t - 0.45420664549
    p = p * t + 0.48871457577
    p = p * t - 0.23624572158
    p = p * t + 0.24667142332
    p = p * t + 0.13828937709
    p = p * t + 0.21311469376
    p = p * t + 0.22516375780
    p = p * t + 0.22569632530
    half = (z.to(tl.uint32, bitcast=True) & 0xFFFFF000).to(tl.float32, bitcast=True)
    positive = p * t * tl.exp(-half * half) * tl.exp((half - z) * (half + z))
    return tl.where(x >= 0, positive, 2.0 - positive)


@triton.jit
def phi(x):
    """The density of a standard normal number."""
    return tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit
def normal_between(lower, upper):
    """P(lower < Z < upper): both tails on the negative side; a narrow bin by the density at its middle."""
    flip = lower > 0
    a, b = tl.where(flip, -upper, lower), tl.where(flip, -lower, upper)
    wide = 0.5 * (erfc(b * -0.7071067811865476) - erfc(a * -0.7071067811865476))
    w, m = b - a, 0.5 * (a + b)
    s, w2 = m * m, w * w
    narrow = phi(m) * w * (1.0 + w2 * ((s - 1.0) * (1.0 / 24) + w2 * (s * s - 6.0 * s + 3.0) * (1.0 / 1920)))
    return tl.where((w < 0.25) & (tl.abs(m) < 4.0), narrow, wide)


@triton.jit
def x_phi(x):
    """x phi(x), which is 0 at infinity."""
    finite = tl.minimum(tl.maximum(x, -1e4), 1e4)
    return finite * phi(finite)


@triton.jit(do_not_specialize=NUMBERS)
def diffusion_loss_kernel(
    pred, gradient, partial, target, x0, t, table, index, flip, weight, vlb, vlb_weight, vlb_number, sample,
    seed_tensor, seed_low, seed_high, step_tensor, step, pixel_scale, pixel_shift, gradient_scale, half_bin,
    channels, pixels, width, blocks, vlb_stride,
    pred_channel, pred_pixel, target_channel, target_pixel, x0_channel, x0_pixel,
    OBJECTIVE: tl.constexpr, TARGET: tl.constexpr, X0: tl.constexpr, INDEX: tl.constexpr, FLIP: tl.constexpr,
    WEIGHT: tl.constexpr, VLB: tl.constexpr, VLB_WEIGHT: tl.constexpr, GRADIENT: tl.constexpr,
    PRED_ORDER: tl.constexpr, TARGET_ORDER: tl.constexpr, X0_ORDER: tl.constexpr, STREAM: tl.constexpr,
    SEED: tl.constexpr, STEP: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, APPROX: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of weight (pred - target)^2 + vlb_weight L over BLOCK elements of one sample, and its gradient.

    Elements are taken in C, H, W order or, where pred is NHWC, in tiles of pixels by channels: four from each counter
    of the noise, which is drawn again. Bytes an element,
    float32: 4 read, 4 written. What limits it is memory, closely followed by the multiplications of Philox. Sums go to
    memory for each program: no atomics, so that two runs agree.
    """
    pixel_scale = as_float32(pixel_scale)
    pixel_shift = as_float32(pixel_shift)
    gradient_scale = as_float32(gradient_scale)
    half_bin = as_float32(half_bin)
    vlb_number = as_float32(vlb_number)
    b, part = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    counter, element, channel, pixel, inside = places(part, channels, pixels, LANES, VECTOR, BLOCK)
    elements = channels * pixels
    base = b.to(tl.int64) * elements
    time = tl.load(t + b)
    clean = element.to(tl.float32) * 0.0
    if X0:
        row = tl.load(index + b) if INDEX else b.to(tl.int64)
        turn = 0
        if FLIP:
            turn = turned(tl.load(flip + b), element, pixel, width, LANES)
        at = row * elements + offsets(element + turn, channel, pixel + turn, x0_channel, x0_pixel, X0_ORDER)
        clean = tl.load(x0 + at, mask=inside, other=0).to(tl.float32) * pixel_scale + pixel_shift
    if TARGET:
        at = base + offsets(element, channel, pixel, target_channel, target_pixel, TARGET_ORDER)
        wanted = tl.load(target + at, mask=inside, other=0).to(tl.float32)
    elif OBJECTIVE == 1:
        wanted = clean
    else:
        low, high, step_word = drawing(seed_tensor, seed_low, seed_high, step_tensor, step, SEED, STEP)
        number = (tl.load(sample + b) & 0xFFFFFFFF).to(tl.uint32)
        wanted = normals(counter, number, step_word, STREAM, low, high, LANES, VECTOR, APPROX)
        if OBJECTIVE == 2:
            signal, sigma = tl.load(table + 2 * time).to(tl.float32), tl.load(table + 2 * time + 1).to(tl.float32)
            wanted = signal * wanted - sigma * clean

    w = tl.load(weight + b).to(tl.float32) if WEIGHT else 1.0
    at = (base * 2 if VLB else base) + offsets(element, channel, pixel, pred_channel, pred_pixel, PRED_ORDER)
    difference = tl.load(pred + at, mask=inside, other=0).to(tl.float32) - wanted
    term = difference * difference * w
    if GRADIENT:
        save(gradient + at, difference * (2.0 * w * gradient_scale), inside)
    if VLB:
        row_of = vlb + 4 * time
        mean_slope, least = tl.load(row_of).to(tl.float32), tl.load(row_of + 1).to(tl.float32)
        most, of_q = tl.load(row_of + 2).to(tl.float32), tl.load(row_of + 3).to(tl.float32)
        bound_weight = tl.load(vlb_weight + b * vlb_stride).to(tl.float32) if VLB_WEIGHT else vlb_number
        at += channels * pred_channel  # the second half of pred lies C channels on
        f = (tl.load(pred + at, mask=inside, other=0).to(tl.float32) + 1.0) * 0.5
        logvar = f * most + (1.0 - f) * least
        mean_error = mean_slope * difference
        if time == 0:
            inverse_std = tl.exp(-0.5 * logvar)
            upper, lower = (half_bin - mean_error) * inverse_std, (-half_bin - mean_error) * inverse_std
            upper = tl.where(clean > 1.0 - half_bin, float("inf"), upper)
            lower = tl.where(clean < -1.0 + half_bin, float("-inf"), lower)
            p = normal_between(lower, upper)
            nats = -tl.log(tl.where(p < 1e-12, 1e-12, p))
            slope = tl.where(p > 1e-12, 0.5 * (x_phi(upper) - x_phi(lower)) / p, 0.0)
        else:
            d = of_q - logvar
            scaled = mean_error * mean_error * tl.exp(-logvar)
            nats = 0.5 * (exp_minus_two_terms(d) + scaled)
            slope = 0.5 * (1.0 - tl.exp(d) - scaled)
        term += nats * (bound_weight * 1.4426950408889634)
        if GRADIENT:
            to_v = (most - least) * (0.5 * 1.4426950408889634) * bound_weight * gradient_scale
            save(gradient + at, slope * to_v, inside)
    total = tl.sum(tl.sum(tl.where(inside, term, 0.0), axis=1), axis=0)
    tl.store(partial + tl.program_id(0), total)


def unsupported(*, pred: Tensor, **_: Any) -> str | None:
    """Why this kernel cannot run, or None."""
    return reason_against(pred)


@torch.library.triton_op("fastddpm::triton_diffusion_loss", mutates_args=())
def _diffusion_loss(
    pred: Tensor, t: Tensor, target: Tensor | None, objective: int, table: Tensor | None, x0: Tensor | None,
    index: Tensor | None, flip: Tensor | None, pixel_scale: float, pixel_shift: float, seed: int,
    seed_tensor: Tensor | None, sample: Tensor | None, step: int, step_tensor: Tensor | None, weight: Tensor | None,
    vlb: Tensor | None, vlb_number: float | None, vlb_weight: Tensor | None, levels: int, gradient_scale: float | None,
) -> list[Tensor]:  # fmt: skip
    batch, channels, height, width = pred.shape
    pixels = height * width
    channels = channels if vlb is None else channels // 2
    elements = channels * pixels
    blocks, tile = tiling(pred, channels)
    draw, given = draw_arguments(seed, seed_tensor, step, step_tensor, pred)
    partial = pred.new_empty((batch, blocks), dtype=torch.float32)
    gradient = pred if gradient_scale is None else like_in_order(pred)
    at, orders = {}, {}
    for name, image in (("pred", pred), ("target", target), ("x0", x0)):
        at[f"{name}_channel"], at[f"{name}_pixel"] = strides(pred if image is None else image)
        orders[f"{name.upper()}_ORDER"] = order(image, tile["LANES"], channels)
    launch(
        diffusion_loss_kernel, (batch * blocks,),
        pred=pred, gradient=gradient, partial=partial, target=pred if target is None else target,
        x0=pred if x0 is None else x0, t=t, table=pred if table is None else table, index=t if index is None else index,
        flip=t if flip is None else flip.view(torch.uint8), weight=pred if weight is None else weight,
        vlb=pred if vlb is None else vlb, vlb_weight=pred if vlb_weight is None else vlb_weight,
        vlb_number=0.0 if vlb_number is None else vlb_number, sample=t if sample is None else sample, **draw,
        pixel_scale=pixel_scale, pixel_shift=pixel_shift,
        gradient_scale=0.0 if gradient_scale is None else gradient_scale / max(batch * elements, 1),
        half_bin=1 / (levels - 1), channels=channels, pixels=pixels, width=width, blocks=blocks,
        vlb_stride=0 if vlb_weight is None else vlb_weight.dim(), **at,
        OBJECTIVE=objective, TARGET=target is not None, X0=x0 is not None, INDEX=index is not None,
        FLIP=flip is not None, WEIGHT=weight is not None, VLB=vlb is not None, VLB_WEIGHT=vlb_weight is not None,
        GRADIENT=gradient_scale is not None,
        STREAM=TRAINING_NOISE, **orders, **given, **tile, APPROX=not INTERPRETED,
    )  # fmt: skip
    per_sample = partial.sum(1) / elements
    outputs = [per_sample.mean(), per_sample]
    return outputs if gradient_scale is None else [*outputs, gradient]


def forward(
    pred: Tensor,
    t: Tensor,
    *,
    target: Tensor | None,
    objective: str,
    table: Tensor | None,
    x0: Tensor | None,
    index: Tensor | None,
    flip: Tensor | None,
    pixel_scale: float,
    pixel_shift: float,
    seed: Tensor | int | None,
    sample: Tensor | None,
    step: Tensor | int | None,
    weight: Tensor | None,
    vlb: Tensor | None,
    vlb_weight: Tensor | float,
    levels: int,
    gradient_scale: float | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the loss [], that of each sample [B] and, with a gradient_scale, d (gradient_scale loss) / d pred."""
    table, index, flip, weight, vlb = (p if p is None else p.contiguous() for p in (table, index, flip, weight, vlb))
    sample = None if sample is None else sample.contiguous()
    number, weights = float_or_tensor(vlb_weight)
    loss, per_sample, *gradient = _diffusion_loss(
        pred.detach(), t.contiguous(), target, OBJECTIVES.index(objective), table, x0, index, flip, pixel_scale,
        pixel_shift, *number_or_tensor(seed), sample, *number_or_tensor(step), weight, vlb, number,
        None if weights is None else weights.contiguous(), levels, gradient_scale,
    )  # fmt: skip
    return loss, per_sample, gradient[0] if gradient else None
