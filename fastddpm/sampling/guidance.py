"""What may happen between the network and the update: classifier-free guidance and dynamic thresholding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._checks import check_image, check_shape

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x_t [B, C, H, W], t int64 [B], labels int64 [B] or None) -> [B, C, H, W], or 2C channels with a learned variance."""


def guided_output(
    network: Network, x: Tensor, t: Tensor, labels: Tensor | None, null_labels: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The outputs with and without condition, from one call on the batch [x, x] with the labels [labels, null_labels].

    `solver_step` makes out_uncond + w (out - out_uncond) of them (Ho and Salimans 2022, eq. 6, where w counts from 0).

    Args:
        network: see `Network`.
        x: [B, C, H, W]. t: int64 [B]. labels: int64 [B] or None.
        null_labels: int64 [B], the class that stands for no condition. None calls the network on x alone.

    Returns: the pair (out, out_uncond); out_uncond is None without null_labels.

    Raises:
        ValueError: null_labels without labels.
    """
    if null_labels is None:
        return network(x, t, labels), None
    if labels is None:
        raise ValueError("guided_output: expected labels with null_labels, got None; pass the class of each image")
    out = network(torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, null_labels]))
    conditional, unconditional = out.chunk(2)
    return conditional, unconditional


def dynamic_threshold(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    step: Tensor | int,
    ratio: float,
    *,
    out_uncond: Tensor | None = None,
    guidance_scale: Tensor | float = 1.0,
) -> Tensor:
    """The bound s of each sample: a quantile of its |pred|, at least 1 (Saharia et al. 2022, section 2.3).

    Args:
        x, out, table, step, out_uncond, guidance_scale: of the coming step, see `solver_step`.
        ratio: the quantile in (0, 1], linear between neighbours; the paper's figures have 0.995.

    Returns: [B], in the dtype of x.

    Raises:
        ValueError: ratio out of range, or a shape that does not fit.

    Numerics: arithmetic in the dtype of x; deterministic; no host sync.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"dynamic_threshold: expected ratio in (0, 1], got {ratio}; 0.995 is usual")
    pred, _, _ = _prediction("dynamic_threshold", x, out, table, step, out_uncond, guidance_scale)
    return quantile_of_magnitude(pred, ratio).clamp(min=1)


def quantile_of_magnitude(pred: Tensor, ratio: float) -> Tensor:
    """A quantile of |pred| in each sample: [B, ...] to [B], linear between neighbours, of any number of elements."""
    ascending = pred.abs().flatten(1).sort(dim=1).values
    position = ratio * (ascending.shape[1] - 1)
    below = int(position)
    above = min(below + 1, ascending.shape[1] - 1)
    return torch.lerp(ascending[:, below], ascending[:, above], position - below)


def thresholded_output(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    step: Tensor | int,
    bound: Tensor,
    *,
    out_uncond: Tensor | None = None,
    guidance_scale: Tensor | float = 1.0,
) -> Tensor:
    """The output for which `solver_step` predicts clamp(pred, -s, s) / s (Saharia et al. 2022, section 2.3).

    `solver_step` clamps, but does not divide; given this output, and no unconditional one, pred is the one above.

    Args:
        x, out, table, step, out_uncond, guidance_scale: of the coming step, see `solver_step`.
        bound: s [B], see `dynamic_threshold`.

    Returns: shaped like out, in the dtype of x. A second half of channels, the variance, is passed on.

    Raises:
        ValueError: a shape that does not fit.
    """
    check_shape("thresholded_output", "bound", bound, (len(x),))
    pred, k0, k1 = _prediction("thresholded_output", x, out, table, step, out_uncond, guidance_scale)
    s = bound.reshape(-1, 1, 1, 1)
    thresholded = (torch.clamp(pred, -s, s) / s - k0 * x) / k1
    return torch.cat([thresholded, out[:, x.shape[1] :].to(x.dtype)], dim=1)


def _prediction(
    op: str,
    x: Tensor,
    out: Tensor,
    table: Tensor,
    step: Tensor | int,
    out_uncond: Tensor | None,
    guidance_scale: Tensor | float,
) -> tuple[Tensor, Tensor, Tensor]:
    """pred = k0 x + k1 (out_uncond + guidance_scale (out - out_uncond)) before its clamp, and k0, k1."""
    check_image(op, "x", x)
    b, c, h, w = x.shape
    check_shape(op, "out", out, (b, c, h, w), (b, 2 * c, h, w))
    row = table.index_select(0, step.reshape(1)).squeeze(0) if isinstance(step, Tensor) else table[step]
    k0, k1 = row[:2].to(x.dtype).unbind()
    prediction = out[:, :c].to(x.dtype)
    if out_uncond is not None:
        unconditional = out_uncond[:, :c].to(x.dtype)
        prediction = unconditional + guidance_scale * (prediction - unconditional)
    return k0 * x + k1 * prediction, k0, k1
