"""F1-F3 and R1-R3 of the theory: the chain x_0, x_1 .. x_T as one joint Gaussian, by linear algebra and by simulation.

Given x_0, a step of the chain is x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) z_t (F1): A x = D z + c x_0 with A
bidiagonal. So the joint mean and covariance need no closed form, and the library's closed forms are compared with them.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastddpm.diffusion import model_log_variance, prior_kl, q_posterior, q_sample
from fastddpm.schedule import Schedule, make_schedule
from tests.tolerance import assert_equal_to_rounding

SCHEDULES = [
    ("linear", False),
    ("cosine", False),
    ("sigmoid", True),
    ("quadratic", False),
    ("log_snr", False),
    ("linear", True),
]
every_schedule = pytest.mark.parametrize(("name", "zero_terminal_snr"), SCHEDULES)


def chain(schedule: Schedule, variance_of_x0: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean [T + 1] and covariance [T + 1, T + 1] of (x_0 .. x_T) for E[x_0] = 1, from the betas alone."""
    size = schedule.num_timesteps + 1
    step = torch.eye(size, dtype=torch.float64) - torch.diag((1 - schedule.betas).sqrt(), -1)
    inverse = torch.linalg.solve_triangular(step, torch.eye(size, dtype=torch.float64), upper=False)
    noise = torch.cat([torch.tensor([variance_of_x0], dtype=torch.float64), schedule.betas])
    return inverse[:, 0], inverse @ torch.diag(noise) @ inverse.T


def steps(schedule: Schedule) -> Tensor:
    return torch.arange(schedule.num_timesteps)


@every_schedule
def test_f2_is_f1_composed(name: str, zero_terminal_snr: bool) -> None:
    schedule = make_schedule(name, 60, zero_terminal_snr=zero_terminal_snr)
    mean, covariance = chain(schedule)
    one, zero = torch.ones(60, 1, dtype=torch.float64), torch.zeros(60, 1, dtype=torch.float64)
    assert_equal_to_rounding(q_sample(one, steps(schedule), zero, schedule).flatten(), mean[1:], ulps=100)
    assert_equal_to_rounding(
        q_sample(zero, steps(schedule), one, schedule).flatten().square(), covariance.diag()[1:], ulps=100
    )
    assert_equal_to_rounding(schedule.signal_sigma[:, 0], mean[1:], ulps=100)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_f2_is_f1_simulated(name: str) -> None:
    n, schedule = 40_000, make_schedule(name, 25, **({"beta_end": 0.3} if name == "linear" else {}))
    generator = torch.Generator().manual_seed(1)
    x0 = torch.tensor(0.7, dtype=torch.float64)
    x, signal_sigma = x0.expand(n), schedule.signal_sigma
    for t, beta in enumerate(schedule.betas):
        x = (1 - beta).sqrt() * x + beta.sqrt() * torch.randn(n, dtype=torch.float64, generator=generator)
        signal, sigma = signal_sigma[t]
        assert (x.mean() - signal * x0).abs() / (sigma / n**0.5) < 5, t
        assert (x.var() / sigma**2 - 1).abs() / (2 / n) ** 0.5 < 5, t


def test_f3_prior_term_of_the_linear_schedule() -> None:
    schedule = make_schedule("linear", 1000)
    half = torch.tensor([0.5, -0.5], dtype=torch.float64)  # E[x_0^2] = 0.25
    nats = prior_kl(half, schedule).mean()
    assert f"{nats / math.log(2):.1e}" == "7.3e-06"
    assert f"{schedule.alphas_cumprod[-1] * 0.25 / (2 * math.log(2)):.1e}" == "7.3e-06"
    for name in ("cosine", "linear"):
        zero = make_schedule(name, 1000, zero_terminal_snr=True)
        assert prior_kl(half, zero).tolist() == [0.0, 0.0]
    assert 0 <= prior_kl(half, make_schedule("cosine", 1000)).mean() / math.log(2) < 1e-9


@pytest.mark.parametrize("num_timesteps", [1000, 200, 50])
def test_f3_prior_term_by_monte_carlo(num_timesteps: int) -> None:
    """E_q[log q(x_T | x_0) - log N(x_T; 0, I)], with each z and -z together, which takes most of the variance away."""
    schedule = make_schedule("linear", num_timesteps)
    signal, sigma = schedule.signal_sigma[-1]
    z = torch.randn(200_000, dtype=torch.float64)
    x0 = torch.where(torch.arange(len(z)) % 2 == 0, 0.5, -0.5).double()

    def log_ratio(z: Tensor) -> Tensor:
        x_t = signal * x0 + sigma * z
        return -torch.log(sigma) - z.square() / 2 + x_t.square() / 2

    draws = (log_ratio(z) + log_ratio(-z)) / 2
    expected = prior_kl(torch.tensor([0.5, -0.5], dtype=torch.float64), schedule).mean()
    standard_error = draws.std() / len(z) ** 0.5
    assert (draws.mean() - expected).abs() < 5 * standard_error
    assert standard_error < expected / 10  # so that a wrong factor would show


