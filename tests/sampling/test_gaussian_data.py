"""Samplers against closed forms: for Gaussian data the best network is known, and so are the samples' moments."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fastddpm.prediction import PREDICTIONS
from fastddpm.sampling import (
    SPACINGS,
    ddim_table,
    ddpm_table,
    dpmpp_2m_table,
    sample_ddpm,
    timesteps,
)
from fastddpm.schedule import Schedule, linear_beta_schedule, make_schedule
from tests.sampling.gaussian import Affine, GaussianData, propagate, standard_normal
from tests.tolerance import assert_equal_to_rounding

DATA = GaussianData(mean=0.3, deviation=0.5)
LINEAR = make_schedule("linear", 1000)


def constant(value: Tensor) -> Affine:
    """A start at N(0, value) that depends on no z_T."""
    return Affine(0 * value, 0 * value, value)


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ancestral_sampling_gives_the_data(kind: str, variance: str) -> None:
    """R5: at T = 1000 variance and mean are right within 2% and 1/500 of the deviation; the error goes as 1 / T."""
    errors = []
    for total in (1000, 2000, 4000):
        schedule = Schedule.from_betas(linear_beta_schedule(total, 0.1 / total, 20 / total))
        steps = timesteps(total, total)
        table = ddpm_table(schedule, steps, kind, variance)
        mean, spread = propagate(table, steps, DATA.network(kind, schedule), standard_normal())[-1].moments
        errors.append(abs(float(spread) / DATA.deviation**2 - 1))
        assert abs(float(mean) - DATA.mean) < 2e-3 * DATA.deviation
    assert errors[0] < 0.02
    assert all(abs(math.log2(coarse / fine) - 1) <= 0.1 for coarse, fine in pairwise(errors))


@pytest.mark.parametrize("num_steps", [7, 50, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_fixed_large_is_exact_for_standard_normal_data(num_steps: int, spacing: str) -> None:
    """R3: with x_0 ~ N(0, I), x_t ~ N(0, I) at each visited t; fixed_small falls short."""
    data, steps = GaussianData(0.0, 1.0), timesteps(1000, num_steps, spacing)
    network = data.network("eps", LINEAR)
    states = propagate(ddpm_table(LINEAR, steps, "eps", "fixed_large"), steps, network, standard_normal())
    for state in states[:-1]:
        assert_equal_to_rounding(state.moments[1], 1.0, 8 + num_steps)
    small = propagate(ddpm_table(LINEAR, steps, "eps", "fixed_small"), steps, network, standard_normal())
    assert all(state.moments[1] < 1 for state in small)


@pytest.mark.parametrize("num_steps", [7, 50, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_fixed_small_is_exact_for_a_point(num_steps: int, spacing: str) -> None:
    """R3: with x_0 = m, x_t ~ N(sqrt(abar) m, 1 - abar) at each visited t; fixed_large overshoots."""
    data, steps = GaussianData(0.7, 0.0), timesteps(1000, num_steps, spacing)
    network, (mean, variance) = data.network("v", LINEAR), data.marginal(LINEAR)
    start = Affine(0 * mean[steps[0]], mean[steps[0]], variance[steps[0]])
    table = ddpm_table(LINEAR, steps, "v", "fixed_small")
    states = propagate(table, steps, network, start)
    for state, t in zip(states[:-1], steps[1:], strict=True):
        assert_equal_to_rounding(state.moments[0], mean[t], 8 + num_steps)
        assert_equal_to_rounding(state.moments[1], variance[t], 8 + num_steps)
    assert_equal_to_rounding(states[-1].moments[0], 0.7, 64)
    large = propagate(ddpm_table(LINEAR, steps, "v", "fixed_large"), steps, network, start)
    assert all(state.moments[1] > variance[t] for state, t in zip(large[:-1], steps[1:], strict=True))


def test_all_kinds_of_prediction_give_the_same_samples() -> None:
    steps = timesteps(1000, 20)
    for make in (
        lambda kind: ddpm_table(LINEAR, steps, kind, "fixed_small"),
        lambda kind: ddim_table(LINEAR, steps, kind, 0.5),
        lambda kind: ddim_table(LINEAR, steps, kind, 0.5, use_clipped=False),
        lambda kind: dpmpp_2m_table(LINEAR, steps, kind),
    ):
        ends = [propagate(make(kind), steps, DATA.network(kind, LINEAR), standard_normal())[-1] for kind in PREDICTIONS]
        for end in ends[1:]:
            for ours, expected in zip(end.moments, ends[0].moments, strict=True):
                assert_equal_to_rounding(ours, expected, 8 / float(LINEAR.alphas_cumprod[-1].sqrt()))


def relative_errors(table: Tensor, steps: Tensor) -> tuple[float, float]:
    """Of the mean, in deviations, and of the deviation."""
    mean, spread = propagate(table, steps, DATA.network("eps", LINEAR), standard_normal())[-1].moments
    return float(mean - DATA.mean) / DATA.deviation, math.sqrt(float(spread)) / DATA.deviation - 1


def test_few_steps_of_the_deterministic_samplers_give_the_data() -> None:
    for num_steps, ddim_bound, dpmpp_2m_bound in ((20, 0.14, 0.05), (50, 0.06, 0.005)):
        steps = timesteps(1000, num_steps)
        for table, bound in ((ddim_table(LINEAR, steps), ddim_bound), (dpmpp_2m_table(LINEAR, steps), dpmpp_2m_bound)):
            assert max(map(abs, relative_errors(table, steps))) < bound


def test_lower_order_at_the_end_serves_few_steps() -> None:
    for num_steps, is_default in ((10, True), (14, True), (15, False)):
        steps = timesteps(1000, num_steps, "linspace")
        lower, plain = (dpmpp_2m_table(LINEAR, steps, lower_order_final=option) for option in (True, False))
        assert torch.equal(dpmpp_2m_table(LINEAR, steps), lower if is_default else plain)
        assert abs(relative_errors(lower, steps)[1]) < 0.6 * abs(relative_errors(plain, steps)[1])


@pytest.mark.parametrize(
    ("sampler", "order"),
    [(ddim_table, 1), (dpmpp_2m_table, 2)],
    ids=["ddim", "dpmpp_2m"],
)
@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("data", [DATA, GaussianData(-0.2, 0.15), GaussianData(0.0, 0.8)], ids=str)
def test_order_of_convergence(sampler: object, order: int, kind: str, data: GaussianData) -> None:
    """Between lambda = -4 and 4 on a uniform grid, against the exact solution of the probability-flow ODE.

    dx/dt keeps the marginals and is affine here: (x - mean_t) / deviation_t stays what it was.
    """
    errors = []
    for num_steps in (32, 64, 128):
        schedule = make_schedule("log_snr", num_steps + 1, log_snr_max=8.0, log_snr_min=-8.0)
        steps = timesteps(num_steps + 1, num_steps + 1)
        mean, variance = data.marginal(schedule)
        start = Affine(variance[-1].sqrt(), mean[-1], torch.zeros_like(mean[0]))
        rows = slice(0, num_steps)  # the last row goes on to abar = 1
        table = sampler(schedule, steps, kind)[rows]  # type: ignore[operator]
        end = propagate(table, steps[rows], data.network(kind, schedule), start)[-1]
        errors.append(max(abs(float(end.slope - variance[0].sqrt())), abs(float(end.offset - mean[0]))))
    for coarse, fine in pairwise(errors):
        assert abs(math.log2(coarse / fine) - order) <= 0.1, errors


def test_samples_of_the_real_loop_have_the_data_s_mean_and_variance() -> None:
    """R5 by Monte Carlo: 1000 steps of the loop in float32, each of 4096 pixels a sample of its own."""
    a, b = (value.float() for value in DATA.network("eps", LINEAR))

    def network(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return a[t].reshape(-1, 1, 1, 1) * x + b[t].reshape(-1, 1, 1, 1)

    x = sample_ddpm(network, LINEAR, (4, 1, 32, 32), seed=11, clamp=None).double()
    count = x.numel()
    assert abs(float(x.mean()) - DATA.mean) < 5 * DATA.deviation / count**0.5
    spread = float(((x - DATA.mean) ** 2).mean())
    steps = timesteps(1000, 1000)
    network_table = DATA.network("eps", LINEAR)
    _, expected = propagate(ddpm_table(LINEAR, steps), steps, network_table, standard_normal())[-1].moments
    assert abs(spread - float(expected)) < 5 * float(expected) * (2 / count) ** 0.5
    assert abs(spread - DATA.deviation**2) < 5 * DATA.deviation**2 * (2 / count) ** 0.5
    # every pixel is its own sample: neighbours are not correlated
    z = (x - DATA.mean) / DATA.deviation
    assert abs(float((z[..., 1:] * z[..., :-1]).mean())) < 5 / count**0.5
