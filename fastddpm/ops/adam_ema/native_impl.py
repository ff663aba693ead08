"""adam_ema by the kernels of csrc/adam_ema."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..native_common import float_or_tensor, reason_against, register_fake


def unsupported(*, params: list[Tensor], **_: Any) -> str | None:
    """Why these kernels cannot run, or None."""
    return reason_against(params[0])


def forward(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    *,
    step: Tensor,
    lr: Tensor | float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    max_grad_norm: float | None,
    ema: list[Tensor] | None,
    ema_decay: Tensor | float | None,
    mirror: list[Tensor] | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> Tensor:
    """See the interface."""
    ema, mirror = ema or [], mirror or []
    norm: Tensor = torch.ops.fastddpm.adam_ema_.default(
        params, grads, exp_avg, exp_avg_sq, step, *float_or_tensor(lr), *betas, eps, weight_decay, max_grad_norm,
        ema, *float_or_tensor(1.0 if ema_decay is None else ema_decay), mirror, grad_scale, found_inf,
    )  # fmt: skip
    if not torch.compiler.is_compiling():  # autograd is to know what was written over, as after any op in place
        scalars = [step] if found_inf is None else [step, found_inf]
        torch.autograd.graph.increment_version([*params, *exp_avg, *exp_avg_sq, *ema, *mirror, *scalars])
    return norm


@register_fake("adam_ema_")
def _(params: list[Tensor], *args: Any) -> Tensor:
    return params[0].new_empty(())
