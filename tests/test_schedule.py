"""F4 of the theory: the tables of every schedule. What they mean as Gaussians is tested in test_forward_process.py."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from decimal import Decimal, localcontext

import pytest
import torch
from torch import Tensor

from fastddpm.schedule import (
    SCHEDULES,
    Schedule,
    cosine_beta_schedule,
    extract,
    linear_beta_schedule,
    log_snr_beta_schedule,
    make_schedule,
    quadratic_beta_schedule,
    rescale_zero_terminal_snr,
    sigmoid_beta_schedule,
)
from tests.tolerance import assert_equal_to_rounding

NAMES = sorted(SCHEDULES)
TABLES = [field.name for field in dataclasses.fields(Schedule) if field.name != "first_log_variance"]


def exact_products(betas: Tensor) -> tuple[Tensor, Tensor]:
    """abar and 1 - abar of these betas, in 50 decimal digits, then rounded once to float64."""
    with localcontext() as context:
        context.prec = 50
        abar, products = Decimal(1), []
        for beta in betas.tolist():
            abar *= 1 - Decimal(beta)
            products.append((float(abar), float(1 - abar)))
    return tuple(torch.tensor(products, dtype=torch.float64).unbind(1))  # type: ignore[return-value]


def differences(x: Tensor) -> Tensor:
    return x[1:] - x[:-1]


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_tables_are_float64_and_keep_its_precision(name: str, zero_terminal_snr: bool) -> None:
    schedule = make_schedule(name, 1000, zero_terminal_snr=zero_terminal_snr)
    for table in TABLES:
        assert getattr(schedule, table).dtype == torch.float64, table
        assert getattr(schedule, table).shape == (1000,), table
    abar, noise = exact_products(schedule.betas)
    # a sum of 1000 logarithms, each rounded: about sqrt(1000) roundings, on ln abar down to -20
    assert_equal_to_rounding(schedule.alphas_cumprod, abar, ulps=250)
    assert_equal_to_rounding(schedule.one_minus_alphas_cumprod, noise, ulps=50)
    assert_equal_to_rounding(schedule.alphas_cumprod + schedule.one_minus_alphas_cumprod, 1.0, ulps=1)
    assert_equal_to_rounding(schedule.signal_sigma.square(), torch.stack([abar, noise], dim=1), ulps=250)
    assert_equal_to_rounding(schedule.snr, abar / noise, ulps=250)


def test_precision_test_would_catch_float32_tables() -> None:
    """The errors of tables made in float32, as published for another library: the test above allows 1e-13."""
    schedule, beta = make_schedule("linear", 1000), torch.linspace(1e-4, 0.02, 1000)
    abar = torch.cumprod(1 - beta, 0)
    abar_prev = torch.cat([torch.ones(1), abar[:-1]])
    beta_again = 1 - abar / abar_prev
    variance = (1 - abar_prev) / (1 - abar) * beta_again
    cosine = make_schedule("cosine", 4000)

    def error(table: Tensor, exact: Tensor) -> float:
        return (table.double() / exact - 1).abs().item()

    assert f"{error((1 - abar).sqrt()[0], schedule.signal_sigma[0, 1]):.1e}" == "8.3e-05"
    assert f"{error(beta_again[4], schedule.betas[4]):.1e}" == "4.9e-04"
    assert f"{(variance[1:] / schedule.posterior_variance[1:] - 1).abs().max().item():.1e}" == "3.9e-04"
    assert f"{error(1 - (1 - cosine.betas.float())[0], cosine.one_minus_alphas_cumprod[0]):.1e}" == "2.9e-03"


@pytest.mark.parametrize("num_timesteps", [2, 3, 20, 1000, 4000])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_step_adds_noise(name: str, zero_terminal_snr: bool, num_timesteps: int) -> None:
    s = make_schedule(name, num_timesteps, zero_terminal_snr=zero_terminal_snr)
    assert s.num_timesteps == num_timesteps
    assert (s.betas > 0).all() and (s.betas[:-1] < 1).all()
    assert (differences(s.alphas_cumprod) < 0).all() and (differences(s.log_snr) < 0).all()
    assert s.alphas_cumprod[0] < 1 and s.alphas_cumprod_prev[0] == 1
    assert torch.equal(s.alphas_cumprod_prev[1:], s.alphas_cumprod[:-1])
    assert torch.equal(s.alphas, 1 - s.betas)
    # the posterior narrows the forward step, and is a mixture: both coefficients of its mean are positive
    assert s.posterior_variance[0] == 0
    assert (s.posterior_variance[1:] > 0).all() and (s.posterior_variance <= s.betas).all()
    assert (s.posterior_mean_coef1 > 0).all() and (s.posterior_mean_coef2[1:-1] > 0).all()
    assert all(getattr(s, table).isfinite().all() for table in TABLES if table != "log_snr")
    assert s.zero_terminal_snr == zero_terminal_snr
    if zero_terminal_snr:
        assert s.alphas_cumprod[-1] == 0 and s.one_minus_alphas_cumprod[-1] == 1 and s.log_snr[-1] == -math.inf
    else:
        assert s.alphas_cumprod[-1] > 0 and s.betas[-1] < 1


def test_published_constants() -> None:
    linear, cosine = make_schedule("linear", 1000), make_schedule("cosine", 1000)
    assert f"{linear.alphas_cumprod[-1]:.3e}" == "4.036e-05"
    assert f"{linear.signal_sigma[-1, 0]:.5f}" == "0.00635"
    assert f"{cosine.alphas_cumprod[-1]:.1e}" == "2.4e-09"
    assert f"{make_schedule('cosine', 4000).alphas_cumprod[-1]:.1e}" == "1.5e-10"
    assert f"{make_schedule('sigmoid', 1000).alphas_cumprod[-1]:.1e}" == "3.0e-07"
    assert f"{linear.posterior_log_variance_clipped[0]:.3f}" == "-9.817"
    tiny = make_schedule("linear", 1000, first_log_variance="tiny")
    assert f"{tiny.posterior_log_variance_clipped[0]:.2f}" == "-46.05"


def test_both_conventions_of_the_first_log_variance() -> None:
    copy, tiny = (make_schedule("linear", 50, first_log_variance=first) for first in ("copy", "tiny"))
    assert (copy.first_log_variance, tiny.first_log_variance) == ("copy", "tiny")
    assert copy.posterior_log_variance_clipped[0] == copy.posterior_log_variance_clipped[1]
    assert_equal_to_rounding(tiny.posterior_log_variance_clipped[0].exp(), 1e-20, ulps=50)
    for s in (copy, tiny):
        assert_equal_to_rounding(s.posterior_log_variance_clipped[1:].exp(), s.posterior_variance[1:], ulps=16)
    for table in TABLES:
        if table != "posterior_log_variance_clipped":
            assert torch.equal(getattr(copy, table), getattr(tiny, table)), table


def test_linear_and_quadratic_are_evenly_spaced_between_their_ends() -> None:
    for betas, root in ((linear_beta_schedule(100, 0.001, 0.2), 1), (quadratic_beta_schedule(100, 0.001, 0.2), 2)):
        assert_equal_to_rounding(betas[0], 0.001)
        assert_equal_to_rounding(betas[-1], 0.2)
        steps = differences(betas ** (1 / root))
        assert_equal_to_rounding(steps, (0.2 ** (1 / root) - 0.001 ** (1 / root)) / 99, scale=0.2 ** (1 / root))


def test_cosine_is_the_square_of_a_cosine() -> None:
    abar = make_schedule("cosine", 1000).alphas_cumprod
    for t in (1, 250, 500, 999):
        f = math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        assert_equal_to_rounding(abar[t - 1], f, ulps=2000)  # of 1 - beta, which a difference of two f gives
    # cos^2 + sin^2 = 1: without an offset, the signal of step t is the noise of step T - t
    mirrored = Schedule.from_betas(cosine_beta_schedule(1000, s=1e-9)).alphas_cumprod[:-1]
    assert (mirrored + mirrored.flip(0) - 1).abs().max() < 4e-9  # 2 s at the most
    assert cosine_beta_schedule(1000)[-1] == 0.999 and cosine_beta_schedule(1000, max_beta=0.5).max() == 0.5


def test_sigmoid_is_symmetric_and_steeper_for_a_low_temperature() -> None:
    abar = make_schedule("sigmoid", 1000).alphas_cumprod[:-1]
    assert_equal_to_rounding(abar + abar.flip(0), 1.0, ulps=2000)
    assert_equal_to_rounding(abar[499], 0.5, ulps=2000)
    # g(-3/2) = 0.1824255, g(3) = 0.9525741, g(-3) = 0.0474259
    assert f"{abar[249]:.6f}" == f"{(0.9525741 - 0.1824255) / (0.9525741 - 0.0474259):.6f}"
    steep = make_schedule("sigmoid", 1000, tau=0.5).alphas_cumprod
    assert steep[249] > abar[249] and steep[749] < abar[749]
    assert sigmoid_beta_schedule(1000)[-1] == 0.999


def test_log_snr_is_linear() -> None:
    s = make_schedule("log_snr", 20, log_snr_max=8.0, log_snr_min=-11.0)
    assert_equal_to_rounding(s.log_snr, 8.0 - torch.arange(20, dtype=torch.float64), ulps=100, scale=8.0)
    assert_equal_to_rounding(s.snr, torch.exp(8.0 - torch.arange(20, dtype=torch.float64)), ulps=500)


@pytest.mark.parametrize("name", NAMES)
def test_zero_terminal_snr_shifts_and_scales_the_signal(name: str) -> None:
    before, after = make_schedule(name, 100), make_schedule(name, 100, zero_terminal_snr=True)
    x, y = before.signal_sigma[:, 0], after.signal_sigma[:, 0]
    assert y[-1] == 0 and after.betas[-1] == 1
    assert_equal_to_rounding(y[0], x[0])
    assert_equal_to_rounding(differences(y), differences(x) * (x[0] / (x[0] - x[-1])), ulps=200, scale=1.0)
    assert torch.equal(rescale_zero_terminal_snr(after.betas)[-1:], after.betas[-1:])
    assert_equal_to_rounding(rescale_zero_terminal_snr(after.betas), after.betas, ulps=1000, scale=1.0)


def test_one_step_and_other_dtypes() -> None:
    one = Schedule.from_betas(torch.tensor([0.25], requires_grad=True))
    assert one.alphas_cumprod.tolist() == [0.75] and not one.betas.requires_grad
    assert_equal_to_rounding(one.posterior_log_variance_clipped[0], math.log(0.25))
    for name in NAMES:
        if name != "log_snr":
            assert make_schedule(name, 1).num_timesteps == 1
    assert Schedule.from_betas(torch.tensor([0.25, 0.5])).betas.dtype == torch.float64


def test_schedule_is_frozen_and_compared_by_identity() -> None:
    a, b = make_schedule("linear", 10), make_schedule("linear", 10)
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.betas = b.betas  # type: ignore[misc]
    assert a == a and a != b and len({a, b}) == 2


def test_extract_shapes_a_batch() -> None:
    table, t = torch.arange(10, dtype=torch.float64), torch.tensor([3, 9, 0])
    assert extract(table, t).shape == (3, 1, 1, 1)
    assert extract(table, t).flatten().tolist() == [3, 9, 0]
    assert extract(table, t, ndim=1).shape == (3,)


VALUE_ERRORS = [
    (lambda: make_schedule("linaer"), r"expected name to be one of linear, cosine, .* got 'linaer'; choose"),
    (lambda: make_schedule("linear", first_log_variance="no"), r"first_log_variance to be one of copy, tiny, got 'no'"),
    (lambda: make_schedule("linear", 0), r"linear_beta_schedule: expected an integer num_timesteps >= 1, got 0; "),
    (lambda: make_schedule("cosine", 2.5), r"cosine_beta_schedule: expected an integer num_timesteps >= 1, got 2.5"),
    (lambda: quadratic_beta_schedule(-1), r"quadratic_beta_schedule: expected an integer num_timesteps >= 1, got -1"),
    (lambda: sigmoid_beta_schedule(0), r"sigmoid_beta_schedule: expected an integer num_timesteps >= 1, got 0"),
    (lambda: log_snr_beta_schedule(1), r"log_snr_beta_schedule: expected an integer num_timesteps >= 2, got 1"),
    (lambda: linear_beta_schedule(10, 0.0, 0.1), r"expected 0 < beta_start <= beta_end < 1, got 0.0 and 0.1"),
    (lambda: linear_beta_schedule(10, 0.2, 0.1), r"expected 0 < beta_start <= beta_end < 1, got 0.2 and 0.1"),
    (lambda: linear_beta_schedule(10, math.nan), r"expected 0 < beta_start <= beta_end < 1, got nan and 0.02"),
    (lambda: quadratic_beta_schedule(10, 0.1, 1.0), r"quadratic_.*: expected 0 < beta_start <= beta_end < 1, got"),
    (lambda: cosine_beta_schedule(10, s=0.0), r"cosine_beta_schedule: expected s > 0, got 0.0"),
    (lambda: cosine_beta_schedule(10, max_beta=1.5), r"cosine_.*: expected max_beta in \(0, 1\], got 1.5"),
    (lambda: sigmoid_beta_schedule(10, max_beta=0.0), r"sigmoid_.*: expected max_beta in \(0, 1\], got 0"),
    (lambda: sigmoid_beta_schedule(10, 3, -3), r"expected start < end, got 3 and -3"),
    (lambda: sigmoid_beta_schedule(10, tau=0.0), r"expected tau > 0, got 0.0"),
    (lambda: log_snr_beta_schedule(10, -5, 5), r"expected 36 > log_snr_max > log_snr_min > -36, got -5 and 5"),
    (lambda: log_snr_beta_schedule(10, 50, 5), r"expected 36 > log_snr_max > log_snr_min > -36, got 50 and 5"),
    (lambda: rescale_zero_terminal_snr(torch.tensor([0.1])), r"expected at least 2 betas, got 1"),
    (lambda: rescale_zero_terminal_snr(torch.tensor([0.1, 1.5])), r"rescale_.*: expected betas in \(0, 1\), the last"),
    (lambda: Schedule.from_betas(torch.rand(2, 3)), r"expected betas of shape \[T\], got \[2, 3\]"),
    (lambda: Schedule.from_betas(torch.rand(0)), r"expected betas of shape \[T\], got \[0\]"),
    (lambda: Schedule.from_betas(torch.tensor([0.1, 0.0])), r"expected betas in \(0, 1\), the last at most 1, got 0.0"),
    (lambda: Schedule.from_betas(torch.tensor([1.0, 0.5])), r"expected betas in \(0, 1\), the last at most 1, got 0.5"),
    (lambda: Schedule.from_betas(torch.tensor([0.1, math.nan])), r"expected betas in .*, got nan to nan"),
]


@pytest.mark.parametrize(("make", "text"), VALUE_ERRORS)
def test_value_errors(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def test_option_of_another_schedule() -> None:
    with pytest.raises(TypeError, match="expected options of 'cosine' among s, max_beta, got beta_start;"):
        make_schedule("cosine", beta_start=0.1)
