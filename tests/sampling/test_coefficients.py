"""The tables against the updates as they are published, computed with 60 digits from the betas."""

from __future__ import annotations

import decimal
from decimal import Decimal

import pytest
import torch
from torch import Tensor

from fastddpm.ops.solver_step import solver_step
from fastddpm.prediction import PREDICTIONS
from fastddpm.sampling import (
    SPACINGS,
    VARIANCES,
    blend_table,
    ddim_table,
    ddpm_table,
    dpmpp_2m_table,
    timesteps,
)
from fastddpm.schedule import Schedule, cosine_beta_schedule, linear_beta_schedule, make_schedule
from tests.tolerance import assert_equal_to_rounding

SHORT = Schedule.from_betas(linear_beta_schedule(20, 1e-3, 0.4))
LONG = make_schedule("linear", 1000)
STEPS = {
    "all of 20": (SHORT, timesteps(20, 20)),
    "7 of 20": (SHORT, timesteps(20, 7)),
    "50 of 1000, leading": (LONG, timesteps(1000, 50, "leading")),
    "20 of 1000, quadratic": (LONG, timesteps(1000, 20, "quadratic")),
    "12 of 60, cosine": (Schedule.from_betas(cosine_beta_schedule(60)), timesteps(60, 12, "linspace")),
    "1 of 20": (SHORT, timesteps(20, 1)),
}
ZERO, ONE = Decimal(0), Decimal(1)
Vector = list[Decimal]
"""What a quantity is made of: its coefficients on (x, out, pred_prev, z)."""


@pytest.fixture(autouse=True)
def _digits() -> object:
    with decimal.localcontext(decimal.Context(prec=60)):
        yield


def combine(*terms: tuple[Decimal, Vector]) -> Vector:
    return [sum((factor * vector[i] for factor, vector in terms), ZERO) for i in range(4)]


X, OUT, PRED_PREV, Z = ([ONE if i == j else ZERO for j in range(4)] for i in range(4))


