"""The Gaussian terms of the bound, as improved-diffusion has them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import diffusion as theory

LEAST_PROBABILITY = 1e-12


def normal_kl(mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float) -> Tensor:
    """KL(N(mean1, e^logvar1) || N(mean2, e^logvar2)) of each element, in nats; what broadcasts may be a number.

    Raises:
        ValueError: no tensor among the four.
    """
    like = next((v for v in (mean1, logvar1, mean2, logvar2) if isinstance(v, Tensor)), None)
    if like is None:
        raise ValueError("normal_kl: expected at least one tensor, got four numbers; wrap one in torch.tensor")
    mean1, logvar1 = (v if isinstance(v, Tensor) else torch.full((), v).to(like) for v in (mean1, logvar1))
    return theory.normal_kl(mean1, logvar1, mean2, logvar2)


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """(1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2: the distribution function of the normal within 3e-4."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """log P(x) of each element under a Gaussian cut into 256 grey levels (Ho et al. 2020, eq. 13), in nats.

    With `approx_standard_normal_cdf`, as the original; `fastddpm.diffusion.discretized_gaussian_log_likelihood` is
    exact. Levels beyond +-0.999 take the whole tail; a probability below 1e-12 counts as 1e-12.

    Args:
        x: [...], on the grid of 256 values from -1 to 1. means, log_scales: mean and log of the deviation, [...].

    Raises:
        ValueError: shapes that differ.
    """
    if not x.shape == means.shape == log_scales.shape:
        raise ValueError(
            "discretized_gaussian_log_likelihood: expected means and log_scales of the shape of x, "
            f"{list(x.shape)}, got {list(means.shape)} and {list(log_scales.shape)}; expand them"
        )
    half_bin, inverse_std = 1 / 255, torch.exp(-log_scales)
    upper = approx_standard_normal_cdf((x - means + half_bin) * inverse_std)
    lower = approx_standard_normal_cdf((x - means - half_bin) * inverse_std)
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return torch.log(probability.clamp(min=LEAST_PROBABILITY))
