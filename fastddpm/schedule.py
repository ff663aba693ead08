"""Noise schedules: functions that make betas, and the tables that follow from them. All is float64 and on the CPU.

Index t = 0..T-1 is the least to the most noisy step: ``alphas_cumprod[t]`` is abar_{t+1} of Ho et al. 2020.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FIRST_LOG_VARIANCES = ("copy", "tiny")
TINY_VARIANCE = 1e-20


def linear_beta_schedule(num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Variances that grow linearly: beta = linspace(beta_1, beta_T) (Ho et al. 2020, section 4).

    The ends are not rescaled with T: with fewer than 1000 steps pass larger ones.

    Args:
        num_timesteps: T >= 1.
        beta_start, beta_end: beta_1 and beta_T, 0 < beta_start <= beta_end < 1.

    Returns: betas, float64 [T].

    Raises:
        ValueError: a number out of its range.
    """
    _check_steps("linear_beta_schedule", num_timesteps)
    _check_ends("linear_beta_schedule", beta_start, beta_end)
    return torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)


def quadratic_beta_schedule(num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Variances whose square root grows linearly: beta = linspace(sqrt(beta_1), sqrt(beta_T))^2.

    Args, returns and errors are those of `linear_beta_schedule`.
    """
    _check_steps("quadratic_beta_schedule", num_timesteps)
    _check_ends("quadratic_beta_schedule", beta_start, beta_end)
    return torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64).square()


def cosine_beta_schedule(num_timesteps: int, s: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """abar_t = f(t) / f(0) with f(t) = cos^2((t/T + s) / (1 + s) pi/2) (Nichol and Dhariwal 2021, eq. 17).

    Args:
        num_timesteps: T >= 1.
        s: offset > 0 that keeps the first beta from vanishing.
        max_beta: largest beta, in (0, 1]; it binds at the last step, where abar would be 0.

    Returns: betas, float64 [T].

    Raises:
        ValueError: a number out of its range.
    """
    _check_steps("cosine_beta_schedule", num_timesteps)
    if not 0 < s < math.inf:
        raise ValueError(f"cosine_beta_schedule: expected s > 0, got {s}; 0.008 is usual")
    _check_max_beta("cosine_beta_schedule", max_beta)
    u = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    return _betas_from_alphas_cumprod(torch.cos((u + s) / (1 + s) * math.pi / 2).square()).clamp(max=max_beta)


def sigmoid_beta_schedule(
    num_timesteps: int, start: float = -3.0, end: float = 3.0, tau: float = 1.0, max_beta: float = 0.999
) -> Tensor:
    """abar_t = (g(1) - g(t/T)) / (g(1) - g(0)), g(u) = sigmoid((start + (end - start) u) / tau) (Jabri et al. 2022).

    Args:
        num_timesteps: T >= 1.
        start, end: the stretch of the sigmoid that is used, start < end.
        tau: temperature > 0.
        max_beta: largest beta, in (0, 1]; it binds at the last step, where abar would be 0.

    Returns: betas, float64 [T].

    Raises:
        ValueError: a number out of its range.
    """
    _check_steps("sigmoid_beta_schedule", num_timesteps)
    if not -math.inf < start < end < math.inf:
        raise ValueError(f"sigmoid_beta_schedule: expected start < end, got {start} and {end}; -3 and 3 are usual")
    if not 0 < tau < math.inf:
        raise ValueError(f"sigmoid_beta_schedule: expected tau > 0, got {tau}; 1 is usual")
    _check_max_beta("sigmoid_beta_schedule", max_beta)
    u = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    g = torch.sigmoid((start + (end - start) * u) / tau)
    return _betas_from_alphas_cumprod((g[-1] - g) / (g[-1] - g[0])).clamp(max=max_beta)


def log_snr_beta_schedule(num_timesteps: int, log_snr_max: float = 9.0, log_snr_min: float = -9.0) -> Tensor:
    """ln(abar_t / (1 - abar_t)) falls linearly from log_snr_max at the first step to log_snr_min at the last.

    It is SNR(t) = exp(-gamma(t)) of Kingma et al. 2021 (section 3.2) with gamma linear. Few steps and a first noise
    level below a grey level make a good bound on the likelihood: sqrt(1 - abar_1) is nearly exp(-log_snr_max / 2).

    Args:
        num_timesteps: T >= 2.
        log_snr_max, log_snr_min: natural logarithms of the ratio of variances, 36 > log_snr_max > log_snr_min > -36
            (beyond, float64 does not tell abar from 0 or 1).

    Returns: betas, float64 [T].

    Raises:
        ValueError: a number out of its range.
    """
    _check_steps("log_snr_beta_schedule", num_timesteps, least=2)
    if not 36 > log_snr_max > log_snr_min > -36:
        raise ValueError(
            "log_snr_beta_schedule: expected 36 > log_snr_max > log_snr_min > -36, "
            f"got {log_snr_max} and {log_snr_min}; 9 and -9 are usual"
        )
    log_snr = torch.linspace(log_snr_max, log_snr_min, num_timesteps, dtype=torch.float64)
    log_abar = torch.nn.functional.logsigmoid(log_snr)
    return -torch.expm1(torch.diff(log_abar, prepend=log_abar.new_zeros(1)))


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(abar) so that the last is 0 and the first is kept (Lin et al. 2023, algorithm 1).

    Args:
        betas: [T], T >= 2, in (0, 1); the last may be 1, and then nothing changes.

    Returns: betas, float64 [T]; the last is exactly 1.

    Raises:
        ValueError: fewer than two betas, or one out of its range.
    """
    _check_betas("rescale_zero_terminal_snr", betas)
    if len(betas) < 2:
        raise ValueError("rescale_zero_terminal_snr: expected at least 2 betas, got 1; one step has no end to move")
    root = torch.cumprod(1 - betas.detach().to("cpu", torch.float64), 0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return _betas_from_alphas_cumprod(torch.cat([root.new_ones(1), root.square()]))


@dataclass(frozen=True, eq=False)
class Schedule:
    """The tables of one noise schedule, each float64 [T] on the CPU; `make_schedule` or `Schedule.from_betas` makes it.

    They are named and defined as in `Schedule.from_betas`; log_snr is -inf where abar is 0.
    """

    betas: Tensor
    alphas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    one_minus_alphas_cumprod: Tensor
    log_snr: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor
    first_log_variance: str

    @classmethod
    def from_betas(cls, betas: Tensor, first_log_variance: str = "copy") -> Schedule:
        """All tables from the variances of the forward process.

        alpha = 1 - beta; abar_t = prod alpha; log_snr = ln(abar / (1 - abar)); and of q(x_{t-1} | x_t, x_0) (Ho et al.
        2020, eq. 6-7): variance = beta_t (1 - abar_{t-1}) / (1 - abar_t), and mean = coef1 x_0 + coef2 x_t with
        coef1 = sqrt(abar_{t-1}) beta_t / (1 - abar_t), coef2 = sqrt(alpha_t) (1 - abar_{t-1}) / (1 - abar_t).

        Args:
            betas: [T], T >= 1, in (0, 1); the last may be 1 (zero terminal signal-to-noise ratio).
            first_log_variance: what ln(posterior_variance[0] = 0) becomes: "copy" of index 1 (of ln beta if T = 1), or
                "tiny", ln 1e-20. Samples do not depend on it; bits per dimension do.

        Raises:
            ValueError: betas out of range or not one-dimensional; an unknown first_log_variance.

        Numerics: ln abar is summed, and abar = exp(ln abar), 1 - abar = -expm1(ln abar): no cancellation at either end.
        """
        _check_betas("Schedule.from_betas", betas)
        if first_log_variance not in FIRST_LOG_VARIANCES:
            raise ValueError(
                "Schedule.from_betas: expected first_log_variance to be one of "
                f"{', '.join(FIRST_LOG_VARIANCES)}, got {first_log_variance!r}; choose one of these"
            )
        betas = betas.detach().to("cpu", torch.float64)
        alphas = 1 - betas
        log_alphas_cumprod = torch.cumsum(torch.log1p(-betas), 0)
        alphas_cumprod = torch.exp(log_alphas_cumprod)
        alphas_cumprod_prev = torch.cat([betas.new_ones(1), alphas_cumprod[:-1]])
        noise = -torch.expm1(log_alphas_cumprod)
        noise_prev = torch.cat([betas.new_zeros(1), noise[:-1]])
        variance = betas * noise_prev / noise
        if first_log_variance == "copy":
            log_variance = torch.log(torch.cat([variance[1:2] if len(betas) > 1 else betas, variance[1:]]))
        else:
            log_variance = torch.log(variance.clamp(min=TINY_VARIANCE))
        return cls(
            betas=betas,
            alphas=alphas,
            alphas_cumprod=alphas_cumprod,
            alphas_cumprod_prev=alphas_cumprod_prev,
            one_minus_alphas_cumprod=noise,
            log_snr=log_alphas_cumprod - torch.log(noise),
            posterior_variance=variance,
            posterior_log_variance_clipped=log_variance,
            posterior_mean_coef1=alphas_cumprod_prev.sqrt() * betas / noise,
            posterior_mean_coef2=alphas.sqrt() * noise_prev / noise,
            first_log_variance=first_log_variance,
        )

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.betas)

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the last step holds no signal at all."""
        return bool(self.alphas_cumprod[-1] == 0)

    @property
    def snr(self) -> Tensor:
        """abar_t / (1 - abar_t): float64 [T]."""
        return self.alphas_cumprod / self.one_minus_alphas_cumprod

    @property
    def signal_sigma(self) -> Tensor:
        """sqrt(abar_t) and sqrt(1 - abar_t): float64 [T, 2], the table of q_sample."""
        return torch.stack([self.alphas_cumprod.sqrt(), self.one_minus_alphas_cumprod.sqrt()], dim=1)


SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "linear": linear_beta_schedule,
    "cosine": cosine_beta_schedule,
    "sigmoid": sigmoid_beta_schedule,
    "quadratic": quadratic_beta_schedule,
    "log_snr": log_snr_beta_schedule,
}


def make_schedule(
    name: str,
    num_timesteps: int = 1000,
    *,
    zero_terminal_snr: bool = False,
    first_log_variance: str = "copy",
    **options: float,
) -> Schedule:
    """A schedule by name.

    Args:
        name: "linear", "cosine", "sigmoid", "quadratic" or "log_snr".
        num_timesteps: T >= 1.
        zero_terminal_snr: rescale so that abar_T = 0, see `rescale_zero_terminal_snr`.
        first_log_variance: "copy" or "tiny", see `Schedule.from_betas`.
        **options: of the function that makes the betas, such as beta_start.

    Raises:
        ValueError: an unknown name, or a number out of range.
        TypeError: an option that this schedule does not have.
    """
    if name not in SCHEDULES:
        raise ValueError(
            f"make_schedule: expected name to be one of {', '.join(SCHEDULES)}, got {name!r}; "
            "choose one of these, or pass betas of your own to Schedule.from_betas"
        )
    known = list(inspect.signature(SCHEDULES[name]).parameters)[1:]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise TypeError(
            f"make_schedule: expected options of {name!r} among {', '.join(known)}, got {', '.join(unknown)}; "
            "leave out what it does not have"
        )
    betas = SCHEDULES[name](num_timesteps, **options)
    return Schedule.from_betas(rescale_zero_terminal_snr(betas) if zero_terminal_snr else betas, first_log_variance)


def extract(table: Tensor, t: Tensor, ndim: int = 4) -> Tensor:
    """table[t], shaped [B, 1, ..., 1] with ``ndim`` dimensions so that it multiplies a batch.

    Args:
        table: [T]; copied to the device of t when it is elsewhere.
        t: int64 [B] in [0, T).
        ndim: number of dimensions of the batch.
    """
    return table.to(t.device)[t].reshape(-1, *[1] * (ndim - 1))


def _betas_from_alphas_cumprod(alphas_cumprod: Tensor) -> Tensor:
    """beta_t = 1 - abar_t / abar_{t-1} for t = 1..T, from abar_0 .. abar_T up to a common factor."""
    return 1 - alphas_cumprod[1:] / alphas_cumprod[:-1]


def _check_steps(op: str, num_timesteps: int, least: int = 1) -> None:
    if not num_timesteps >= least or num_timesteps % 1:
        raise ValueError(f"{op}: expected an integer num_timesteps >= {least}, got {num_timesteps}; 1000 is usual")


def _check_ends(op: str, beta_start: float, beta_end: float) -> None:
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(
            f"{op}: expected 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}; "
            "1e-4 and 0.02 are usual for 1000 steps"
        )


def _check_max_beta(op: str, max_beta: float) -> None:
    if not 0 < max_beta <= 1:
        raise ValueError(f"{op}: expected max_beta in (0, 1], got {max_beta}; 0.999 is usual")


def _check_betas(op: str, betas: Tensor) -> None:
    if betas.dim() != 1 or len(betas) < 1:
        raise ValueError(f"{op}: expected betas of shape [T], got {list(betas.shape)}; pass one variance a step")
    if not (bool((betas > 0).all()) and bool((betas[:-1] < 1).all()) and bool(betas[-1] <= 1)):
        raise ValueError(
            f"{op}: expected betas in (0, 1), the last at most 1, got {betas.min().item()} to {betas.max().item()}; "
            "a schedule adds some noise at each step and removes all signal at the last alone"
        )
