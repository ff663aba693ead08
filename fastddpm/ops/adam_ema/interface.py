"""The optimiser step over all parameters: clip, AdamW, moving average and half-precision copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._checks import FLOATS, INTEGER, WIDE, check_device, check_dtype, check_scalar, check_values
from ..._dispatch import Op
from . import reference

OP = Op(__package__, reference)


def adam_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    *,
    step: Tensor,
    lr: Tensor | float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = None,
    ema: Sequence[Tensor] | None = None,
    ema_decay: Tensor | float | None = None,
    mirror: Sequence[Tensor] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Tensor:
    """One step of AdamW on gradients clipped by their global norm, then the moving average of the parameters.

    g = grad / grad_scale;  norm = sqrt(sum of g^2 over all parameters);  g <- g min(1, max_grad_norm / (norm + 1e-6));
    m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2;
    p <- p - lr (weight_decay p + m / (1 - beta1^n) / (sqrt(v / (1 - beta2^n)) + eps)), n = step + 1
    (Loshchilov and Hutter 2019, algorithm 2, the decay multiplied by lr);  ema <- ema_decay ema + (1 - ema_decay) p;
    mirror <- p, rounded;  step <- n.

    Args:
        params: n tensors of any shape, all float32 or all float64, each contiguous or channels_last; written over.
        grads: float; their values are left as they are.
        exp_avg, exp_avg_sq: m and v, in the dtype of params; 0 before the first step; written over.
        step: int64 [], the steps made so far; written over.
        lr: learning rate, a number >= 0 or a float32 or float64 tensor [].
        betas: each in [0, 1). eps: > 0. weight_decay: >= 0.
        max_grad_norm: > 0, or None not to clip.
        ema, ema_decay: the average of the parameters, in their dtype, written over; and its decay in [0, 1], a number
            or a float32 or float64 tensor [] (float64, so that 1 - ema_decay is exact near 1). Both or none.
        mirror: a copy of the parameters in another float dtype, such as bfloat16; written over.
        grad_scale: float32 or float64 [], by which the loss was multiplied; None is 1.
        found_inf: float32 []. Where it is not 0, or where the norm is not finite, the step is skipped: it becomes 1 and
            nothing else changes, ``step`` included. Without it, only the norm decides.

    The tensors of a parameter, its gradient among them, share its shape and strides.

    Returns: norm [], before clipping, in the dtype of params.

    Raises:
        ValueError: a length, shape, stride, device or range that does not fit. TypeError: a dtype.

    Numerics: the arithmetic of a parameter in its own dtype, that of the numbers all share in float64; deterministic.
    No host sync: values of tensors on the device are not checked. Not differentiable.
    """
    params = list(params)
    if not params:
        raise ValueError(
            "adam_ema: expected params with at least one tensor, got none; pass those that have a gradient"
        )
    check_dtype("adam_ema", "params[0]", params[0], *WIDE)
    dtype = params[0].dtype
    lists = {"params": params, "grads": list(grads), "exp_avg": list(exp_avg), "exp_avg_sq": list(exp_avg_sq)}
    if (ema is None) != (ema_decay is None):
        missing = "ema" if ema is None else "ema_decay"
        raise ValueError(f"adam_ema: expected ema and ema_decay together, got no {missing}; pass both or none")
    lists |= {name: list(x) for name, x in (("ema", ema), ("mirror", mirror)) if x is not None}
    _check_lists(lists, dtype)

    check_values("adam_ema", "step", step, params[0], INTEGER, ())
    check_scalar("adam_ema", "lr", lr, params[0], *WIDE)
    if not isinstance(lr, Tensor) and not lr >= 0:
        raise ValueError(f"adam_ema: expected lr >= 0, got {lr}; 2e-4 is usual")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"adam_ema: expected betas in [0, 1), got {betas}; (0.9, 0.999) is usual")
    if not eps > 0:
        raise ValueError(f"adam_ema: expected eps > 0, got {eps}; 1e-8 is usual")
    if not weight_decay >= 0:
        raise ValueError(f"adam_ema: expected weight_decay >= 0, got {weight_decay}; 0 is none")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"adam_ema: expected max_grad_norm > 0, got {max_grad_norm}; None does not clip")
    if ema_decay is not None:
        check_scalar("adam_ema", "ema_decay", ema_decay, params[0], *WIDE)
        if not isinstance(ema_decay, Tensor) and not 0 <= ema_decay <= 1:
            raise ValueError(f"adam_ema: expected ema_decay in [0, 1], got {ema_decay}; 0.9999 is usual")
    if grad_scale is not None:
        check_values("adam_ema", "grad_scale", grad_scale, params[0], WIDE, ())
    if found_inf is not None:
        check_values("adam_ema", "found_inf", found_inf, params[0], (torch.float32,), ())

    four = {name: lists[name] for name in ("params", "grads", "exp_avg", "exp_avg_sq")}
    norm: Tensor = OP.run(params[0], dict(
        four, step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, max_grad_norm=max_grad_norm,
        ema=lists.get("ema"), ema_decay=ema_decay, mirror=lists.get("mirror"), grad_scale=grad_scale,
        found_inf=found_inf,
    ))  # fmt: skip
    return norm


def _check_lists(lists: dict[str, list[Any]], dtype: torch.dtype) -> None:
    """Expect in each list one tensor for each parameter, that lies in memory as the parameter does.

    All tensors of a list are asked for one attribute after the other, which takes a fifth of the time that asking each
    for all of them does. Where one does not fit, `_check_each` finds which.
    """
    params = lists["params"]
    device = params[0].device
    shapes: list[Any] = []
    strides: list[Any] = []
    for name, tensors in lists.items():
        dtypes = FLOATS if name in ("grads", "mirror") else (dtype,)
        if len(tensors) != len(params):
            raise ValueError(
                f"adam_ema: expected {name} with a tensor for each of the {len(params)} params, got {len(tensors)}; "
                f"leave out the parameters that have none"
            )
        fit = _are_floats(tensors, dtypes, device)
        if fit and name == "params":
            fit = False not in [_is_dense(p) for p in params]
            shapes, strides = [p.shape for p in params], [p.stride() for p in params]
        elif fit:
            fit = [x.shape for x in tensors] == shapes and _same_strides([x.stride() for x in tensors], strides, shapes)
        if not fit:
            _check_each(name, tensors, params, dtypes)


def _check_each(name: str, tensors: list[Any], params: list[Tensor], dtypes: tuple[torch.dtype, ...]) -> None:
    """Name the first tensor of a list that does not fit its parameter."""
    for i, (x, p) in enumerate(zip(tensors, params, strict=True)):
        check_dtype("adam_ema", f"{name}[{i}]", x, *dtypes)
        if not _is_dense(p):
            raise ValueError(
                f"adam_ema: expected params[{i}] to be contiguous or channels_last, got strides {list(p.stride())} for "
                f"shape {list(p.shape)}; call .contiguous() on it when it is made"
            )
        if x is not p and not (x.shape == p.shape and _same_strides([x.stride()], [p.stride()], [p.shape])):
            raise ValueError(
                f"adam_ema: expected {name}[{i}] with shape {list(p.shape)} and strides {list(p.stride())}, those of "
                f"params[{i}], got {list(x.shape)} and {list(x.stride())}; make it with torch.zeros_like(params[{i}]), "
                f"or copy it with torch.empty_like(params[{i}]).copy_(it)"
            )
        check_device("adam_ema", params[0], **{f"{name}[{i}]": x})
    raise AssertionError(f"adam_ema: {name} do not fit params, and each of them does")


def _are_floats(tensors: list[Any], dtypes: tuple[torch.dtype, ...], device: torch.device) -> bool:
    """Whether all are tensors of one of these dtypes on this device; by lists, since generators take twice as long."""
    return (
        False not in [isinstance(x, Tensor) for x in tensors]
        and False not in [x.dtype in dtypes for x in tensors]
        and False not in [x.device == device for x in tensors]
    )


def _is_dense(p: Tensor) -> bool:
    return p.is_contiguous() or (p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last))


def _same_strides(strides: list[Any], others: list[Any], shapes: list[Any]) -> bool:
    """Whether the strides of tensors of these shapes are equal, where a stride over one element says nothing."""
    return strides == others or all(
        a == b or all(size == 1 or m == n for size, m, n in zip(shape, a, b, strict=True))
        for a, b, shape in zip(strides, others, shapes, strict=True)
    )
