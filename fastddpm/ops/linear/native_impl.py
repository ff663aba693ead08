"""linear by the kernels of csrc/linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _native
from ..kept import is_kept, kept
from ..native_common import reason_against, register_fake

Saved = tuple[Tensor, ...]
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(*, x: Tensor, dtype: torch.dtype | None = None, **_: Any) -> str | None:
    """Why these kernels cannot run, or None."""
    if x.is_cuda:
        return "the kernels are for the CPU: on a GPU torch.nn.functional.linear has tensor cores"
    return reason_against(x) or reason_against(x, dtype=dtype)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, x2: Tensor | None, residual: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Saved]:
    """Returns y, and what backward wants beside the inputs: nothing."""
    keep = is_kept()
    x, x2 = x.contiguous(), None if x2 is None else x2.contiguous()
    bias = bias if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    kind = TYPES.index(dtype)
    if keep:
        of_x = x.dtype if x.dtype in TYPES and (x2 is None or x2.dtype == x.dtype) else torch.float32
        packed = kept(
            weight,
            ("panels", of_x, dtype),
            lambda: torch.ops.fastddpm.linear_weight.default(_matrix(weight), TYPES.index(of_x), kind),
        )
        y = torch.ops.fastddpm.linear_packed.default(x, x2, packed, weight.shape[0], bias, residual, kind)
    else:
        y = torch.ops.fastddpm.linear.default(x, x2, _matrix(weight), bias, residual, False, kind)
    return y, ()


def backward(
    dy: Tensor,
    saved: Saved,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x2: Tensor | None,
    wanted: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias and x2, as far as wanted, from that of y."""
    dx = dweight = dbias = dx2 = None
    dy, taps = dy.contiguous(), _matrix(weight)
    if wanted[0]:
        dx = _product(dy, taps[:, : x.shape[-1]], x)
    if wanted[3]:
        assert x2 is not None
        dx2 = _product(dy, taps[:, x.shape[-1] :], x2)
    if wanted[1] or wanted[2]:
        of_bias = bias if wanted[2] else None
        found = torch.ops.fastddpm.linear_gradient.default(dy, x.contiguous(), taps[:, : x.shape[-1]], of_bias)
        dbias = found[1] if wanted[2] else None
        if wanted[1]:
            dtaps = found[0]
            if x2 is not None:
                others = torch.ops.fastddpm.linear_gradient.default(dy, x2.contiguous(), taps[:, x.shape[-1] :], None)
                dtaps = torch.cat((dtaps, others[0]), dim=1)
            dweight = dtaps.view(weight.shape).to(weight.dtype)
    return dx, dweight, dbias, dx2


def _matrix(weight: Tensor) -> Tensor:
    """[N, K] in a dtype that kernels write, whose rows or columns are dense."""
    matrix = weight.flatten(1)
    matrix = matrix.float() if matrix.dtype == torch.float64 else matrix
    return matrix if 1 in matrix.stride() else matrix.contiguous()


def _product(dy: Tensor, taps: Tensor, like: Tensor) -> Tensor:
    """dy times taps, in the dtype of ``like``."""
    kind = TYPES.index(torch.float32 if like.dtype == torch.float64 else like.dtype)
    y: Tensor = torch.ops.fastddpm.linear.default(dy, None, taps, None, None, True, kind)
    return y.to(like.dtype)


@register_fake("linear_weight")
def _(weight: Tensor, of_x: int, type: int) -> Tensor:
    panels = (weight.shape[0] + 31) // 32
    bfloat16 = TYPES.index(torch.bfloat16)
    if of_x == bfloat16 and (weight.dtype == torch.bfloat16 or type != 0) and _native.multiplies_pairs():
        return weight.new_empty((panels, (weight.shape[1] + 1) // 2, 64), dtype=torch.bfloat16)
    return weight.new_empty((panels, weight.shape[1], 32), dtype=torch.float32)


@register_fake("linear_packed")
def _(
    x: Tensor,
    x2: Tensor | None,
    weights: Tensor,
    outputs: int,
    bias: Tensor | None,
    residual: Tensor | None,
    type: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs), dtype=TYPES[type])


@register_fake("linear")
def _(
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    turned: bool,
    type: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1 if turned else 0]), dtype=TYPES[type])


@register_fake("linear_gradient")
def _(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    return [weight.new_empty(weight.shape), *(() if bias is None else (torch.empty_like(bias),))]
