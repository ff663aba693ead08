"""q_sample by the kernels of csrc/q_sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..native_common import contiguous, drawing, like_in_order, reason_against, register_fake

RETURNS = ("x_t", "noise", "x0", "v")  # as csrc/q_sample numbers them


def unsupported(*, x0: Tensor, dtype: torch.dtype, **_: Any) -> str | None:
    """Why these kernels cannot run, or None."""
    return reason_against(x0, dtype=dtype)


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
    outputs = torch.ops.fastddpm.q_sample.default(
        x0, t.contiguous(), table.contiguous(), contiguous(index), contiguous(flip), pixel_scale, pixel_shift,
        noise, *drawing(seed, sample, step), RETURNS.index(returns), dtype,
    )  # fmt: skip
    return outputs[0] if returns == "x_t" else (outputs[0], outputs[1])


@register_fake("q_sample")
def _(x0: Tensor, t: Tensor, table: Tensor, index: Tensor | None, *args: Any) -> list[Tensor]:
    *_, returns, dtype = args
    batch = x0.shape[0] if index is None else index.shape[0]
    return [like_in_order(x0, (batch, *x0.shape[1:]), dtype) for _ in range(1 if returns == 0 else 2)]
