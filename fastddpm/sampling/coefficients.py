"""Samplers as tables: one row of coefficients for each step, all that `solver_step` needs to know of a sampler.

    pred = clamp(k0 x + k1 out);    x' = k2 pred + k3 x + k4 pred_prev + k5 z + k6 out

Row i goes from steps[i] to steps[i + 1], the timestep visited next; the last row goes to the clean image, abar = 1. It
is (k2, k3 .. k6) = (1, 0 .. 0) in every table: the last step returns the prediction and adds no noise. Columns 7 and 8
bound the log-variance of the noise, for networks that learn it; where it is given, both are log k5^2.

Below, s and sigma are sqrt(abar) and sqrt(1 - abar) at the timestep of the row, s' and sigma' at the next one visited,
alpha = abar / abar' and beta = 1 - alpha: the chain of the visited timesteps has its own betas (Nichol and Dhariwal
2021, eq. 19). lambda = ln(s / sigma), h = lambda' - lambda. Everything is float64 and on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..prediction import x0_coefficients
from ..schedule import Schedule

LOWER_ORDER_BELOW = 15
"""Steps below which DPM-Solver++(2M) ends with first order, unless told otherwise."""
VARIANCES = ("fixed_small", "fixed_large", "unit", "learned", "learned_range")


def ddpm_table(schedule: Schedule, steps: Tensor, prediction: str = "eps", variance: str = "fixed_large") -> Tensor:
    """Ancestral sampling over the visited steps (Ho et al. 2020, algorithm 2, and the posterior mean of eq. 7).

    x' = s' beta / sigma^2 pred + sqrt(alpha) sigma'^2 / sigma^2 x + k5 z.

    Args:
        schedule: of the trained chain, T steps.
        steps: int64 [N], strictly descending, in [0, T), see `timesteps`.
        prediction: what the network predicts: "eps", "x0", "v" or "mu".
        variance: k5^2: "fixed_small", beta sigma'^2 / sigma^2, the variance of the posterior; "fixed_large", beta;
            "unit", 1; "learned", the network gives log k5^2 itself; "learned_range", the network goes from log of
            fixed_small at -1 to log of fixed_large at 1 (Nichol and Dhariwal 2021, eq. 15).

    Returns: float64 [N, 9].

    Raises:
        ValueError: steps out of range or order, an unknown prediction or variance, or eps where abar_T = 0.
        TypeError: steps not int64.
    """
    if variance not in VARIANCES:
        raise ValueError(
            f"ddpm_table: expected variance to be one of {', '.join(VARIANCES)}, got {variance!r}; choose one of these"
        )
    c = _transitions("ddpm_table", schedule, steps)
    small, one = c.beta * c.noise_next / c.noise, torch.ones_like(c.beta)
    value = {"fixed_small": small, "fixed_large": c.beta}.get(variance, one)
    bounds = {"learned": (-one, one), "learned_range": (small.log(), c.beta.log())}.get(variance)
    k2 = c.signal_next * c.beta / c.noise
    k3 = c.alpha.sqrt() * c.noise_next / c.noise
    return _table(schedule, steps, prediction, k2=k2, k3=k3, k5=value.sqrt(), bounds=bounds)


def ddim_table(
    schedule: Schedule, steps: Tensor, prediction: str = "eps", eta: float = 0.0, *, use_clipped: bool = True
) -> Tensor:
    """The non-Markovian chains of Song et al. 2021 (DDIM), eq. 12, with the deviation of eq. 16.

    k5 = eta sigma' / sigma sqrt(beta);  x' = s' pred + sqrt(sigma'^2 - k5^2) eps + k5 z.

    Args:
        schedule, steps, prediction: see `ddpm_table`.
        eta: 0 is deterministic, 1 is DDPM with the variance fixed_small. Above 1, up to where the root stays real.
        use_clipped: take eps = (x - s pred) / sigma from the prediction after its clamp, so that the two agree. False
            takes the eps that the network's output stands for, before the clamp, by k6.

    Returns: float64 [N, 9].

    Raises:
        ValueError: eta out of range, and as `ddpm_table`. TypeError: steps not int64.
    """
    c = _transitions("ddim_table", schedule, steps)
    rows = (c.noise / c.beta)[:-1]  # the last adds no noise
    limit = max(1.0, float(rows.min().sqrt())) if len(rows) else float("inf")
    if not 0 <= eta <= limit:
        raise ValueError(
            f"ddim_table: expected eta in [0, {limit:.6g}] for these steps, got {eta}; 0 is deterministic, 1 is DDPM"
        )
    # 1 - (k5 / sigma')^2, from sigma^2 = beta + alpha sigma'^2
    remaining = (((1 - eta**2) * c.beta + c.alpha * c.noise_next) / c.noise).clamp(min=0)
    ratio = c.sigma_next / c.sigma
    deviation = ratio * remaining.sqrt()  # sqrt(sigma'^2 - k5^2) / sigma
    k5 = eta * ratio * c.beta.sqrt()
    if use_clipped:
        # s' - deviation s, where s' - ratio s = s' (1 - e^-h) and 1 - root = (1 - remaining) / (1 + root)
        lost = eta**2 * c.beta / c.noise / (1 + remaining.sqrt())
        k2 = -c.signal_next * torch.expm1(-c.h) + ratio * c.signal * lost
        return _table(schedule, steps, prediction, k2=k2, k3=deviation, k5=k5)
    of_x, of_out = _eps_coefficients(prediction, schedule)[steps.cpu()].unbind(1)
    k3, k6 = c.sigma * deviation * of_x, c.sigma * deviation * of_out
    return _table(schedule, steps, prediction, k2=c.signal_next, k3=k3, k5=k5, k6=k6)


def dpmpp_2m_table(
    schedule: Schedule, steps: Tensor, prediction: str = "eps", *, lower_order_final: bool | None = None
) -> Tensor:
    """DPM-Solver++(2M), the multistep solver of second order (Lu et al. 2022b, algorithm 2).

    x' = sigma' / sigma x - s' (e^-h - 1) D,  D = (1 + 1 / 2r) pred - 1 / 2r pred_prev,  r = h_prev / h.

    The first step is of first order (D = pred), and so is the last, which goes to lambda = inf. With abar_T = 0 the
    first step has h = inf, which leaves the second of first order, too.

    Args:
        schedule, steps, prediction: see `ddpm_table`.
        lower_order_final: make the step that arrives at t = 0, the end of the paper's interval, of first order: where
            few steps leave it much longer than the one before, a second order overshoots. None: for less than 15 steps,
            as the paper's code does. Without effect where t = 0 is not visited, as with the spacing "trailing".

    Returns: float64 [N, 9].

    Raises:
        ValueError, TypeError: as `ddpm_table`.
    """
    c = _transitions("dpmpp_2m_table", schedule, steps)
    first_order = -c.signal_next * torch.expm1(-c.h)
    half = torch.zeros_like(c.h)  # 1 / 2r
    half[1:] = c.h[1:] / c.h[:-1] / 2
    few = len(steps) < LOWER_ORDER_BELOW if lower_order_final is None else lower_order_final
    if few and steps[-1] == 0:
        half[-2:] = 0
    k2, k4 = first_order * (1 + half), -first_order * half
    return _table(schedule, steps, prediction, k2=k2, k3=c.sigma_next / c.sigma, k4=k4)


def blend_table(schedule: Schedule, steps: Tensor) -> Tensor:
    """Signal s' and noise level sigma' after each step, for inpainting: the known pixels are noised to that level.

    Args:
        schedule, steps: see `ddpm_table`.

    Returns: float64 [N, 2], the last row exactly (1, 0).

    Raises:
        ValueError: steps out of range or order. TypeError: steps not int64.
    """
    c = _transitions("blend_table", schedule, steps)
    return torch.stack([c.signal_next, c.sigma_next], dim=1)


@dataclass(frozen=True)
class _Transitions:
    """From each visited timestep to the next, the last to the clean image: float64 [N] each, named as above.

    noise is 1 - abar. No value comes from a difference of nearly equal numbers.
    """

    signal: Tensor
    sigma: Tensor
    noise: Tensor
    signal_next: Tensor
    sigma_next: Tensor
    noise_next: Tensor
    alpha: Tensor
    beta: Tensor
    h: Tensor


def _transitions(op: str, schedule: Schedule, steps: Tensor) -> _Transitions:
    """Check the steps, and gather what all samplers are made of."""
    total = schedule.num_timesteps
    if steps.dtype != torch.int64:
        raise TypeError(f"{op}: expected steps of dtype int64, got {steps.dtype}; convert them with .to(torch.int64)")
    if steps.dim() != 1 or len(steps) < 1:
        raise ValueError(
            f"{op}: expected steps of shape [N], N >= 1, got {list(steps.shape)}; see fastddpm.sampling.timesteps"
        )
    steps = steps.cpu()
    if steps.max() >= total or steps.min() < 0:
        raise ValueError(
            f"{op}: expected steps in [0, {total}), got {steps.min().item()} to {steps.max().item()}; "
            f"the schedule has {total} timesteps"
        )
    rises = (steps.diff() >= 0).nonzero().flatten()
    if len(rises):
        first, second = steps[rises[0] : rises[0] + 2].tolist()
        raise ValueError(
            f"{op}: expected steps to be strictly descending, got {first} followed by {second}; "
            "see fastddpm.sampling.timesteps"
        )

    # log alpha of a transition is the sum over the steps of the full chain that it jumps over
    row = torch.bucketize(torch.arange(total), steps.flip(0))  # N - 1 - row; N for those above the first visited
    log_alpha = torch.zeros(len(steps) + 1, dtype=torch.float64)
    log_alpha = log_alpha.index_add(0, row, torch.log1p(-schedule.betas))[:-1].flip(0)
    beta = -torch.expm1(log_alpha)

    one = torch.ones(1, dtype=torch.float64)
    following = torch.cat([steps[1:], torch.tensor([-1])])  # -1 is the clean image: abar = 1
    abar, noise = schedule.alphas_cumprod, schedule.one_minus_alphas_cumprod
    abar_next, noise_next = torch.cat([abar, one])[following], torch.cat([noise, one - 1])[following]
    # e^2h = abar' sigma^2 / (abar sigma'^2), and sigma^2 = sigma'^2 + abar' beta
    h = (torch.log1p(abar_next * beta / noise_next) - log_alpha) / 2
    return _Transitions(
        signal=abar[steps].sqrt(),
        sigma=noise[steps].sqrt(),
        noise=noise[steps],
        signal_next=abar_next.sqrt(),
        sigma_next=noise_next.sqrt(),
        noise_next=noise_next,
        alpha=log_alpha.exp(),
        beta=beta,
        h=h,
    )


def _eps_coefficients(prediction: str, schedule: Schedule) -> Tensor:
    """c_t and d_t of eps = c_t x_t + d_t out: float64 [T, 2]."""
    a, b = x0_coefficients(prediction, schedule).unbind(1)
    signal, sigma = schedule.signal_sigma.unbind(1)
    of_x = {"eps": torch.zeros_like(sigma), "v": sigma}.get(prediction, (1 - signal * a) / sigma)
    of_out = {"eps": torch.ones_like(sigma), "v": signal}.get(prediction, -signal * b / sigma)
    return torch.stack([of_x, of_out], dim=1)


def _table(
    schedule: Schedule,
    steps: Tensor,
    prediction: str,
    *,
    k2: Tensor,
    k3: Tensor,
    k4: Tensor | None = None,
    k5: Tensor | None = None,
    k6: Tensor | None = None,
    bounds: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The columns side by side; k0 and k1 from the prediction; the last row returns the prediction."""
    zero = torch.zeros_like(k2)
    k0, k1 = x0_coefficients(prediction, schedule)[steps.cpu()].unbind(1)
    k4, k5, k6 = (zero if column is None else column for column in (k4, k5, k6))
    if bounds is None:
        log_variance = torch.where(k5 > 0, 2 * torch.log(k5), zero)
        bounds = (log_variance, log_variance)
    table = torch.stack([k0, k1, k2, k3, k4, k5, k6, *bounds], dim=1)
    table[-1, 2:] = torch.tensor([1, 0, 0, 0, 0, 0, 0], dtype=table.dtype)
    return table
