"""The one update behind every sampler."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import (
    FLOATS,
    WIDE,
    check_draw,
    check_image,
    check_image_like,
    check_rows,
    check_scalar,
    check_values,
)
from ..._dispatch import Op
from . import reference

OP = Op(__package__, reference)


def solver_step(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    step: Tensor | int,
    *,
    pred_prev: Tensor | None = None,
    out_uncond: Tensor | None = None,
    guidance_scale: Tensor | float = 1.0,
    clamp: Tensor | float | None = None,
    noise: Tensor | None = None,
    seed: Tensor | int | None = None,
    sample: Tensor | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    known_table: Tensor | None = None,
    known_noise: Tensor | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """One step of a sampler that is a row of coefficients: DDPM, DDIM, DPM-Solver++(2M) and their kin.

    o = out_uncond + guidance_scale (out - out_uncond);  pred = clamp(k0 x + k1 o);
    x' = k2 pred + k3 x + k4 pred_prev + k5 z + k6 o;  then, with a mask, x' = mask (a known + s eps) + (1 - mask) x'.
    Ho et al. 2020 eq. 6-7 and 11, Song et al. 2021 (DDIM) eq. 12 and Lu et al. 2022 (DPM-Solver++) algorithm 2 are rows
    of such a table.

    Args:
        x: state [B, C, H, W], float, dense in NCHW or NHWC order; the output keeps the order.
        out: output of the network [B, C, H, W], or [B, 2C, H, W] with a learned variance: f = (v + 1) / 2 of its second
            half v makes k5 = exp((f logvar_max + (1 - f) logvar_min) / 2) wherever the table's k5 is not 0 (Nichol and
            Dhariwal 2021, eq. 15).
        table: [N, 9], float32 or float64: k0 .. k6, logvar_min, logvar_max.
        step: the row, an int or an int64 tensor [] on the device (whose value is not checked).
        pred_prev: pred of the step before [B, C, H, W]; None leaves out k4.
        out_uncond, guidance_scale: the prediction without condition, shaped like out, and the weight w (a number or a
            float tensor []): w = 1 is the conditional prediction. The variance is always that of ``out``.
        clamp: bound of |pred|, > 0: None, a number, or a float tensor [B].
        noise: z, float [B, C, H, W]. Otherwise seed (int or int64 []) and sample (int64 [B]) draw it: Philox stream
            SAMPLER_NOISE, counter step = ``step``. With neither noise nor seed, k5 z is left out.
        mask, known, known_table: keep ``known`` [B, C, H, W] where mask is 1: mask float [B or 1, C or 1, H, W] in
            [0, 1]; known_table [N, 2] holds a and s, the signal and noise level after each step.
        known_noise: eps of the known part [B, C, H, W]; otherwise seed and sample draw it: stream TRAINING_NOISE.
        inplace: write x' over x, and pred over pred_prev where that is given.

    Returns: the pair (x', pred), in the dtype of x.

    Raises:
        ValueError: a shape, stride, device or range that does not fit; tensors given that exclude or need each other.
        TypeError: a dtype.

    Numerics: float32 arithmetic (float64 for a float64 state), one rounding; deterministic. Not differentiable.
    """
    check_image("solver_step", "x", x)
    b, c, h, w = shape = x.shape
    check_image_like("solver_step", "out", out, x, shape, (b, 2 * c, h, w))
    check_rows("solver_step", "table", table, x, WIDE, 9)
    if not isinstance(step, int):
        check_scalar("solver_step", "step", step, x, torch.int64)
    elif not 0 <= step < table.shape[0]:
        raise ValueError(
            f"solver_step: expected step in [0, {table.shape[0]}), got {step}; it is a row of the table, "
            f"counted from the first step"
        )
    if out_uncond is not None:
        check_image_like("solver_step", "out_uncond", out_uncond, x, out.shape)
    if not isinstance(guidance_scale, float):
        check_scalar("solver_step", "guidance_scale", guidance_scale, x, *FLOATS)
    if isinstance(clamp, Tensor):
        check_values("solver_step", "clamp", clamp, x, FLOATS, (b,))
    elif clamp is not None and not clamp > 0:
        raise ValueError(
            f"solver_step: expected clamp > 0, got {clamp}; 1.0 is the range of images, None does not clamp"
        )
    if pred_prev is not None:
        check_image_like("solver_step", "pred_prev", pred_prev, x, shape)
    if noise is not None:
        check_image_like("solver_step", "noise", noise, x, shape)
    if known is not None:
        check_image_like("solver_step", "known", known, x, shape)
    if known_noise is not None:
        check_image_like("solver_step", "known_noise", known_noise, x, shape)
    if noise is not None and seed is not None:
        raise ValueError("solver_step: expected noise or seed, got both; pass the noise, or where to draw it")
    if (mask is None) != (known is None) or (mask is None) != (known_table is None):
        given = [n for n, v in (("mask", mask), ("known", known), ("known_table", known_table)) if v is not None]
        raise ValueError(
            f"solver_step: expected mask, known and known_table together, got {' and '.join(given)} alone; "
            f"pass all three or none"
        )
    if mask is not None:
        check_values("solver_step", "mask", mask, x, FLOATS, *((m, n, h, w) for m in (b, 1) for n in (c, 1)))
        check_values("solver_step", "known_table", known_table, x, WIDE, (table.shape[0], 2))
        if known_noise is None and noise is not None:
            raise ValueError(
                "solver_step: expected known_noise where noise and a mask are given, got None; "
                "pass it too, or seed and sample in place of noise"
            )
    if seed is not None or (mask is not None and known_noise is None):
        check_draw("solver_step", b, x, seed, sample, step)
    if inplace and pred_prev is not None and pred_prev.dtype != x.dtype:
        raise TypeError(
            f"solver_step: expected pred_prev of dtype {x.dtype} to write over it, got {pred_prev.dtype}; "
            f"convert it with .to(dtype)"
        )
    result: tuple[Tensor, Tensor] = OP.run(x, dict(
        x=x, out=out, table=table, step=step, pred_prev=pred_prev, out_uncond=out_uncond,
        guidance_scale=guidance_scale, clamp=clamp, noise=noise, seed=seed, sample=sample, mask=mask, known=known,
        known_table=known_table, known_noise=known_noise, inplace=inplace,
    ))  # fmt: skip
    return result
