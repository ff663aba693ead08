"""diffusion_loss in plain PyTorch: the specification of every implementation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import philox

LEAST_PROBABILITY = 1e-12


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
    """Returns the loss [], that of each sample [B], and d (gradient_scale loss) / d pred unless gradient_scale is None.

    Arithmetic in float32 (float64 for a float64 prediction); one rounding of the gradient.
    """
    dtype = torch.float64 if pred.dtype == torch.float64 else torch.float32
    batch, channels = pred.shape[0], pred.shape[1] if vlb is None else pred.shape[1] // 2
    shape = (batch, channels, *pred.shape[2:])

    clean = None
    if x0 is not None:
        clean = x0 if index is None else x0[index]
        if flip is not None:
            clean = torch.where(flip.reshape(-1, 1, 1, 1), clean.flip(3), clean)
        clean = clean.to(dtype) * pixel_scale + pixel_shift
    if target is not None:
        wanted = target.to(dtype)
    elif objective == "x0":
        assert clean is not None
        wanted = clean
    else:
        assert seed is not None and sample is not None and step is not None
        wanted = philox.normal(shape, seed=seed, sample=sample, step=step, stream=philox.TRAINING_NOISE, dtype=dtype)
        if objective == "v":
            assert table is not None and clean is not None
            signal, sigma = table.to(dtype)[t].reshape(-1, 2, 1, 1, 1).unbind(1)
            wanted = signal * wanted - sigma * clean

    def weighted(a: Tensor, w: Tensor | float) -> Tensor:  # a [B, C, H, W]; w [B], [] or a number
        return a * (w.to(dtype).reshape(-1, 1, 1, 1) if isinstance(w, Tensor) else w)

    difference = pred[:, :channels].to(dtype) - wanted
    weights = 1.0 if weight is None else weight
    terms, slopes = weighted(difference.square(), weights), [weighted(2 * difference, weights)]
    if vlb is not None:
        assert clean is not None
        bits, slope = _vlb_bits(pred[:, channels:].to(dtype), difference, clean, t, vlb.to(dtype)[t], levels)
        terms = terms + weighted(bits, vlb_weight)
        slopes.append(weighted(slope, vlb_weight))
    per_sample = terms.mean(dim=(1, 2, 3))
    gradient = None
    if gradient_scale is not None:
        layout = torch.contiguous_format if pred.is_contiguous() else torch.channels_last
        gradient = torch.cat(slopes, dim=1) * (gradient_scale / max(math.prod(shape), 1))
        gradient = gradient.to(pred.dtype).contiguous(memory_format=layout)
    return per_sample.mean(), per_sample, gradient


def _vlb_bits(
    v: Tensor, difference: Tensor, clean: Tensor, t: Tensor, rows: Tensor, levels: int
) -> tuple[Tensor, Tensor]:
    """The term of the bound in bits per element, and its derivative with respect to v; the mean is taken as given."""
    mean_slope, logvar_min, logvar_max, logvar_q = rows.reshape(-1, 4, 1, 1, 1).unbind(1)
    fraction = (v + 1) / 2
    logvar = fraction * logvar_max + (1 - fraction) * logvar_min
    mean_error = mean_slope * difference  # mu_theta - mu_q; at t = 0 it is mu_theta - x_0

    scaled = mean_error.square() * torch.exp(-logvar)
    ratio = torch.exp(logvar_q - logvar)
    kl = 0.5 * (torch.expm1(logvar_q - logvar) - (logvar_q - logvar) + scaled)
    kl_slope = 0.5 * (1 - ratio - scaled)  # with respect to logvar

    half_bin = 1 / (levels - 1)
    inverse_std = torch.exp(-0.5 * logvar)
    upper, lower = (half_bin - mean_error) * inverse_std, (-half_bin - mean_error) * inverse_std
    upper = torch.where(clean > 1 - half_bin, math.inf, upper)
    lower = torch.where(clean < -1 + half_bin, -math.inf, lower)
    probability = _normal_between(lower, upper)
    nll = -torch.log(probability.clamp(min=LEAST_PROBABILITY))
    nll_slope = 0.5 * (_x_phi(upper) - _x_phi(lower)) / probability
    nll_slope = torch.where(probability > LEAST_PROBABILITY, nll_slope, 0.0)

    first = (t == 0).reshape(-1, 1, 1, 1)
    nats, slope = torch.where(first, nll, kl), torch.where(first, nll_slope, kl_slope) * (logvar_max - logvar_min) / 2
    return nats / math.log(2), slope / math.log(2)


def _normal_between(lower: Tensor, upper: Tensor) -> Tensor:
    """P(lower < Z < upper) for a standard normal Z; both tails are taken on the negative side, without cancelling."""
    flip = lower > 0
    a, b = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    return 0.5 * (torch.erfc(-b / math.sqrt(2)) - torch.erfc(-a / math.sqrt(2)))


def _x_phi(x: Tensor) -> Tensor:
    """x phi(x), which is 0 at infinity."""
    finite = x.clamp(-1e4, 1e4)
    return finite * torch.exp(-0.5 * finite.square()) / math.sqrt(2 * math.pi)
