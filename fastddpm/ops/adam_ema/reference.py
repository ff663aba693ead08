"""adam_ema in plain PyTorch: the specification of every implementation."""

from __future__ import annotations

import torch
from torch import Tensor


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
    """See the interface. Numbers in float64; tensors in the dtype of the parameters, a gradient converted to it."""
    dtype, (beta1, beta2) = params[0].dtype, betas
    norm: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=dtype) for g in grads]))
    factor = torch.ones_like(norm) if grad_scale is None else 1 / grad_scale.to(dtype)
    norm = norm * factor
    if max_grad_norm is not None:
        factor = factor * (max_grad_norm / (norm + 1e-6)).clamp(max=1)

    # Where the step is skipped, every weight below is 0: g comes in as 0, and p, m, v and the average add nothing.
    valid = torch.isfinite(norm)
    if found_inf is not None:
        valid = valid & (found_inf == 0)
        found_inf.copy_(~valid)
    factor = torch.where(valid, factor, 0)
    once = valid.double()
    count = step + 1
    weight1, weight2 = (once * (1 - beta1)).to(dtype), (once * (1 - beta2)).to(dtype)
    rate = (once * lr / (1 - beta1 ** count.double())).to(dtype)
    shrink = (1 - once * lr * weight_decay).to(dtype)
    root = (1 - beta2 ** count.double()).sqrt().to(dtype)

    for i, (p, m, v) in enumerate(zip(params, exp_avg, exp_avg_sq, strict=True)):
        g = (grads[i].to(dtype) * factor).nan_to_num_(nan=0.0)  # 0 * inf
        m.lerp_(g, weight1)
        v.lerp_(g.square_(), weight2)
        denominator = v.sqrt().div_(root).add_(eps)
        p.mul_(shrink).sub_((m / denominator).mul_(rate))
        if ema is not None:
            assert ema_decay is not None
            ema[i].lerp_(p, (once * (1 - ema_decay)).to(dtype))
        if mirror is not None:
            mirror[i].copy_(torch.where(valid, p.to(mirror[i].dtype), mirror[i]))
    step += valid
    return norm
