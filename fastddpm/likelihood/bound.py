"""The terms of the bound -log p(x_0) <= L_T + sum_{t>1} L_{t-1} + L_0 (Ho et al. 2020, eq. 5), at one draw of x_t."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..diffusion import (
    GaussianDiffusion,
    discretized_gaussian_log_likelihood,
    normal_kl,
    p_mean_variance,
    q_posterior,
    q_sample,
)
from ..prediction import convert


class BoundTerms(NamedTuple):
    """One term of the bound for each sample, with the errors of the prediction behind it; each [B].

    Attributes:
        nats: the term, nats per dimension.
        eps_mse: mean squared error of the network's prediction, turned into eps; what training with eps minimises.
        x0_mse: mean squared error of the x_0 that the term was computed with: clipped, where the configuration says so.
    """

    nats: Tensor
    eps_mse: Tensor
    x0_mse: Tensor


def vlb_terms(
    diffusion: GaussianDiffusion, x0: Tensor, t: Tensor, noise: Tensor, labels: Tensor | None = None
) -> BoundTerms:
    """One term of the bound for each sample, at x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps.

    t > 0: KL(q(x_{t-1} | x_t, x_0) || p_theta(x_{t-1} | x_t)).  t = 0: L_0 = -log p_theta(x_0 | x_1), the discretised
    Gaussian decoder of ``config.levels`` grey levels (Ho et al. 2020, eq. 5 and 13). The mean over eps of the sum over
    t is the part of the bound that depends on the network; `fastddpm.diffusion.prior_kl` is the rest.

    Args:
        diffusion: the network with its schedule; any prediction, any variance, x_0 clipped as configured.
        x0: [B, C, H, W] in [-1, 1], on the grid of ``config.levels`` values.
        t: int64 [B] in [0, T).
        noise: eps [B, C, H, W].
        labels: int64 [B], for a network with classes; None is no class.

    Returns: `BoundTerms`.

    Numerics: in the dtype of x0, float32 or float64, whatever the network computes in.
    """
    config, schedule = diffusion.config, diffusion.schedule
    x_t = q_sample(x0, t, noise, schedule)
    out = diffusion.predict(x_t, t, labels)
    mean, log_variance, pred_x0 = p_mean_variance(
        out, x_t, t, schedule, config.prediction, config.variance, config.clip_denoised
    )
    mean_q, _, log_variance_q = q_posterior(x0, x_t, t, schedule)
    kl = normal_kl(mean_q, log_variance_q, mean, log_variance)
    decoder = -discretized_gaussian_log_likelihood(x0, mean, log_variance, config.levels)
    nats = torch.where(t.reshape(-1, 1, 1, 1) == 0, decoder, kl)
    pred_eps = convert(out[:, : x0.shape[1]], x_t, t, schedule, config.prediction, "eps")
    return BoundTerms(
        nats=nats.flatten(1).mean(1),
        eps_mse=(pred_eps - noise).square().flatten(1).mean(1),
        x0_mse=(pred_x0 - x0).square().flatten(1).mean(1),
    )


def vlb_term(
    diffusion: GaussianDiffusion, x0: Tensor, t: Tensor, noise: Tensor, labels: Tensor | None = None
) -> Tensor:
    """The term of the bound alone, nats per dimension [B]. See `vlb_terms`."""
    return vlb_terms(diffusion, x0, t, noise, labels).nats
