"""The training loss of diffusion, value and gradient in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._checks import (
    FLOATS,
    INTEGER,
    PIXELS,
    WIDE,
    check_draw,
    check_image,
    check_image_like,
    check_rows,
    check_values,
)
from ..._dispatch import Op, needs_gradient, once_differentiable, own
from . import reference

OP = Op(__package__, reference)
OBJECTIVES = ("eps", "x0", "v")


class _DiffusionLoss(torch.autograd.Function):
    """The gradient is made in forward; the upstream gradient, a scalar on the device, multiplies in.

    The gradient of the mean over n elements is about 1 / n, and float16 ends at 6e-8. So that of 2^k loss is kept, with
    2^k the power of two above n: no digit is lost, and none again where the upstream gradient is a power of two.
    """

    @staticmethod
    def forward(ctx: Any, pred: Tensor, t: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        ctx.kept_scale = 2.0 ** pred.numel().bit_length()
        loss, per_sample, gradient = _forward(pred, t, options, ctx.kept_scale)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(per_sample)
        return own(loss), per_sample

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        gradient: Tensor = ctx.saved_tensors[0]
        scaled = gradient.to(upstream.dtype) * (upstream / ctx.kept_scale)
        return scaled.to(gradient.dtype), None, None


def diffusion_loss(
    pred: Tensor,
    t: Tensor,
    *,
    target: Tensor | None = None,
    objective: str = "eps",
    table: Tensor | None = None,
    x0: Tensor | None = None,
    index: Tensor | None = None,
    flip: Tensor | None = None,
    pixel_scale: float = 2 / 255,
    pixel_shift: float = -1.0,
    seed: Tensor | int | None = None,
    sample: Tensor | None = None,
    step: Tensor | int | None = None,
    weight: Tensor | None = None,
    vlb: Tensor | None = None,
    vlb_weight: Tensor | float = 0.0,
    levels: int = 256,
) -> tuple[Tensor, Tensor]:
    """Weighted squared error of a prediction, with the term of the variational bound for a learned variance.

    loss = mean_b (weight_b mean_chw (pred - target)^2 + vlb_weight_b L_b)  (Ho et al. 2020, eq. 14; Nichol and Dhariwal
    2021, eq. 16). L_b is, in bits per element, KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0 and -log2 of the
    discretised Gaussian decoder for t = 0. Its gradient reaches the variance alone: the mean is taken as given.

    Args:
        pred: output of the network [B, C, H, W], dense in NCHW or NHWC order; [B, 2C, H, W] with ``vlb``, second half v
            in about [-1, 1].
        t: int64 [B], values in [0, T); not checked, since that would stop the device.
        target: what pred is compared with [B, C, H, W]. Otherwise it is made again as q_sample made it:
        objective: "eps" (the noise is drawn again), "x0" (needs x0), "v" (needs both, and table).
        table: [T, 2], float32 or float64: sqrt(abar_t) and sqrt(1 - abar_t).
        x0, index, flip, pixel_scale, pixel_shift: the images, as given to q_sample. Needed for "x0", "v" and ``vlb``.
        seed, sample, step: where q_sample drew the noise: int or int64 [] / int64 [B] / int or int64 [].
        weight: float [B]; None is 1.
        vlb: [T, 4], float32 or float64: d mu / d pred (so that mu_theta - mu_q = vlb[t, 0] (pred - target)), the
            log-variance at v = -1 and at v = 1, log-variance of q. That of p is f max + (1 - f) min, f = (v + 1) / 2.
        vlb_weight: a number, or float [B] or []; T / 1000 makes the hybrid loss.
        levels: grey levels of the decoder, >= 2.

    Returns: the loss [], and the loss of each sample [B] (detached). Float32, or float64 for float64 pred. The loss of
        an empty batch is nan, as is any mean of nothing.

    Raises:
        ValueError: a shape, stride, device or option that does not fit; a missing input; a target or a weight that
            requires a gradient, since only pred receives one.
        TypeError: a dtype.
        RuntimeError: (from autograd) the gradient of the gradient is asked for.

    Numerics: float32 arithmetic (float64 for float64 pred); a decoder probability below 1e-12 counts as 1e-12; the
    gradient is rounded once to the dtype of pred, and once more where the upstream gradient is no power of two;
    deterministic.
    """
    check_image("diffusion_loss", "pred", pred)
    b, c, h, w = pred.shape
    if vlb is not None:
        if c % 2:
            raise ValueError(
                f"diffusion_loss: expected pred with 2C channels for vlb, got {c}; "
                f"give the network learned_variance=True"
            )
        c //= 2
        check_rows("diffusion_loss", "vlb", vlb, pred, WIDE, 4)
    check_values("diffusion_loss", "t", t, pred, INTEGER, (b,))
    if levels < 2:
        raise ValueError(f"diffusion_loss: expected levels >= 2, got {levels}; images of 8 bits have 256")
    if objective not in OBJECTIVES:
        raise ValueError(
            f"diffusion_loss: expected objective to be one of {', '.join(OBJECTIVES)}, got {objective!r}; choose one"
        )
    if target is not None:
        check_image_like("diffusion_loss", "target", target, pred, (b, c, h, w))
    elif objective != "x0":
        check_draw("diffusion_loss", b, pred, seed, sample, step)
    if target is None and objective == "v" and table is None:
        raise ValueError("diffusion_loss: expected table for objective 'v', got None; pass the table given to q_sample")
    if x0 is None and (vlb is not None or (target is None and objective != "eps")):
        what = "vlb" if vlb is not None else f"objective {objective!r}"
        raise ValueError(f"diffusion_loss: expected x0 for {what}, got None; pass the images")
    if x0 is not None:
        rows = b if index is None or not isinstance(x0, Tensor) else x0.shape[0]
        check_image_like("diffusion_loss", "x0", x0, pred, (rows, c, h, w), dtypes=PIXELS)
    if index is not None:
        check_values("diffusion_loss", "index", index, pred, INTEGER, (b,))
    if flip is not None:
        check_values("diffusion_loss", "flip", flip, pred, (torch.bool,), (b,))
    if table is not None:
        check_rows("diffusion_loss", "table", table, pred, WIDE, 2)
    if weight is not None:
        check_values("diffusion_loss", "weight", weight, pred, FLOATS, (b,))
    if isinstance(vlb_weight, Tensor):
        check_values("diffusion_loss", "vlb_weight", vlb_weight, pred, FLOATS, (b,), ())
    inputs = dict(target=target, table=table, x0=x0, weight=weight, vlb=vlb, vlb_weight=vlb_weight)
    if torch.is_grad_enabled():
        for name, x in inputs.items():
            if isinstance(x, Tensor) and x.requires_grad:
                raise ValueError(
                    f"diffusion_loss: expected {name} without gradient, got requires_grad=True; "
                    f"call .detach() on it: only pred receives a gradient"
                )

    options: dict[str, Any] = dict(
        inputs, objective=objective, index=index, flip=flip, pixel_scale=pixel_scale, pixel_shift=pixel_shift,
        seed=seed, sample=sample, step=step, levels=levels,
    )  # fmt: skip
    if needs_gradient(pred):
        result: tuple[Tensor, Tensor] = _DiffusionLoss.apply(pred, t, options)  # type: ignore[no-untyped-call]
        return result
    loss, per_sample, _ = _forward(pred, t, options, None)
    return loss, per_sample


def _forward(pred: Tensor, t: Tensor, options: dict[str, Any], gradient_scale: float | None) -> Any:
    """The loss, that of each sample and, with a gradient_scale, d (gradient_scale loss) / d pred."""
    arguments = dict(pred=pred, t=t, gradient_scale=gradient_scale, **options)
    return OP.choose(pred, arguments).forward(**arguments)
