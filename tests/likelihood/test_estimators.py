"""B2-B5 of the theory: three estimators of the part of the bound with theta, their expectation and their variance."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from fastddpm.diffusion import GaussianDiffusion, discretized_gaussian_log_likelihood, q_posterior, q_sample
from fastddpm.likelihood import (
    EstimatorVariance,
    estimator_variances,
    importance_probabilities,
    pair_estimate,
    posterior_entropy,
    single_estimate,
    trajectory_estimate,
    variance_table,
    vlb_term,
)
from fastddpm.ops import philox
from tests.likelihood.networks import expected_terms, gaussian_model, random_images, small_diffusion
from tests.tolerance import assert_equal_to_rounding

F64 = torch.float64
X0 = 0.25


def pixels(count: int) -> Tensor:
    """One image of one pixel, many times."""
    return torch.full((count, 1, 1, 1), X0, dtype=F64)


def z_score(values: Tensor, expected: Tensor | float) -> float:
    return float((values.mean() - expected) / (values.std() / math.sqrt(len(values))))


def small_images(count: int) -> Tensor:
    return random_images(count).double() / 8 - 1


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "unit", "learned", "learned_range"])
@torch.no_grad()
def test_expectations_are_the_part_of_the_bound_with_theta(variance: str) -> None:
    diffusion = gaussian_model(variance, levels=17)
    x0 = pixels(20_000)
    expected = expected_terms(diffusion, X0, nodes=60).sum()
    entropy = posterior_entropy(diffusion.schedule)
    importance = torch.tensor([0.4, 0.25, 0.15, 0.12, 0.08], dtype=F64)

    whole = trajectory_estimate(diffusion, x0, seed=1)
    assert abs(z_score(whole.value, expected + entropy)) < 5
    assert abs(z_score(whole.value + whole.log_q, expected)) < 5
    assert whole.t is None
    for p in (None, importance):
        pair = pair_estimate(diffusion, x0, seed=2, probabilities=p)
        assert abs(z_score(pair.value, expected + entropy)) < 5
        assert abs(z_score(pair.value + pair.log_q, expected)) < 5
        single = single_estimate(diffusion, x0, seed=3, probabilities=p)
        assert abs(z_score(single.value, expected)) < 5
        assert (single.log_q == 0).all()


@torch.no_grad()
def test_expectations_at_each_step() -> None:
    diffusion = gaussian_model("fixed_large", levels=17)
    x0 = pixels(10_000)
    for i, expected in enumerate(expected_terms(diffusion, X0, nodes=60)):
        t = torch.full((len(x0),), i)
        pair = pair_estimate(diffusion, x0, seed=4, t=t)
        assert pair.t is not None and (pair.t == i).all()
        assert abs(z_score(pair.value + pair.log_q, 5 * expected)) < 5
        assert abs(z_score(single_estimate(diffusion, x0, seed=5, t=t).value, 5 * expected)) < 5


def test_posterior_entropy_by_integration() -> None:
    schedule = gaussian_model("unit").schedule
    x = torch.linspace(-12, 12, 200_001, dtype=F64)
    total = 0.0
    for variance in schedule.posterior_variance[1:]:
        log_density = -0.5 * x**2 / variance - 0.5 * torch.log(2 * math.pi * variance)
        total -= float(torch.trapezoid(log_density.exp() * log_density, x))
    assert_equal_to_rounding(posterior_entropy(schedule), total, ulps=2000)


def pair_of_states(diffusion: GaussianDiffusion, x0: Tensor, t: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """x_{t-1} and x_t of `pair_estimate`, for t > 0."""
    draw = functools.partial(philox.normal, tuple(x0.shape), seed=seed, sample=torch.arange(len(x0)), step=0, dtype=F64)
    x_prev = q_sample(x0, t - 1, draw(stream=philox.TRAINING_NOISE), diffusion.schedule)
    beta = diffusion.schedule.betas[t].reshape(-1, 1, 1, 1)
    return x_prev, (1 - beta).sqrt() * x_prev + beta.sqrt() * draw(stream=philox.SAMPLER_NOISE)


@torch.no_grad()
def test_unit_variance_is_a_squared_distance() -> None:
    diffusion = small_diffusion(variance="unit").double()
    steps, schedule, x0 = diffusion.num_timesteps, diffusion.schedule, small_images(9)
    constant = 0.5 * math.log(2 * math.pi)

    def squared(x_prev: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return (x_prev - diffusion.p_mean_variance(x_t, t)[0]).square().flatten(1).mean(1)

    t = torch.tensor([1, 2, 3, 4, 5, 1, 2, 3, 4])
    pair = pair_estimate(diffusion, x0, seed=6, t=t)
    expected = steps * (0.5 * squared(*pair_of_states(diffusion, x0, t, 6), t) + constant)
    assert_equal_to_rounding(pair.value, expected, ulps=200)

    # the chain, step by step, from the noise that belongs to (sample, draw number * T + t)
    expected, x_prev = torch.zeros(9, dtype=F64), x0
    for i in range(steps):
        t = torch.full((9,), i)
        z = philox.normal(
            tuple(x0.shape), seed=7, sample=torch.arange(9), step=2 * steps + i, stream=philox.TRAINING_NOISE, dtype=F64
        )
        x_t = (1 - schedule.betas[i]).sqrt() * x_prev + schedule.betas[i].sqrt() * z
        if i == 0:
            mean = diffusion.p_mean_variance(x_t, t)[0]
            expected -= discretized_gaussian_log_likelihood(x0, mean, torch.zeros_like(mean), 17).flatten(1).mean(1)
        else:
            expected += 0.5 * squared(x_prev, x_t, t) + constant
        x_prev = x_t
    assert_equal_to_rounding(trajectory_estimate(diffusion, x0, seed=7, step=2).value, expected, ulps=200)


@torch.no_grad()
def test_b5_single_is_the_conditional_expectation_of_pair() -> None:
    diffusion = gaussian_model("fixed_large", levels=17)
    x0 = pixels(40_000)
    for i in range(1, 5):
        t = torch.full((len(x0),), i)
        pair = pair_estimate(diffusion, x0, seed=8, t=t)
        x_prev, x_t = pair_of_states(diffusion, x0, t, seed=8)
        signal, sigma = diffusion.schedule.signal_sigma[i]
        single = 5 * vlb_term(diffusion, x0, t, (x_t - signal * x0) / sigma)  # at the very same x_t
        rest = pair.value + pair.log_q - single
        # a conditional mean leaves a rest that is orthogonal to every function of x_t
        for function in (torch.ones_like(x_t), x_t, x_t**2, torch.sin(3 * x_t)):
            assert abs(z_score(rest * function.flatten(), 0.0)) < 5
        assert rest.std() > 0.01
        # and x_{t-1} given x_t is the posterior
        mean, variance, _ = q_posterior(x0, x_t, t, diffusion.schedule)
        assert abs(z_score((x_prev - mean).flatten(), 0.0)) < 5
        assert abs(z_score(((x_prev - mean) ** 2 / variance).flatten(), 1.0)) < 5


@functools.cache
def rows_of_the_small_network() -> dict[tuple[str, str], EstimatorVariance]:
    rows = estimator_variances(small_diffusion(variance="fixed_small"), small_images(64).float(), draws=100)
    print(variance_table(rows))
    return {(row.name, row.timesteps): row for row in rows}


def test_b5_variances_on_a_small_network() -> None:
    rows = rows_of_the_small_network()
    for timesteps in ("uniform", "importance"):
        assert rows["single", timesteps].variance < rows["pair + log q", timesteps].variance
        for name in ("pair", "pair + log q", "single"):
            assert rows["trajectory + log q", "all"].variance < rows[name, timesteps].variance
            assert rows["trajectory", "all"].variance < rows[name, timesteps].variance
    for name in ("pair + log q", "single"):
        assert rows[name, "importance"].variance < rows[name, "uniform"].variance


def test_variance_of_each_step_is_no_larger_for_single() -> None:
    diffusion = small_diffusion(variance="fixed_large")
    x0 = small_images(1).float().expand(4000, -1, -1, -1)
    with torch.no_grad():
        for i in range(1, 6):
            t = torch.full((len(x0),), i)
            pair, single = (estimate(diffusion, x0, seed=9, t=t) for estimate in (pair_estimate, single_estimate))
            difference = (pair.value + pair.log_q).var() - single.value.var()
            # a variance of n draws has a relative error of about sqrt(2 / n)
            assert difference > 5 * math.sqrt(2 / len(x0)) * single.value.var()


def test_all_estimators_agree_on_the_small_network() -> None:
    diffusion = small_diffusion(variance="fixed_small")
    rows = rows_of_the_small_network()
    entropy = posterior_entropy(diffusion.schedule)
    best = rows["trajectory + log q", "all"]
    for (name, _), row in rows.items():
        shift = entropy if name in ("trajectory", "pair") else 0.0
        error = math.hypot(row.standard_error, best.standard_error)
        assert abs(row.mean - shift - best.mean) < 5 * error
        assert row.network_calls == (6 if name.startswith("trajectory") else 1)
        assert row.variance_per_network_call == row.variance * row.network_calls


def test_variance_table_is_a_table() -> None:
    rows = [
        EstimatorVariance("trajectory", "all", 1.5, 0.25, 0.125, 6),
        EstimatorVariance("single", "importance", 1.25, 0.5, 2.0, 1),
    ]
    head, first, second, unit = variance_table(rows).splitlines()
    assert head.split() == ["estimator", "t", "mean", "variance", "per", "draw", "calls", "variance", "per", "call"]
    assert first.split() == ["trajectory", "all", "1.5000", "+-", "0.2500", "0.125", "6", "0.75"]
    assert second.split() == ["single", "importance", "1.2500", "+-", "0.5000", "2", "1", "2"]
    assert len(head) == len(first) == len(second)
    assert "nats per dimension" in unit


def test_importance_probabilities_follow_the_size_of_the_terms() -> None:
    diffusion = gaussian_model("fixed_large", levels=17)
    p = importance_probabilities(diffusion, pixels(20_000))
    assert p.dtype == F64 and abs(float(p.sum()) - 1) < 1e-12
    moments = torch.empty(5, dtype=F64)
    with torch.no_grad():
        for i in range(5):
            value = single_estimate(diffusion, pixels(20_000), seed=11, t=torch.full((20_000,), i)).value
            moments[i] = value.square().mean().sqrt()
    # a thousandth is uniform, and two samples of 20,000 differ
    assert ((p / (moments / moments.sum()) - 1).abs() < 0.1).all()


def test_draws_belong_to_the_sample_and_the_number_of_the_draw() -> None:
    diffusion = small_diffusion()
    x0, sample = small_images(6).float(), torch.arange(6)
    with torch.no_grad():
        for estimate in (trajectory_estimate, pair_estimate, single_estimate):
            whole = estimate(diffusion, x0, seed=3)
            part = estimate(diffusion, x0[4:], seed=3, sample=sample[4:])
            assert_equal_to_rounding(part.value, whole.value[4:], ulps=64, scale=whole.value.abs().max())
            again = estimate(diffusion, x0, seed=3)
            assert (again.value == whole.value).all() and (again.log_q == whole.log_q).all()
            for other in (estimate(diffusion, x0, seed=4), estimate(diffusion, x0, seed=3, step=1)):
                assert (other.value != whole.value).all()


def test_drawn_steps_have_their_probabilities() -> None:
    diffusion = gaussian_model("fixed_large")
    p = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05], dtype=F64)
    with torch.no_grad():
        for estimate in (pair_estimate, single_estimate):
            t = estimate(diffusion, pixels(20_000), seed=3, probabilities=p).t
            assert t is not None
            counts = torch.bincount(t, minlength=5)
            assert ((counts - 20_000 * p).abs() < 5 * (20_000 * p * (1 - p)).sqrt()).all()


def test_errors() -> None:
    diffusion = small_diffusion()
    x0 = small_images(2).float()
    for estimate, name in ((pair_estimate, "pair_estimate"), (single_estimate, "single_estimate")):
        for p in (torch.full((5,), 0.2), torch.full((6,), 0.2), torch.tensor([0.5, 0.5, 0, 0, 0, 0])):
            with pytest.raises(ValueError, match=rf"{name}: expected probabilities of shape \[6\], positive"):
                estimate(diffusion, x0, seed=0, probabilities=p)
    with pytest.raises(ValueError, match="estimator_variances: expected draws >= 2, got 1; a variance needs two"):
        estimator_variances(diffusion, x0, 1)