class Published:
    """abar and beta with 60 digits, and what the network's output says, as its definitions in the papers have it."""

    def __init__(self, schedule: Schedule, steps: Tensor) -> None:
        self.betas = [Decimal(beta) for beta in schedule.betas.tolist()]
        self.abar = [ONE]
        for beta in self.betas:
            self.abar.append(self.abar[-1] * (1 - beta))
        self.visited = [t + 1 for t in steps.tolist()]  # t = 1..T of the papers

    def rows(self) -> list[tuple[int, Decimal, Decimal]]:
        """(t, abar_t, abar of the timestep visited next) of all rows but the last."""
        return [
            (t, self.abar[t], self.abar[following])
            for t, following in zip(self.visited, self.visited[1:], strict=False)
        ]

    def eps(self, kind: str, t: int) -> Vector:
        abar, beta = self.abar[t], self.betas[t - 1]
        sigma = (1 - abar).sqrt()
        if kind == "eps":
            return OUT
        if kind == "x0":  # x_t = sqrt(abar) x0 + sqrt(1 - abar) eps
            return combine((1 / sigma, X), (-abar.sqrt() / sigma, OUT))
        if kind == "v":  # Salimans and Ho 2022, appendix D: eps = sigma x_t + alpha v
            return combine((sigma, X), (abar.sqrt(), OUT))
        # mu = (x_t - beta / sqrt(1 - abar) eps) / sqrt(alpha), Ho et al. 2020 eq. 11
        return combine((sigma / beta, X), (-(1 - beta).sqrt() * sigma / beta, OUT))

    def x0(self, kind: str, t: int) -> Vector:
        abar = self.abar[t]
        if kind == "x0":
            return OUT
        return combine((1 / abar.sqrt(), X), (-((1 - abar) / abar).sqrt(), self.eps(kind, t)))

    def ddpm(self, kind: str, variance: str) -> list[Vector]:
        """Ho et al. 2020, algorithm 2, on the chain of the visited timesteps."""
        rows = []
        for t, abar, abar_next in self.rows():
            alpha = abar / abar_next
            small = (1 - abar_next) / (1 - abar) * (1 - alpha)
            deviation = {"fixed_small": small, "fixed_large": 1 - alpha, "unit": ONE}[variance].sqrt()
            mean = combine((1 / alpha.sqrt(), X), (-(1 - alpha) / (alpha * (1 - abar)).sqrt(), self.eps(kind, t)))
            rows.append(combine((ONE, mean), (deviation, Z)))
        return [*rows, self.x0(kind, self.visited[-1])]

    def ddim(self, kind: str, eta: float) -> list[Vector]:
        """Song et al. 2021, eq. 12 and 16."""
        rows = []
        for t, abar, abar_next in self.rows():
            sigma = Decimal(eta) * ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)).sqrt()
            direction = (1 - abar_next - sigma * sigma).sqrt()
            rows.append(combine((abar_next.sqrt(), self.x0(kind, t)), (direction, self.eps(kind, t)), (sigma, Z)))
        return [*rows, self.x0(kind, self.visited[-1])]

    def dpmpp_2m(self, kind: str, lower_order_final: bool) -> list[Vector]:
        """Lu et al. 2022b, algorithm 2, in its names: alpha, sigma, lambda = ln(alpha / sigma), h, r, D."""
        rows: list[Vector] = []
        h_before = None
        for t, abar, abar_next in self.rows():
            sigma, sigma_next = (1 - abar).sqrt(), (1 - abar_next).sqrt()
            h = (abar_next.sqrt() / sigma_next).ln() - (abar.sqrt() / sigma).ln()
            d = self.x0(kind, t)
            if h_before is not None and not (lower_order_final and len(rows) == len(self.visited) - 2):
                r = h_before / h
                d = combine((1 + 1 / (2 * r), d), (-1 / (2 * r), PRED_PREV))
            rows.append(combine((sigma_next / sigma, X), (-abar_next.sqrt() * ((-h).exp() - 1), d)))
            h_before = h
        return [*rows, self.x0(kind, self.visited[-1])]


def assert_is_published(table: Tensor, rows: list[Vector], roundings: float) -> None:
    """The table's x' as coefficients on (x, out, pred_prev, z) is the published one."""
    k0, k1, k2, k3, k4, k5, k6 = table[:, :7].unbind(1)
    ours = torch.stack([k2 * k0 + k3, k2 * k1 + k6, k4, k5], dim=1)
    terms = torch.stack([(k2 * k0).abs() + k3.abs(), (k2 * k1).abs() + k6.abs(), k4.abs(), k5.abs()], dim=1)
    theirs = torch.tensor([[float(value) for value in row] for row in rows], dtype=torch.float64)
    # what cancels in 60 digits is not quite 0
    assert_equal_to_rounding(ours, theirs, roundings, scale=terms.clamp(min=1e-40))


def roundings(schedule: Schedule) -> float:
    """1.2e-15 for the update, and for abar, a product of T rounded numbers, what such a random walk leaves."""
    return 5 + schedule.num_timesteps**0.5


