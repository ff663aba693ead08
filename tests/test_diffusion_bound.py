"""B1 of the theory: the decoder, the KL terms and their sum, against integrals and a model in which all is exact."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastddpm.diffusion import (
    LEAST_PROBABILITY,
    GaussianDiffusion,
    discretized_gaussian_log_likelihood,
    normal_kl,
    p_mean_variance,
    prior_kl,
)
from fastddpm.likelihood import vlb_term, vlb_terms
from fastddpm.prediction import convert
from tests.likelihood.networks import expected_terms, gaussian_model, small_diffusion
from tests.tolerance import assert_equal_to_rounding

F64 = torch.float64
EPS = torch.finfo(F64).eps


def grid(levels: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.arange(levels, dtype=dtype) * (2 / (levels - 1)) - 1


def density(x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    return torch.exp(-0.5 * ((x - mean) / deviation) ** 2) / (deviation * math.sqrt(2 * math.pi))


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_of_the_decoder_sum_to_one(levels: int, dtype: torch.dtype) -> None:
    mean = torch.tensor([-1.7, -1.0, -0.31, 0.0, 0.5, 0.996, 1.0, 2.0], dtype=dtype).reshape(-1, 1, 1)
    deviation = torch.tensor([1e-4, 3e-3, 0.05, 0.4, 1.0, 20.0], dtype=dtype).reshape(-1, 1)
    log_p = discretized_gaussian_log_likelihood(grid(levels, dtype), mean, 2 * deviation.log(), levels)
    # an improbable level counts as 1e-12; the two sides of an edge differ by the rounding of x + h - mean, over sigma
    rounding = torch.finfo(dtype).eps * (8 * levels + 8 / deviation).squeeze(-1)
    assert ((log_p.exp().sum(-1) - 1).abs() <= levels * LEAST_PROBABILITY + rounding).all()


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_decoder_is_the_integral_over_the_bin(levels: int) -> None:
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(40))
    half = 1 / (levels - 1)
    x = grid(levels)
    deviation = torch.tensor([0.6, 2.0], dtype=F64).reshape(-1, 1, 1) * half * (1 if levels > 2 else 0.2)
    mean = torch.linspace(-0.9, 0.9, 5, dtype=F64).reshape(-1, 1)
    inside = (weights * half * density(x[..., None] + half * nodes, mean[..., None], deviation[..., None])).sum(-1)
    p = discretized_gaussian_log_likelihood(x, mean, 2 * deviation.log(), levels).exp()
    rounding = 16 + 8 / half  # of (x + h - mean) / sigma, with sigma in proportion to h
    assert_equal_to_rounding(p[..., 1:-1], inside[..., 1:-1].clamp(min=LEAST_PROBABILITY), ulps=rounding, scale=1)
    # the outermost levels take what is left on their side of the range
    below = torch.special.ndtr((-1 + half - mean) / deviation)
    above = torch.special.ndtr((mean - 1 + half) / deviation)
    for probability, tail in ((p[..., :1], below), (p[..., -1:], above)):
        assert_equal_to_rounding(probability, tail.clamp(min=LEAST_PROBABILITY), ulps=rounding, scale=1)


def test_decoder_is_symmetric_and_has_a_floor() -> None:
    x, mean = grid(17), torch.tensor(0.3, dtype=F64)
    log_variance = torch.tensor(-5.0, dtype=F64)
    p = discretized_gaussian_log_likelihood(x, mean, log_variance, 17)
    assert_equal_to_rounding(p, discretized_gaussian_log_likelihood(-x, -mean, log_variance, 17), ulps=64)
    tiny = discretized_gaussian_log_likelihood(x, mean, torch.tensor(math.log(1e-20), dtype=F64), 17)
    assert_equal_to_rounding(tiny[0], math.log(1e-12))
    with pytest.raises(ValueError, match="expected levels >= 2, got 1; images of 8 bits have 256"):
        discretized_gaussian_log_likelihood(x, mean, log_variance, 1)


def test_kl_against_numerical_integration() -> None:
    x = torch.linspace(-40, 40, 400_001, dtype=F64)
    for mean1, deviation1, mean2, deviation2 in ((0.3, 0.5, -0.4, 1.1), (2.0, 1.5, 2.0, 1.2), (-1.0, 0.9, 0.5, 0.95)):
        m1, s1, m2, s2 = (torch.tensor(v, dtype=F64) for v in (mean1, deviation1, mean2, deviation2))
        log_ratio = -0.5 * ((x - m1) / s1) ** 2 - s1.log() + 0.5 * ((x - m2) / s2) ** 2 + s2.log()
        # the trapezoid rule is exact to rounding for what is smooth and vanishes at both ends
        integral = torch.trapezoid(density(x, m1, s1) * log_ratio, x)
        assert_equal_to_rounding(normal_kl(m1, 2 * s1.log(), m2, 2 * s2.log()), integral, ulps=2000)


def test_kl_of_nearly_equal_variances_does_not_cancel() -> None:
    # (e^d - 1 - d) / 2 = d^2 / 4 + d^3 / 12 + .. for log-variances d apart: e^d in float32 would lose d^2 = 1e-10
    d = torch.tensor([-1e-5, 1e-4, -3e-3])
    exact = d.double() ** 2 / 4 + d.double() ** 3 / 12 + d.double() ** 4 / 48
    assert ((normal_kl(torch.zeros(3), d, 0.0, 0.0) - exact).abs() <= torch.finfo(torch.float32).eps * d.abs()).all()


def reverse_step(diffusion: GaussianDiffusion) -> tuple[Tensor, Tensor, Tensor]:
    """p(x_{t-1} | x_t) = N(slope x_t + offset, variance): float64 [T] each."""
    t = torch.arange(diffusion.num_timesteps)
    at0, at1 = (diffusion.p_mean_variance(torch.full((len(t), 1, 1, 1), v, dtype=F64), t) for v in (0.0, 1.0))
    return (at1[0] - at0[0]).flatten().detach(), at0[0].flatten().detach(), at0[1].exp().flatten().detach()


def joint_of_the_model(diffusion: GaussianDiffusion) -> tuple[Tensor, Tensor]:
    """Mean and covariance of (x_0, .., x_T) under p_theta, from x_T ~ N(0, 1) and the reverse steps."""
    slope, offset, variance = reverse_step(diffusion)
    size = len(slope) + 1
    step = torch.eye(size, dtype=F64) - torch.diag(slope, 1)
    inverse = torch.linalg.inv(step)
    covariance = inverse @ torch.diag(torch.cat([variance, torch.ones(1, dtype=F64)])) @ inverse.T
    return inverse @ torch.cat([offset, torch.zeros(1, dtype=F64)]), covariance


def forward_given_x0(diffusion: GaussianDiffusion, x0: float) -> tuple[Tensor, Tensor]:
    """Mean and covariance of (x_1, .., x_T) under q( | x_0), from the betas."""
    betas = diffusion.schedule.betas
    step = torch.eye(len(betas), dtype=F64) - torch.diag((1 - betas[1:]).sqrt(), -1)
    inverse = torch.linalg.inv(step)
    start = torch.zeros(len(betas), dtype=F64)
    start[0] = (1 - betas[0]).sqrt() * x0
    return inverse @ start, inverse @ torch.diag(betas) @ inverse.T


def kl_of_gaussians(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    difference = mean2 - mean1
    quadratic = difference @ torch.linalg.solve(cov2, difference)
    trace = torch.linalg.solve(cov2, cov1).trace()
    return 0.5 * (trace + quadratic - len(mean1) + torch.logdet(cov2) - torch.logdet(cov1))


def continuous_decoder(diffusion: GaussianDiffusion, x0: float) -> Tensor:
    """E[-log p(x_0 | x_1)] with the density in place of the probability of a level."""
    slope, offset, variance = (column[0] for column in reverse_step(diffusion))
    signal, sigma = diffusion.schedule.signal_sigma[0]
    squared = (x0 - slope * signal * x0 - offset) ** 2 + (slope * sigma) ** 2
    return 0.5 * (torch.log(2 * math.pi * variance) + squared / variance)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "unit", "learned", "learned_range"])
@pytest.mark.parametrize("x0", [-0.6, 0.2])
def test_slack_of_the_bound_in_a_linear_gaussian_model(variance: str, x0: float) -> None:
    diffusion = gaussian_model(variance)
    # KL terms are quadratic in eps, so few nodes are exact
    terms = expected_terms(diffusion, x0, nodes=4)
    prior = prior_kl(torch.tensor(x0, dtype=F64), diffusion.schedule)
    bound = prior + terms[1:].sum() + continuous_decoder(diffusion, x0)

    mean, covariance = joint_of_the_model(diffusion)
    variance0, across, later = covariance[0, 0], covariance[1:, 0], covariance[1:, 1:]
    surprise = 0.5 * (torch.log(2 * math.pi * variance0) + (x0 - mean[0]) ** 2 / variance0)
    posterior_mean = mean[1:] + across / variance0 * (x0 - mean[0])
    posterior = later - torch.outer(across, across) / variance0
    slack = kl_of_gaussians(*forward_given_x0(diffusion, x0), posterior_mean, posterior)
    assert slack > 0.01
    assert_equal_to_rounding(bound - surprise, slack, ulps=2000, scale=bound.abs() + 1)


def test_decoder_of_many_levels_is_the_density_times_the_width_of_a_bin() -> None:
    errors = []
    for levels in (33, 65, 129):
        diffusion = gaussian_model("fixed_large", levels=levels)
        discrete = expected_terms(diffusion, 0.25, nodes=60)[0]
        errors.append(float(discrete - (continuous_decoder(diffusion, 0.25) - math.log(2 / (levels - 1)))))
    for coarse, fine in itertools.pairwise(errors):
        assert 3.9 < coarse / fine < 4.1  # the rest is of second order in the width


@pytest.mark.parametrize("variance", ["fixed_small", "learned"])
def test_the_bound_is_a_bound_for_every_level(variance: str) -> None:
    levels = 17
    diffusion = gaussian_model(variance, levels=levels)
    mean, covariance = joint_of_the_model(diffusion)
    bounds = []
    for x in grid(levels):
        prior = prior_kl(x, diffusion.schedule)
        bounds.append(float(prior + expected_terms(diffusion, float(x), nodes=60).sum()))
        # p(x_0) of the discrete model is exact, too: its x_0 before the cut is a Gaussian
        exact = discretized_gaussian_log_likelihood(x, mean[0], covariance[0, 0].log(), levels)
        assert bounds[-1] >= -float(exact)
    # .. so what the bounds leave of all levels is at most 1, and nearly that for a model that is not far off
    assert 0.3 < sum(math.exp(-b) for b in bounds) < 1


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("clip", [True, False])
def test_every_kind_of_prediction_gives_the_same_terms(variance: str, clip: bool) -> None:
    steps = 6
    generator = torch.Generator().manual_seed(2)
    x0 = torch.rand(steps, 1, 4, 4, generator=generator, dtype=F64) * 2 - 1
    noise = torch.randn(x0.shape, generator=generator, dtype=F64)
    t = torch.arange(steps)
    options: dict[str, Any] = dict(variance=variance, clip_denoised=clip)
    if variance.startswith("learned"):
        options["loss"] = "hybrid"
    source = small_diffusion(steps, **options).double()
    expected = vlb_terms(source, x0, t, noise)
    for kind in ("eps", "v", "mu"):
        diffusion = small_diffusion(steps, prediction=kind, **options).double()

        def network(x: Tensor, t: Tensor, kind: str = kind) -> Tensor:
            out = source.model(x, t)
            return torch.cat([convert(out[:, :1], x, t, source.schedule, "x0", kind), out[:, 1:]], dim=1)

        diffusion.model.forward = network
        for name, ours, theirs in zip(expected._fields, vlb_terms(diffusion, x0, t, noise), expected, strict=True):
            assert_equal_to_rounding(ours, theirs, ulps=4000, scale=theirs.abs() + 1e-3)
            assert (ours > 0).all(), name


def test_a_network_that_knows_the_image_pays_for_nothing_but_the_decoder() -> None:
    diffusion = small_diffusion(variance="fixed_small").double()
    x0 = torch.full((6, 1, 4, 4), 0.25, dtype=F64)
    diffusion.model.forward = lambda x, t: x0
    terms = vlb_terms(diffusion, x0, torch.arange(6), torch.randn_like(x0))
    assert (terms.nats[1:] == 0).all() and (terms.x0_mse == 0).all()
    assert (terms.eps_mse <= 64 * EPS).all()
    half, deviation = 1 / 16, diffusion.schedule.posterior_variance[1].sqrt()
    assert_equal_to_rounding(terms.nats[0], -torch.log(torch.erf(half / deviation / math.sqrt(2))), ulps=64)


def test_terms_by_hand() -> None:
    diffusion = gaussian_model("unit", levels=17)
    schedule = diffusion.schedule
    t = torch.tensor([3])
    x0, noise = torch.tensor([[[[0.5]]]], dtype=F64), torch.tensor([[[[-0.7]]]], dtype=F64)
    terms = vlb_terms(diffusion, x0, t, noise)
    abar, alpha = schedule.alphas_cumprod[3], schedule.alphas[3]
    x_t = abar.sqrt() * 0.5 + (1 - abar).sqrt() * -0.7
    pred = 0.5 * x_t + 0.15
    variance = (1 - alpha) * (1 - schedule.alphas_cumprod[2]) / (1 - abar)
    difference = schedule.alphas_cumprod[2].sqrt() * (1 - alpha) / (1 - abar) * (pred - 0.5)
    assert_equal_to_rounding(terms.nats, 0.5 * (variance - 1 - variance.log() + difference**2), ulps=64)
    assert_equal_to_rounding(terms.x0_mse, (pred - 0.5) ** 2, ulps=64)
    assert_equal_to_rounding(terms.eps_mse, ((x_t - abar.sqrt() * pred) / (1 - abar).sqrt() + 0.7) ** 2, ulps=64)
    assert (vlb_term(diffusion, x0, t, noise) == terms.nats).all()


def test_clipping_keeps_the_predicted_image_in_range() -> None:
    x0 = torch.full((1, 1, 1, 1), 1.0, dtype=F64)
    t, noise = torch.tensor([2]), torch.full_like(x0, 4.0)
    for clip in (True, False):
        diffusion = gaussian_model("fixed_small")
        diffusion.config = type(diffusion.config)(**(diffusion.to_dict() | {"clip_denoised": clip}))
        terms = vlb_terms(diffusion, x0, t, noise)
        assert bool(terms.nats == 0) == clip == bool(terms.x0_mse == 0)
        assert terms.eps_mse > 0  # what training sees


@pytest.mark.parametrize("kind", ["x0", "v", "mu"])
def test_zero_terminal_snr_is_finite(kind: str) -> None:
    diffusion = small_diffusion(zero_terminal_snr=True, prediction=kind).double()
    x0 = torch.rand(6, 1, 4, 4, dtype=F64) * 2 - 1
    terms = vlb_terms(diffusion, x0, torch.arange(6), torch.randn_like(x0))
    assert all(term.isfinite().all() for term in terms)
    assert (prior_kl(x0, diffusion.schedule) == 0).all()


def test_p_mean_variance_of_the_module_is_the_function() -> None:
    diffusion = small_diffusion(variance="learned_range", loss="hybrid")
    x_t, t = torch.randn(6, 1, 4, 4), torch.arange(6)
    out = diffusion.predict(x_t, t)
    expected = p_mean_variance(out, x_t, t, diffusion.schedule, "x0", "learned_range", clip=True)
    for ours, theirs in zip(diffusion.p_mean_variance(x_t, t), expected, strict=True):
        assert ours.shape == x_t.shape and (ours == theirs).all()
