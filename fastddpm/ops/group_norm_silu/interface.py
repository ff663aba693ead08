"""GroupNorm + SiLU, with what stands around it in a diffusion U-Net."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..._checks import FLOATS, check_draw, check_image, check_image_like, check_values
from ..._dispatch import Op, dense_gradient, needs_gradient, once_differentiable, own
from . import reference

OP = Op(__package__, reference)
NOTHING: tuple[Any, ...] = (None, None, None)  # in place of seed, sample and step


class _GroupNormSiLU(torch.autograd.Function):
    """Keeps the inputs and what the implementation asks for; all else is computed again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        channel_bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        residual: Tensor | None,
        x2: Tensor | None,
        options: tuple[Any, ...],
    ) -> Tensor | tuple[Tensor, Tensor]:
        num_groups, eps, dropout, seed, sample, step, layer, activation = options  # one argument: each takes 0.05 us
        ctx.implementation = _implementation(x)
        y, h, saved = ctx.implementation.forward(
            x, weight, bias, num_groups, eps=eps, channel_bias=channel_bias, scale=scale, shift=shift,
            residual=residual, x2=x2, dropout=dropout, seed=seed, sample=sample, step=step, layer=layer,
            activation=activation,
        )  # fmt: skip
        ctx.num_groups, ctx.dropout, ctx.layer, ctx.activation = num_groups, dropout, layer, activation
        ctx.numbers = tensors = NOTHING
        if dropout > 0:
            drawn = (seed, sample, step)
            ctx.numbers = tuple([None if isinstance(n, Tensor) else n for n in drawn])
            tensors = tuple([n if isinstance(n, Tensor) else None for n in drawn])
        ctx.save_for_backward(x, weight, bias, channel_bias, scale, shift, residual, x2, *tensors, *saved)
        ctx.nchw = x.is_contiguous()
        if h is None:
            return own(y)
        ctx.set_materialize_grads(False)  # of two outputs one may have no gradient
        return own(y), own(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None = None) -> tuple[Tensor | None, ...]:
        x, weight, bias, channel_bias, scale, shift, residual, x2, *tensors = ctx.saved_tensors
        seed, sample, step = (n if t is None else t for n, t in zip(ctx.numbers, tensors[:3], strict=True))
        gradients = ctx.implementation.backward(
            dy if dy is None else dense_gradient(OP.name, ctx.nchw, dy),
            dh if dh is None else dense_gradient(OP.name, ctx.nchw, dh),
            tuple(tensors[3:]), x, weight, bias, ctx.num_groups, channel_bias=channel_bias, scale=scale, shift=shift,
            residual=residual, x2=x2, dropout=ctx.dropout, seed=seed, sample=sample, step=step, layer=ctx.layer,
            activation=ctx.activation,
        )  # fmt: skip
        return *gradients, None


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    *,
    eps: float = 1e-6,
    channel_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    x2: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | int | None = None,
    sample: Tensor | None = None,
    step: Tensor | int | None = None,
    layer: int = 0,
    activation: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise the channels of each group, scale and shift, apply SiLU and dropout.

    h = [x, x2] + channel_bias + residual;  n = (h - mean) / sqrt(var + eps) over each group of C / num_groups channels
    (Wu and He 2018, eq. 1-2);  y = drop(silu((n * weight + bias) * (1 + scale) + shift)), silu(a) = a / (1 + exp(-a)).

    Args:
        x: float [B, C1, H, W], dense in NCHW or NHWC order; the output keeps the order. C = C1 unless x2 is given. Of
            no samples or no pixels the result is empty, and the gradients of the parameters are 0.
        weight, bias: gamma and beta, float [C].
        num_groups: number of groups, a divisor of C.
        eps: added to the variance, > 0.
        channel_bias: added before the norm, float [C] or [B, C]: the bias of the convolution before plus the time
            embedding.
        scale, shift: the conditioning of improved DDPM, each float [B, C].
        residual: added before the norm, float [B, C, H, W]; asks for the sum as second output.
        x2: second input [B, C2, H, W] in the dtype of x, read as if concatenated after x: C = C1 + C2.
        dropout: probability in [0, 1) to zero an element after the activation; the rest is divided by 1 - dropout.
        seed, sample, step: where dropout draws: int or int64 [] / int64 [B] / int or int64 []. Element i of a sample is
            dropped when its Philox word in stream DROPOUT + layer is below dropout * 2^32.
        layer: number of the layer in its network, in [0, 2^31): each has dropout of its own.
        activation: False leaves out the SiLU.

    Returns: y [B, C, H, W] in the dtype of x; with ``residual`` the pair (y, h), both in that dtype.

    Raises:
        ValueError: a shape, stride, device or range that does not fit.
        TypeError: a dtype.
        RuntimeError: (from autograd) the gradient of the gradient is asked for.

    Numerics: float32 statistics with a centred variance (float64 for float64 x), one rounding of each output and
    gradient; deterministic. For backward the inputs are kept, and of their size only the dropout mask beside them.
    """
    check_image("group_norm_silu", "x", x)
    b, c = x.shape[0], x.shape[1]
    if x2 is not None:
        check_image("group_norm_silu", "x2", x2, (x.dtype,))
        check_values("group_norm_silu", "x2", x2, x, FLOATS, (b, x2.shape[1], *x.shape[2:]))
        c += x2.shape[1]
    if x.shape[1] == 0:
        raise ValueError(
            f"group_norm_silu: expected x with at least one channel, got shape {list(x.shape)}; "
            f"leave out the norm where there are no channels"
        )
    if num_groups < 1 or c % num_groups:
        raise ValueError(
            f"group_norm_silu: expected num_groups to divide the {c} channels, got {num_groups}; "
            f"choose a divisor of {c}"
        )
    if not eps > 0:
        raise ValueError(f"group_norm_silu: expected eps > 0, got {eps}; 1e-6 and 1e-5 are usual")
    if not 0 <= dropout < 1:
        raise ValueError(f"group_norm_silu: expected dropout in [0, 1), got {dropout}; 0.1 drops one element in ten")
    if not 0 <= layer < 2**31:
        raise ValueError(f"group_norm_silu: expected layer in [0, 2^31), got {layer}; number the layers from 0")
    check_values("group_norm_silu", "weight", weight, x, FLOATS, (c,))
    check_values("group_norm_silu", "bias", bias, x, FLOATS, (c,))
    if channel_bias is not None:
        check_values("group_norm_silu", "channel_bias", channel_bias, x, FLOATS, (c,), (b, c))
    if scale is not None:
        check_values("group_norm_silu", "scale", scale, x, FLOATS, (b, c))
    if shift is not None:
        check_values("group_norm_silu", "shift", shift, x, FLOATS, (b, c))
    if residual is not None:
        check_image_like("group_norm_silu", "residual", residual, x, (b, c, *x.shape[2:]))
    if dropout > 0:
        check_draw("group_norm_silu", b, x, seed, sample, step)

    result: Tensor | tuple[Tensor, Tensor]
    if needs_gradient(x, weight, bias, channel_bias, scale, shift, residual, x2):
        result = _GroupNormSiLU.apply(  # type: ignore[no-untyped-call]
            x, weight, bias, channel_bias, scale, shift, residual, x2,
            (num_groups, eps, dropout, seed, sample, step, layer, activation),
        )  # fmt: skip
        return result
    y, h, _ = _implementation(x).forward(
        x, weight, bias, num_groups, eps=eps, channel_bias=channel_bias, scale=scale, shift=shift, residual=residual,
        x2=x2, dropout=dropout, seed=seed, sample=sample, step=step, layer=layer, activation=activation,
    )  # fmt: skip
    result = y if h is None else (y, h)
    return result


def _implementation(x: Tensor) -> ModuleType:
    """The one to run. Where x has no pixels that is the reference, whatever is forced: there is nothing to compute, and
    what a kernel divides by the number of pixels would be nan."""
    return reference if x.numel() == 0 else OP.choose(x, {"x": x})
