"""linear in plain PyTorch: the specification of every implementation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Saved = tuple[Tensor, ...]


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, x2: Tensor | None, residual: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Saved]:
    """Returns y in ``dtype``, and what backward wants beside the inputs: nothing."""
    wide = _computed_in(x)
    with torch.autocast(x.device.type, enabled=False):
        inputs = x.to(wide) if x2 is None else torch.cat((x.to(wide), x2.to(wide)), dim=-1)
        y = F.linear(inputs, weight.flatten(1).to(wide), None if bias is None else bias.to(wide))
        if residual is not None:
            y = y + residual.to(wide)
    return y.to(dtype), ()


def backward(
    dy: Tensor,
    saved: Saved,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x2: Tensor | None,
    wanted: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias and x2, as far as wanted, from that of y.

    dx = dy W, of which the last columns are dx2; dW = dy^T [x, x2]; db = the sum of dy.
    """
    wide = _computed_in(x)
    g, taps = dy.to(wide), weight.flatten(1).to(wide)
    rows = _rows(g)
    dx = dweight = dbias = dx2 = None
    with torch.autocast(x.device.type, enabled=False):
        if wanted[0]:
            dx = (g @ taps[:, : x.shape[-1]]).to(x.dtype)
        if wanted[1]:
            parts = [_rows(part.to(wide)) for part in (x, x2) if part is not None]
            dweight = torch.cat([rows.t() @ part for part in parts], dim=1).to(weight.dtype).view(weight.shape)
        if wanted[2]:
            assert bias is not None
            dbias = rows.sum(0).to(bias.dtype)
        if wanted[3]:
            assert x2 is not None
            dx2 = (g @ taps[:, x.shape[-1] :]).to(x2.dtype)
    return dx, dweight, dbias, dx2


def _rows(x: Tensor) -> Tensor:
    """[.., K] as a matrix."""
    return x.unsqueeze(0).flatten(0, -2)


def _computed_in(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype == torch.float64 else torch.float32
