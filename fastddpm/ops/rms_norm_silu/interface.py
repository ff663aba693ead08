"""Channel RMSNorm + SiLU, the norm of denoising-diffusion-pytorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._checks import FLOATS, check_image, check_values
from ..._dispatch import Op, dense_gradient, needs_gradient, once_differentiable, own
from . import reference

OP = Op(__package__, reference)


class _RMSNormSiLU(torch.autograd.Function):
    """Keeps the inputs and what the implementation asks for; all else is computed again in backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float, activation: bool
    ) -> Tensor:
        ctx.implementation = OP.choose(x, {"x": x})
        ctx.eps, ctx.activation, ctx.nchw = eps, activation, x.is_contiguous()
        y: Tensor
        y, saved = ctx.implementation.forward(x, weight, scale=scale, shift=shift, eps=eps, activation=activation)
        ctx.save_for_backward(x, weight, scale, shift, *saved)
        return own(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, shift, *saved = ctx.saved_tensors
        dy = dense_gradient(OP.name, ctx.nchw, dy)
        gradients = ctx.implementation.backward(
            dy, tuple(saved), x, weight, scale=scale, shift=shift, eps=ctx.eps, activation=ctx.activation
        )
        return *gradients, None, None


def rms_norm_silu(
    x: Tensor,
    weight: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-12,
    activation: bool = True,
) -> Tensor:
    """Divide each pixel by the root mean square of its channels, scale and shift, apply SiLU.

    y = silu(n * weight * (1 + scale) + shift),  n = sqrt(C) x / max(||x||, eps), the norm over the channels of a pixel
    (Zhang and Sennrich 2019, eq. 4);  silu(a) = a / (1 + exp(-a)).

    Args:
        x: float [B, C, H, W], dense in NCHW or NHWC order; the output keeps the order. Of no samples or no pixels the
            result is empty, and the gradients of the parameters are 0.
        weight: g, float [C].
        scale, shift: the conditioning of improved DDPM, each float [B, C].
        eps: smallest divisor, > 0.
        activation: False leaves out the SiLU.

    Returns: y [B, C, H, W] in the dtype of x.

    Raises:
        ValueError: a shape, stride, device or range that does not fit.
        TypeError: a dtype.
        RuntimeError: (from autograd) the gradient of the gradient is asked for.

    Numerics: float32 arithmetic (float64 for float64 x), one rounding of the output and of each gradient; where eps is
    the divisor it counts as a constant; deterministic. For backward only the inputs are kept.
    """
    check_image("rms_norm_silu", "x", x)
    b, c = x.shape[0], x.shape[1]
    if c == 0:
        raise ValueError(
            f"rms_norm_silu: expected x with at least one channel, got shape {list(x.shape)}; "
            f"leave out the norm where there are no channels"
        )
    check_values("rms_norm_silu", "weight", weight, x, FLOATS, (c,))
    if scale is not None:
        check_values("rms_norm_silu", "scale", scale, x, FLOATS, (b, c))
    if shift is not None:
        check_values("rms_norm_silu", "shift", shift, x, FLOATS, (b, c))
    if not eps > 0:
        raise ValueError(f"rms_norm_silu: expected eps > 0, got {eps}; 1e-12 is usual")

    y: Tensor
    if needs_gradient(x, weight, scale, shift):
        y = _RMSNormSiLU.apply(x, weight, scale, shift, eps, activation)  # type: ignore[no-untyped-call]
        return y
    forward = OP.choose(x, {"x": x}).forward
    y, _ = forward(x, weight, scale=scale, shift=shift, eps=eps, activation=activation)
    return y