@pytest.mark.parametrize("case", STEPS)
@pytest.mark.parametrize("kind", PREDICTIONS)
class TestPublished:
    @pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "unit"])
    def test_ddpm(self, case: str, kind: str, variance: str) -> None:
        schedule, steps = STEPS[case]
        table = ddpm_table(schedule, steps, kind, variance)
        assert_is_published(table, Published(schedule, steps).ddpm(kind, variance), roundings(schedule))

    @pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize("use_clipped", [True, False])
    def test_ddim(self, case: str, kind: str, eta: float, use_clipped: bool) -> None:
        schedule, steps = STEPS[case]
        table = ddim_table(schedule, steps, kind, eta, use_clipped=use_clipped)
        assert_is_published(table, Published(schedule, steps).ddim(kind, eta), roundings(schedule))

    def test_dpmpp_2m(self, case: str, kind: str) -> None:
        schedule, steps = STEPS[case]
        ends_lower = len(steps) < 15 and steps[-1] == 0
        assert ends_lower == (case == "12 of 60, cosine")
        for option, lower in ((None, ends_lower), (False, False), (True, bool(steps[-1] == 0))):
            table = dpmpp_2m_table(schedule, steps, kind, lower_order_final=option)
            assert_is_published(table, Published(schedule, steps).dpmpp_2m(kind, lower), roundings(schedule))


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("use_clipped", [True, False])
def test_ddim_with_a_clamp_takes_eps_from_after_or_before_it(kind: str, eta: float, use_clipped: bool) -> None:
    steps = timesteps(20, 7)
    table = ddim_table(SHORT, steps, kind, eta, use_clipped=use_clipped)
    x, out, z = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64)
    published = Published(SHORT, steps)
    for i, (t, abar, abar_next) in enumerate(published.rows()):
        x0 = sum(float(c) * value for c, value in zip(published.x0(kind, t), (x, out), strict=False))
        eps = sum(float(c) * value for c, value in zip(published.eps(kind, t), (x, out), strict=False))
        clamped = x0.clamp(-1, 1)
        assert bool((clamped != x0).any())
        if use_clipped:
            eps = (x - float(abar.sqrt()) * clamped) / float((1 - abar).sqrt())
        sigma = Decimal(eta) * ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)).sqrt()
        direction = float((1 - abar_next - sigma * sigma).sqrt())
        expected = float(abar_next.sqrt()) * clamped + direction * eps + float(sigma) * z
        ours, pred = solver_step(x, out, table, i, clamp=1.0, noise=z)
        assert_equal_to_rounding(ours, expected, 64, scale=expected.abs().max())
        assert_equal_to_rounding(pred, clamped, 64, scale=1.0)


@pytest.mark.parametrize("schedule", [SHORT, LONG], ids=["20", "1000"])
def test_as_many_steps_as_timesteps_give_the_posterior_of_the_full_chain(schedule: Schedule) -> None:
    total = schedule.num_timesteps
    table = ddpm_table(schedule, timesteps(total, total), "x0", "fixed_small").flip(0)
    assert_equal_to_rounding(table[:, 2], schedule.posterior_mean_coef1, roundings(schedule))
    assert_equal_to_rounding(table[:, 3], schedule.posterior_mean_coef2, roundings(schedule))
    assert_equal_to_rounding(table[:, 5].square(), schedule.posterior_variance, roundings(schedule))
    large = ddpm_table(schedule, timesteps(total, total), "x0", "fixed_large").flip(0)
    assert_equal_to_rounding(large[1:, 5].square(), schedule.betas[1:])


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_respaced_chain_is_the_chain_of_its_own_betas(spacing: str) -> None:
    steps = timesteps(1000, 25, spacing)
    kept = LONG.alphas_cumprod[steps.flip(0)]
    betas = 1 - kept / torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    own = Schedule.from_betas(betas)
    for make in (
        lambda schedule, visited: ddpm_table(schedule, visited, "x0", "fixed_large"),
        lambda schedule, visited: ddim_table(schedule, visited, "x0", 0.5),
        lambda schedule, visited: dpmpp_2m_table(schedule, visited, "x0", lower_order_final=False),
    ):
        # 1 - abar / abar' loses what the table keeps: roundings of 1 in a beta of 1e-4
        assert_equal_to_rounding(make(LONG, steps), make(own, timesteps(25, 25)), 8 / 1e-4, scale=10.0)
    assert_equal_to_rounding(blend_table(LONG, steps), blend_table(own, timesteps(25, 25)), 8 / 1e-4)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_ddim_with_eta_1_is_ddpm_with_the_small_variance(kind: str) -> None:
    for schedule, steps in STEPS.values():
        ddim = ddim_table(schedule, steps, kind, 1.0)
        ddpm = ddpm_table(schedule, steps, kind, "fixed_small")
        assert_equal_to_rounding(ddim, ddpm, roundings(schedule))