@every_schedule
def test_r1_posterior_is_the_conditional_of_the_joint_gaussian(name: str, zero_terminal_snr: bool) -> None:
    schedule = make_schedule(name, 60, zero_terminal_snr=zero_terminal_snr)
    mean, covariance = chain(schedule)
    variance, previous = covariance.diag()[1:], covariance.diag()[:-1]
    regression = torch.diagonal(covariance, -1) / variance  # of x_{t-1} on x_t, given x_0
    on_x0 = mean[:-1] - regression * mean[1:]
    left = previous - regression**2 * variance

    one, zero = torch.ones(60, 1, dtype=torch.float64), torch.zeros(60, 1, dtype=torch.float64)
    coef1, log_variance = q_posterior(one, zero, steps(schedule), schedule)[0::2]
    coef2, posterior_variance = q_posterior(zero, one, steps(schedule), schedule)[:2]
    assert_equal_to_rounding(coef1.flatten(), on_x0, ulps=100, scale=mean[:-1])
    assert_equal_to_rounding(coef2.flatten(), regression, ulps=100)
    assert_equal_to_rounding(posterior_variance.flatten(), left, ulps=100, scale=previous)
    assert_equal_to_rounding(log_variance.flatten()[1:].exp(), posterior_variance.flatten()[1:], ulps=100)
    assert_equal_to_rounding(schedule.posterior_mean_coef1, on_x0, ulps=100, scale=mean[:-1])
    assert_equal_to_rounding(schedule.posterior_mean_coef2, regression, ulps=100)


def test_r1_test_would_catch_the_misprint_of_the_mean() -> None:
    """abar_{t-1} in place of its root, as some expositions have it."""
    schedule = make_schedule("linear", 60)
    mean, covariance = chain(schedule)
    on_x0 = mean[:-1] - torch.diagonal(covariance, -1) / covariance.diag()[1:] * mean[1:]
    wrong = schedule.posterior_mean_coef1 * schedule.alphas_cumprod_prev.sqrt()
    with pytest.raises(AssertionError, match="59 of 60 elements differ"):
        assert_equal_to_rounding(wrong, on_x0, ulps=100, scale=mean[:-1])


@pytest.mark.parametrize(("name", "num_timesteps"), [("linear", 1000), ("cosine", 1000), ("log_snr", 20)])
def test_r2_mean_from_eps(name: str, num_timesteps: int) -> None:
    schedule = make_schedule(name, num_timesteps)
    x0, eps = torch.randn(2, num_timesteps, 3, dtype=torch.float64)
    t = steps(schedule)
    x_t = q_sample(x0, t, eps, schedule)
    mean, _, _ = q_posterior(x0, x_t, t, schedule)
    alpha, beta, noise = (v[:, None] for v in (schedule.alphas, schedule.betas, schedule.one_minus_alphas_cumprod))
    from_eps = (x_t - beta / noise.sqrt() * eps) / alpha.sqrt()
    assert_equal_to_rounding(from_eps, mean, ulps=100, scale=(x_t.abs() + eps.abs()) / alpha.sqrt())


@every_schedule
def test_r3_best_variance_of_the_reverse_step(name: str, zero_terminal_snr: bool) -> None:
    """var(x_{t-1} | x_t), the best that p can have, is beta_t for x_0 ~ N(0, I) and sigma_q^2 for a single point."""
    schedule = make_schedule(name, 60, zero_terminal_snr=zero_terminal_snr)

    def best(variance_of_x0: float) -> Tensor:
        _, covariance = chain(schedule, variance_of_x0)
        return covariance.diag()[:-1] - torch.diagonal(covariance, -1) ** 2 / covariance.diag()[1:]

    assert_equal_to_rounding(schedule.betas, best(1.0), ulps=100, scale=1.0)
    assert_equal_to_rounding(schedule.posterior_variance, best(0.0), ulps=100, scale=1.0)
    for kind, variance_of_x0 in (("fixed_large", 1.0), ("fixed_small", 0.0)):
        for bound in model_log_variance(kind, schedule):
            assert_equal_to_rounding(bound.exp()[1:], best(variance_of_x0)[1:], ulps=100, scale=1.0)
    # any other data lies between, so a learned variance finds its best in learned_range
    smallest, largest = model_log_variance("learned_range", schedule)
    assert (smallest.exp() < best(0.3))[1:].all() and (best(0.3) < largest.exp())[1:].all()
