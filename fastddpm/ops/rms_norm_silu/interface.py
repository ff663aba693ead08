"""Channel RMSNorm + SiLU, the norm of denoising-diffusion-pytorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._checks import FLOATS, check_device, check_dtype, check_image, check_shape
from ..._dispatch import Op, dense_gradient, once_differentiable, own
from . import reference

OP = Op(__package__, reference)


class _RMSNormSiLU(torch.autograd.Function):
    """Keeps the inputs and what the implementation asks for; all else is computed again in backward."""

    @staticmethod
    def forward(
        ctx: Any, options: dict[str, Any], x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None
    ) -> Tensor:
        ctx.implementation = OP.choose(x=x, weight=weight, scale=scale, shift=shift, **options)
        ctx.options, ctx.nchw = options, x.is_contiguous()
        y: Tensor
        y, saved = ctx.implementation.forward(x, weight, scale=scale, shift=shift, **options)
        ctx.save_for_backward(x, weight, scale, shift, *saved)
        return own(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, shift, *saved = ctx.saved_tensors
        backward = ctx.implementation.backward
        dy = dense_gradient(OP.name, ctx.nchw, dy)
        return None, *backward(dy, tuple(saved), x, weight, scale=scale, shift=shift, **ctx.options)


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
    check_shape("rms_norm_silu", "weight", weight, (c,))
    check_dtype("rms_norm_silu", "weight", weight, *FLOATS)
    for name, q in (("scale", scale), ("shift", shift)):
        if q is not None:
            check_shape("rms_norm_silu", name, q, (b, c))
            check_dtype("rms_norm_silu", name, q, *FLOATS)
    if not eps > 0:
        raise ValueError(f"rms_norm_silu: expected eps > 0, got {eps}; 1e-12 is usual")
    check_device("rms_norm_silu", x, weight=weight, scale=scale, shift=shift)

    options: dict[str, Any] = dict(eps=eps, activation=activation)
    y: Tensor
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (x, weight, scale, shift)):
        y = _RMSNormSiLU.apply(options, x, weight, scale, shift)  # type: ignore[no-untyped-call]
        return y
    implementation = OP.choose(x=x, weight=weight, scale=scale, shift=shift, **options)
    y, _ = implementation.forward(x, weight, scale=scale, shift=shift, **options)
    return y