def test_ddim_takes_eta_above_1_as_far_as_its_root_is_real() -> None:
    steps = timesteps(20, 20)
    table = ddim_table(SHORT, steps, "x0", 1.02)
    assert bool(table.isfinite().all())
    assert_equal_to_rounding(table[:-1, 5], 1.02 * ddpm_table(SHORT, steps, "x0", "fixed_small")[:-1, 5])
    with pytest.raises(ValueError, match=r"ddim_table: expected eta in \[0, 1\.\d+\] for these steps, got 3.0; 0 is"):
        ddim_table(SHORT, steps, "x0", 3.0)
    with pytest.raises(ValueError, match=r"ddim_table: expected eta in \[0, .*\] for these steps, got -0.1"):
        ddim_table(SHORT, steps, "x0", -0.1)


@pytest.mark.parametrize("case", STEPS)
def test_the_last_step_returns_the_prediction_and_adds_no_noise(case: str) -> None:
    schedule, steps = STEPS[case]
    tables = [ddpm_table(schedule, steps, "eps", variance) for variance in VARIANCES]
    tables += [ddim_table(schedule, steps, "v", 0.5), ddim_table(schedule, steps, "eps", 1.0, use_clipped=False)]
    tables += [dpmpp_2m_table(schedule, steps, "eps")]
    x, out, before, z = torch.randn(4, 2, 3, 4, 4, dtype=torch.float64)
    for table in tables:
        assert table.shape == (len(steps), 9) and table.dtype == torch.float64
        assert bool(table.isfinite().all())
        x_next, pred = solver_step(x, out, table, len(steps) - 1, clamp=0.5, pred_prev=before, noise=z)
        assert torch.equal(x_next, pred) and pred.abs().max() == 0.5
        both = torch.cat([out, torch.randn_like(out)], dim=1)
        assert torch.equal(solver_step(x, both, table, len(steps) - 1, clamp=0.5, noise=z)[0], pred)


def test_learned_variance() -> None:
    steps = timesteps(20, 7)
    x, out, z = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64)
    log_variance = torch.randn_like(x)
    tables = {variance: ddpm_table(SHORT, steps, "eps", variance) for variance in VARIANCES}

    def noise_part(variance: str, v: Tensor | None, i: int) -> Tensor:
        full = out if v is None else torch.cat([out, v], dim=1)
        with_noise, _ = solver_step(x, full, tables[variance], i, noise=z)
        without, _ = solver_step(x, full, tables[variance], i)
        return with_noise - without

    for i in range(6):
        one = torch.ones_like(x)
        for v, fixed in ((-one, "fixed_small"), (one, "fixed_large")):
            ours, expected = noise_part("learned_range", v, i), noise_part(fixed, None, i)
            assert_equal_to_rounding(ours, expected, 32, scale=10.0)
        ours, expected = noise_part("learned", log_variance, i), torch.exp(log_variance / 2) * z
        assert_equal_to_rounding(ours, expected, 32, scale=10.0)
        for fixed in ("fixed_small", "fixed_large", "unit"):  # whatever a network says of the variance is then left out
            assert_equal_to_rounding(noise_part(fixed, log_variance, i), noise_part(fixed, None, i), 32, scale=10.0)
    ddim = ddim_table(SHORT, steps, "eps", 0.5)
    with_variance, _ = solver_step(x, torch.cat([out, log_variance], dim=1), ddim, 0, noise=z)
    assert_equal_to_rounding(with_variance, solver_step(x, out, ddim, 0, noise=z)[0], 32, scale=10.0)


