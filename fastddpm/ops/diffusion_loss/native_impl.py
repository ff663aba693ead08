"""diffusion_loss by the kernels of csrc/diffusion_loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..native_common import contiguous, drawing, like_in_order, reason_against, register_fake

OBJECTIVES = ("eps", "x0", "v")  # as csrc/diffusion_loss numbers them


def unsupported(*, pred: Tensor, **_: Any) -> str | None:
    """Why these kernels cannot run, or None."""
    return reason_against(pred)


def forward(
    pred: Tensor,
    t: Tensor,
    *,
    target: Tensor | None,
    objective: str,
    table: Tensor | None,
    x0: Tensor | None,
    index: Tensor | None,
    flip: Tensor | None,
    pixel_scale: float,
    pixel_shift: float,
    seed: Tensor | int | None,
    sample: Tensor | None,
    step: Tensor | int | None,
    weight: Tensor | None,
    vlb: Tensor | None,
    vlb_weight: Tensor | float,
    levels: int,
    gradient_scale: float | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the loss [], that of each sample [B] and, with a gradient_scale, d (gradient_scale loss) / d pred."""
    weights = (1.0, vlb_weight.contiguous()) if isinstance(vlb_weight, Tensor) else (float(vlb_weight), None)
    loss, per_sample, *gradient = torch.ops.fastddpm.diffusion_loss.default(
        pred, t.contiguous(), target, OBJECTIVES.index(objective), contiguous(table), x0, contiguous(index),
        contiguous(flip), pixel_scale, pixel_shift, *drawing(seed, sample, step), contiguous(weight), contiguous(vlb),
        *weights, levels, gradient_scale,
    )  # fmt: skip
    return loss, per_sample, gradient[0] if gradient else None


@register_fake("diffusion_loss")
def _(pred: Tensor, *args: Any) -> list[Tensor]:
    outputs = [pred.new_empty(shape, dtype=torch.float32) for shape in ((), (pred.shape[0],))]
    return outputs if args[-1] is None else [*outputs, like_in_order(pred)]
