"""solver_step by the kernels of csrc/solver_step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._checks import is_nhwc
from ..native_common import contiguous, float_or_tensor, like_in_order, number_or_tensor, reason_against, register_fake


def unsupported(*, x: Tensor, **_: Any) -> str | None:
    """Why these kernels cannot run, or None."""
    return reason_against(x)


def forward(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    step: Tensor | int,
    *,
    pred_prev: Tensor | None,
    out_uncond: Tensor | None,
    guidance_scale: Tensor | float,
    clamp: Tensor | float | None,
    noise: Tensor | None,
    seed: Tensor | int | None,
    sample: Tensor | None,
    mask: Tensor | None,
    known: Tensor | None,
    known_table: Tensor | None,
    known_noise: Tensor | None,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """See the interface."""
    if mask is not None and not is_nhwc(mask):
        mask = mask.contiguous()
    bound, bounds = float_or_tensor(clamp)
    rows = None if seed is None else contiguous(sample)  # without them nothing is drawn
    options = (
        out_uncond, *float_or_tensor(guidance_scale), bound, contiguous(bounds), noise,
        *number_or_tensor(seed), rows, mask, known, contiguous(known_table), known_noise,
    )  # fmt: skip
    where = (out, table.contiguous(), *number_or_tensor(step))
    if inplace:
        pred = like_in_order(x) if pred_prev is None else pred_prev
        torch.ops.fastddpm.solver_step_.default(x, pred, pred_prev is not None, *where, *options)
        return x, pred
    x_next, pred = torch.ops.fastddpm.solver_step.default(x, *where, pred_prev, *options)
    return x_next, pred


@register_fake("solver_step")
def _(x: Tensor, *args: Any) -> list[Tensor]:
    return [like_in_order(x), like_in_order(x)]


@register_fake("solver_step_")
def _(x: Tensor, *args: Any) -> None:
    return None