@pytest.mark.parametrize("kind", ["x0", "v", "mu"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 30])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_zero_terminal_snr_is_finite(kind: str, num_steps: int, name: str) -> None:
    schedule = make_schedule(name, 30, zero_terminal_snr=True)
    steps = timesteps(30, num_steps)
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    tables = [ddpm_table(schedule, steps, kind, variance) for variance in VARIANCES]
    tables += [ddim_table(schedule, steps, kind, eta, use_clipped=used) for eta in (0.0, 1.0) for used in (True, False)]
    tables += [dpmpp_2m_table(schedule, steps, kind)]
    for table in tables:
        assert bool(table.isfinite().all()) and bool(table.float().isfinite().all())
        assert bool(solver_step(x, x, table, 0, noise=x)[0].isfinite().all())
    assert bool(blend_table(schedule, steps).isfinite().all())


def test_2m_is_of_first_order_where_it_has_to_be() -> None:
    schedule = make_schedule("linear", 30, zero_terminal_snr=True)
    steps = timesteps(30, 30)
    ours, first_order = dpmpp_2m_table(schedule, steps, "v"), ddim_table(schedule, steps, "v", 0.0)
    assert_equal_to_rounding(ours[[0, 1, -1]], first_order[[0, 1, -1]])  # the second, too: lambda of the first is -inf
    assert bool((ours[2:-1, 4] < 0).all())
    ordinary = dpmpp_2m_table(SHORT, timesteps(20, 7), "v")  # trailing: ends at t = 2
    assert bool((ordinary[1:-1, 4] < 0).all()) and ordinary[0, 4] == ordinary[-1, 4] == 0


def test_blend_table_is_the_noise_level_after_each_step() -> None:
    steps = timesteps(1000, 50)
    table = blend_table(LONG, steps)
    assert_equal_to_rounding(table[:-1], LONG.signal_sigma[steps[1:]])
    assert table[-1].tolist() == [1.0, 0.0]


TABLES = {
    "ddpm_table": lambda schedule, steps: ddpm_table(schedule, steps),
    "ddim_table": lambda schedule, steps: ddim_table(schedule, steps),
    "dpmpp_2m_table": lambda schedule, steps: dpmpp_2m_table(schedule, steps),
    "blend_table": lambda schedule, steps: blend_table(schedule, steps),
}


@pytest.mark.parametrize("op", TABLES)
@pytest.mark.parametrize(
    ("steps", "error", "message"),
    [
        (torch.tensor([3.0, 1.0]), TypeError, r"expected steps of dtype int64, got torch.float32; convert"),
        (torch.tensor([[3, 1]]), ValueError, r"expected steps of shape \[N\], N >= 1, got \[1, 2\]; see"),
        (torch.tensor([], dtype=torch.int64), ValueError, r"expected steps of shape \[N\], N >= 1, got \[0\]"),
        (torch.tensor([20, 1]), ValueError, r"expected steps in \[0, 20\), got 1 to 20; the schedule has 20"),
        (torch.tensor([3, -1]), ValueError, r"expected steps in \[0, 20\), got -1 to 3"),
        (torch.tensor([9, 3, 3]), ValueError, r"expected steps to be strictly descending, got 3 followed by 3; see"),
        (torch.tensor([3, 1, 2]), ValueError, r"expected steps to be strictly descending, got 1 followed by 2"),
    ],
)
def test_errors_of_steps(op: str, steps: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"{op}: {message}"):
        TABLES[op](SHORT, steps)


def test_errors_of_options() -> None:
    steps = timesteps(20, 7)
    with pytest.raises(ValueError, match=r"ddpm_table: expected variance to be one of fixed_small, .*, got 'big'"):
        ddpm_table(SHORT, steps, "eps", "big")
    for table in TABLES.values():
        if table is not TABLES["blend_table"]:
            with pytest.raises(ValueError, match="got 'eps' with zero terminal SNR"):
                table(make_schedule("linear", 20, zero_terminal_snr=True), steps)
    with pytest.raises(ValueError, match=r"expected kind to be one of eps, x0, v, mu, got 'score'"):
        ddim_table(SHORT, steps, "score")
