"""q_sample in Triton."""

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

RETURNS = ("x_t", "noise", "x0", "v")
NUMBERS = ["seed_low", "seed_high", "step", "pixel_scale", "pixel_shift"]


@triton.jit(do_not_specialize=NUMBERS)
def q_sample_kernel(
    x0, noise, x_t, second, t, table, index, flip, sample, seed_tensor, seed_low, seed_high, step_tensor, step,
    pixel_scale, pixel_shift, channels, pixels, width, blocks,
    x0_channel, x0_pixel, noise_channel, noise_pixel, out_channel, out_pixel,
    INDEX: tl.constexpr, FLIP: tl.constexpr, DRAW: tl.constexpr, RETURNS: tl.constexpr, X0_ORDER: tl.constexpr,
    NOISE_ORDER: tl.constexpr, OUT_ORDER: tl.constexpr, STREAM: tl.constexpr, SEED: tl.constexpr, STEP: tl.constexpr,
    LANES: tl.constexpr, VECTOR: tl.constexpr, APPROX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x_t = signal x_0 + sigma eps, x_0 = pixel_scale image + pixel_shift (Ho et al. 2020, eq. 4).

    A program takes BLOCK elements of one sample, in C, H, W order or, where x_t is NHWC, a tile of pixels by channels:
    four from each counter of the noise. What belongs to the sample is loaded once. Bytes an element: 1 (uint8) + 2 or
    4. What limits it is memory, closely followed by the integer multiplications of Philox.
    """
    pixel_scale = as_float32(pixel_scale)
    pixel_shift = as_float32(pixel_shift)
    b, part = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    time = tl.load(t + b)
    signal, sigma = tl.load(table + 2 * time).to(tl.float32), tl.load(table + 2 * time + 1).to(tl.float32)
    counter, element, channel, pixel, inside = places(part, channels, pixels, LANES, VECTOR, BLOCK)
    elements = channels * pixels
    base = b.to(tl.int64) * elements

    row = tl.load(index + b) if INDEX else b.to(tl.int64)
    turn = 0
    if FLIP:
        turn = turned(tl.load(flip + b), element, pixel, width, LANES)
    at = row * elements + offsets(element + turn, channel, pixel + turn, x0_channel, x0_pixel, X0_ORDER)
    x = tl.load(x0 + at, mask=inside, other=0).to(tl.float32) * pixel_scale + pixel_shift
    if DRAW:
        low, high, step_word = drawing(seed_tensor, seed_low, seed_high, step_tensor, step, SEED, STEP)
        number = (tl.load(sample + b) & 0xFFFFFFFF).to(tl.uint32)
        eps = normals(counter, number, step_word, STREAM, low, high, LANES, VECTOR, APPROX)
    else:
        at = base + offsets(element, channel, pixel, noise_channel, noise_pixel, NOISE_ORDER)
        eps = tl.load(noise + at, mask=inside, other=0).to(tl.float32)

    to = base + offsets(element, channel, pixel, out_channel, out_pixel, OUT_ORDER)
    save(x_t + to, signal * x + sigma * eps, inside)
    if RETURNS == 1:
        save(second + to, eps, inside)
    if RETURNS == 2:
        save(second + to, x, inside)
    if RETURNS == 3:
        save(second + to, signal * eps - sigma * x, inside)


def unsupported(*, x0: Tensor, dtype: torch.dtype, **_: Any) -> str | None:
    """Why this kernel cannot run, or None."""
    return reason_against(x0, dtype)


@torch.library.triton_op("fastddpm::triton_q_sample", mutates_args=())
def _q_sample(
    x0: Tensor, t: Tensor, table: Tensor, index: Tensor | None, flip: Tensor | None, pixel_scale: float,
    pixel_shift: float, noise: Tensor | None, seed: int, seed_tensor: Tensor | None, sample: Tensor | None, step: int,
    step_tensor: Tensor | None, returns: int, dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    batch = x0.shape[0] if index is None else index.shape[0]
    _, channels, height, width = x0.shape
    outputs = [like_in_order(x0, (batch, *x0.shape[1:]), dtype) for _ in range(1 if returns == 0 else 2)]
    blocks, tile = tiling(outputs[0], channels)
    draw, given = draw_arguments(seed, seed_tensor, step, step_tensor, t)
    eps, out = x0 if noise is None else noise, outputs[0]
    x0_channel, x0_pixel = strides(x0)
    noise_channel, noise_pixel = strides(eps)
    out_channel, out_pixel = strides(out)
    launch(
        q_sample_kernel, (batch * blocks,),
        x0=x0, noise=eps, x_t=out, second=outputs[-1], t=t, table=table, index=t if index is None else index,
        flip=t if flip is None else flip.view(torch.uint8), sample=t if sample is None else sample, **draw,
        pixel_scale=pixel_scale, pixel_shift=pixel_shift,
        channels=channels, pixels=height * width, width=width, blocks=blocks,
        x0_channel=x0_channel, x0_pixel=x0_pixel, noise_channel=noise_channel, noise_pixel=noise_pixel,
        out_channel=out_channel, out_pixel=out_pixel,
        INDEX=index is not None, FLIP=flip is not None, DRAW=noise is None, RETURNS=returns,
        X0_ORDER=order(x0, tile["LANES"], channels), NOISE_ORDER=order(eps, tile["LANES"], channels),
        OUT_ORDER=order(out, tile["LANES"], channels),
        STREAM=TRAINING_NOISE, **given, **tile, APPROX=not INTERPRETED,
    )  # fmt: skip
    return outputs


def forward(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    *,
    index: Tensor | None,
    flip: Tensor | None,
    pixel_scale: float,
    pixel_shift: float,
    noise: Tensor | None,
    seed: Tensor | int | None,
    sample: Tensor | None,
    step: Tensor | int | None,
    returns: str,
    dtype: torch.dtype,
) -> Tensor | tuple[Tensor, Tensor]:
    """See the interface."""
    index, flip, sample = (p if p is None else p.contiguous() for p in (index, flip, sample))
    outputs = _q_sample(
        x0, t.contiguous(), table.contiguous(), index, flip, pixel_scale, pixel_shift, noise, *number_or_tensor(seed),
        sample, *number_or_tensor(step), RETURNS.index(returns), dtype,
    )  # fmt: skip
    return outputs[0] if returns == "x_t" else (outputs[0], outputs[1])
