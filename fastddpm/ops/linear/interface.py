"""The linear layer of the U-Net: 1x1 convolutions, the projections of attention and of the time embedding, on the CPU.

On a GPU the network takes that of cuBLAS, which has tensor cores; this op is its reference there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._checks import FLOATS, check_device, check_dtype, check_values
from ..._dispatch import Op, needs_gradient, once_differentiable, own
from ..kept import transform_anew
from . import reference

OP = Op(__package__, reference)


class _Linear(torch.autograd.Function):
    """Keeps the inputs, in the dtype that they have."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        x2: Tensor | None,
        residual: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.implementation = OP.choose(x, dict(x=x, dtype=dtype))
        y: Tensor
        with transform_anew():
            y, saved = ctx.implementation.forward(x, weight, bias, x2, residual, dtype)
        ctx.save_for_backward(x, weight, bias, x2, *saved)
        ctx.residual = None if residual is None else residual.dtype
        return own(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, x2, *saved = ctx.saved_tensors
        found: tuple[Tensor | None, ...] = ctx.implementation.backward(
            dy, tuple(saved), x, weight, bias, x2, ctx.needs_input_grad[:4]
        )
        return *found, dy.to(ctx.residual) if ctx.needs_input_grad[4] else None, None


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    x2: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply rows with a matrix, and add.

    y = [x, x2] W^T + bias + residual

    A 1x1 convolution of an image in NHWC order is this of its pixels; with x2 it is that of two images, joined along
    their channels, of which there is no copy; with the residual it is a shortcut or an attention within its sum.

    Args:
        x: float [.., K]; rows that do not lie one after the other are copied, as those of x2 and residual are.
        weight: float [N, K + K2], or [N, K + K2, 1, 1], as that of a convolution.
        bias: float [N].
        x2: float [.., K2], read as further columns of x.
        residual: float [.., N].
        dtype: of y; that of x by default.

    Returns: y [.., N].

    Raises:
        ValueError: a shape or device that does not fit.
        TypeError: a dtype.
        RuntimeError: (from autograd) the gradient of the gradient is asked for.

    Numerics: float32 arithmetic in every dtype (float64 for float64 x), so half precision is what is stored; one
    rounding of the output and of each gradient; deterministic, whatever the number of threads. Where a processor
    multiplies bfloat16 faster (AVX512_BF16 on those of AMD), products of bfloat16 x are by that instruction: exact,
    summed in float32, and numbers below 2^-126 count as 0; a float32 weight is rounded to bfloat16 there for a y in
    half precision, as torch.autocast does, and for a float32 y it is not. For backward only the inputs are kept, and of
    the residual nothing.
    """
    check_dtype("linear", "x", x, *FLOATS)
    check_dtype("linear", "weight", weight, *FLOATS)
    if x.dim() == 0:
        raise ValueError("linear: expected x of shape [.., K], got []; give it a dimension of inputs")
    rows, inputs = x.shape[:-1], x.shape[-1]
    if x2 is not None:
        check_dtype("linear", "x2", x2, *FLOATS)
        if x2.dim() == 0 or x2.shape[:-1] != rows:
            wanted = ", ".join(str(n) for n in (*rows, "K2"))
            raise ValueError(
                f"linear: expected x2 of shape [{wanted}], got {list(x2.shape)}; it is read as further columns of x"
            )
        inputs += x2.shape[-1]
    if weight.dim() not in (2, 4) or weight.shape[1] != inputs or weight.shape[2:] not in ((), (1, 1)):
        raise ValueError(
            f"linear: expected weight of shape [N, {inputs}], got {list(weight.shape)}; x"
            f"{'' if x2 is None else ' and x2'} {'has' if x2 is None else 'have'} {inputs} columns"
        )
    if bias is not None:
        check_values("linear", "bias", bias, x, FLOATS, (weight.shape[0],))
    if residual is not None:
        check_values("linear", "residual", residual, x, FLOATS, (*rows, weight.shape[0]))
    if dtype not in (None, *FLOATS):
        raise TypeError(f"linear: expected dtype to be of a float, got {dtype}; pass torch.float32, for example")
    check_device("linear", x, weight=weight, x2=x2)

    dtype = x.dtype if dtype is None else dtype
    y: Tensor
    if needs_gradient(x, weight, bias, x2, residual):
        y = _Linear.apply(x, weight, bias, x2, residual, dtype)  # type: ignore[no-untyped-call]
        return y
    y, _ = OP.choose(x, dict(x=x, dtype=dtype)).forward(x, weight, bias, x2, residual, dtype)
    return y
