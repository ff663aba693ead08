"""The noising step of diffusion, from stored pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import (
    FLOATS,
    INTEGER,
    PIXELS,
    WIDE,
    check_draw,
    check_image,
    check_image_like,
    check_rows,
    check_values,
)
from ..._dispatch import Op
from . import reference

OP = Op(__package__, reference)
RETURNS = ("x_t", "noise", "x0", "v")


def q_sample(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    *,
    index: Tensor | None = None,
    flip: Tensor | None = None,
    pixel_scale: float = 2 / 255,
    pixel_shift: float = -1.0,
    noise: Tensor | None = None,
    seed: Tensor | int | None = None,
    sample: Tensor | None = None,
    step: Tensor | int | None = None,
    returns: str = "x_t",
    dtype: torch.dtype = torch.float32,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draw x_t from q(x_t | x_0), for images as they are stored.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (Ho et al. 2020, eq. 4), with
    x_0 = pixel_scale * flip(x0[index]) + pixel_shift.

    Args:
        x0: uint8 or float images [N, C, H, W], dense in NCHW or NHWC order; the output keeps the order.
        t: int64 [B], values in [0, T); not checked, since that would stop the device.
        table: [T, 2], float32 or float64: sqrt(abar_t) and sqrt(1 - abar_t).
        index: int64 [B], the rows of x0 to take, values in [0, N); None takes all, and then B = N.
        flip: bool [B], True mirrors an image left to right.
        pixel_scale, pixel_shift: from stored values to [-1, 1]; the defaults are for 256 levels.
        noise: eps, float [B, C, H, W]; when given, nothing is drawn.
        seed, sample, step: where the noise is drawn otherwise: int or int64 [] / int64 [B] / int or int64 []; Philox
            stream TRAINING_NOISE.
        returns: "x_t" alone, or "noise", "x0" (normalised) or "v" = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 for the
            pair of x_t and that.
        dtype: float, of the output.

    Returns: x_t [B, C, H, W], or a pair of such tensors; always new ones.

    Raises:
        ValueError: a shape, stride, device or option that does not fit, noise and seed both given or neither.
        TypeError: a dtype.

    Numerics: float32 arithmetic (float64 for float64 output), one rounding; deterministic. Not differentiable.
    """
    check_image("q_sample", "x0", x0, PIXELS)
    shape: tuple[int, ...] = x0.shape
    if index is not None:
        check_rows("q_sample", "index", index, x0, INTEGER)
        shape = (index.shape[0], *shape[1:])
    b = shape[0]
    check_values("q_sample", "t", t, x0, INTEGER, (b,))
    check_rows("q_sample", "table", table, x0, WIDE, 2)
    if flip is not None:
        check_values("q_sample", "flip", flip, x0, (torch.bool,), (b,))
    if returns not in RETURNS:
        raise ValueError(
            f"q_sample: expected returns to be one of {', '.join(RETURNS)}, got {returns!r}; choose one of these"
        )
    if dtype not in FLOATS:
        raise TypeError(
            f"q_sample: expected dtype to be a float dtype, got {dtype}; torch.float32 or torch.bfloat16 is usual"
        )
    if noise is None:
        check_draw("q_sample", b, x0, seed, sample, step)
    elif seed is not None:
        raise ValueError("q_sample: expected noise or seed, got both; pass the noise, or where to draw it")
    else:
        check_image_like("q_sample", "noise", noise, x0, shape)
    result: Tensor | tuple[Tensor, Tensor] = OP.run(x0, dict(
        x0=x0, t=t, table=table, index=index, flip=flip, pixel_scale=pixel_scale, pixel_shift=pixel_shift,
        noise=noise, seed=seed, sample=sample, step=step, returns=returns, dtype=dtype,
    ))  # fmt: skip
    return result
