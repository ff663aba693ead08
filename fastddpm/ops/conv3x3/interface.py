"""The 3x3 convolution of the U-Net, on the CPU.

On a GPU the network takes that of cuDNN, which has tensor cores; this op is its reference there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._checks import FLOATS, check_device, check_dtype, check_image, check_values
from ..._dispatch import Op, dense_gradient, needs_gradient, once_differentiable, own
from ..kept import transform_anew
from . import reference

OP = Op(__package__, reference)


class _Conv3x3(torch.autograd.Function):
    """Keeps the inputs, in the dtype that they have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.implementation = OP.choose(x, {"x": x})
        y: Tensor
        with transform_anew():
            y, saved = ctx.implementation.forward(x, weight, bias)
        ctx.save_for_backward(x, weight, bias, *saved)
        ctx.nchw, ctx.weight_nchw = x.is_contiguous(), weight.is_contiguous()
        ctx.precision = x.dtype if torch.is_autocast_enabled(x.device.type) else weight.dtype
        return own(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *saved = ctx.saved_tensors
        dy = dense_gradient(OP.name, ctx.nchw, dy)
        dx, dweight, dbias = ctx.implementation.backward(
            dy, tuple(saved), x, weight, bias, ctx.needs_input_grad, ctx.precision
        )
        if dweight is not None:
            order = torch.contiguous_format if ctx.weight_nchw else torch.channels_last
            dweight = dweight.contiguous(memory_format=order)
        return dx, dweight, dbias


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve with filters of 3x3 pixels, stride 1, within a border of zeros.

    y[b, n, i, j] = bias[n] + sum_{k, p, q} weight[n, k, p, q] x[b, k, i + p - 1, j + q - 1]

    The C++ kernels compute it by minimal filtering (Winograd 1980; Lavin and Gray 2016): F(2x2, 3x3) has 16 products
    for 2x2 pixels in place of 36; F(4x4, 3x3), which half precision takes on all but the smallest maps, 36 for 144.

    Args:
        x: float [B, K, H, W], dense in NCHW or NHWC order; the output keeps the order. NHWC is the fast one.
        weight: float [N, K, 3, 3].
        bias: float [N].

    Returns: y [B, N, H, W] in the dtype of x.

    Raises:
        ValueError: a shape, stride or device that does not fit.
        TypeError: a dtype.
        RuntimeError: (from autograd) the gradient of the gradient is asked for.

    Numerics: float32 arithmetic in every dtype (float64 for float64 x), so half precision is what is stored; one
    rounding of the output and of each gradient; deterministic, whatever the number of threads. The rounding error of
    F(2x2, 3x3) is at most 1.6 times that of the direct sum in the mean; that of F(4x4, 3x3), 6 times, 1.6e-6 of the
    result, stays below the rounding to half precision, and whatever is returned in float32, the gradient of a float32
    weight too, is computed without it; but for that gradient under torch.autocast, which has the precision of x, like
    that of torch's own layers, which round the weight. A pixel that is infinite or NaN spoils all of the 4x4 pixels
    (float32: 2x2) of y that it has a part in. For backward only the inputs are kept.
    """
    check_image("conv3x3", "x", x)
    check_dtype("conv3x3", "weight", weight, *FLOATS)
    if weight.dim() != 4 or weight.shape[1] != x.shape[1] or weight.shape[2:] != (3, 3):
        raise ValueError(
            f"conv3x3: expected weight of shape [N, {x.shape[1]}, 3, 3], got {list(weight.shape)}; x has {x.shape[1]} "
            "channels, and other filters are for torch.nn.functional.conv2d"
        )
    check_device("conv3x3", x, weight=weight)
    if bias is not None:
        check_values("conv3x3", "bias", bias, x, FLOATS, (weight.shape[0],))

    y: Tensor
    if needs_gradient(x, weight, bias):
        y = _Conv3x3.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return y
    y, _ = OP.choose(x, {"x": x}).forward(x, weight, bias)
    return y
