"""Betas, spacings and transitions by the rules of diffusers, and the rows of coefficients that `solver_step` takes.

diffusers keeps betas and abar in float32. The samples depend on it: beta is taken as 1 - abar / abar' of the rounded
values, which at t = 1 of the linear schedule of 1000 steps is off by 5e-4. So abar and the quotient are rounded as
there, and everything else is float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...schedule import Schedule, cosine_beta_schedule
from ...schedule import rescale_zero_terminal_snr as rescaled_in_float64

MAX_BETA = 0.999
LEAST_VARIANCE = 1e-20
SATURATED = 2.0**100
"""1 / sqrt(abar) where abar = 0: a power of two, so that x - eps keeps its sign, and clipping makes 1 of it."""
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


def laplace_alphas_cumprod(u: Tensor) -> Tensor:
    """sqrt(snr / (1 + snr)) with log snr = -sign(1/2 - u) / 2 log(1 - 2 |1/2 - u| + 1e-6), u = t / T in [0, 1]."""
    from_middle = 0.5 - u
    log_snr = -0.5 * torch.where(from_middle < 0, -1.0, 1.0) * torch.log(1 - 2 * from_middle.abs() + 1e-6)
    return torch.sigmoid(log_snr).sqrt()


def _of_laplace(num_timesteps: int) -> Tensor:
    abar = laplace_alphas_cumprod(torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps)
    return (1 - abar[1:] / abar[:-1]).clamp(max=MAX_BETA)


BETAS: dict[str, Callable[[int, float, float, torch.dtype], Tensor]] = {
    "linear": lambda n, start, end, dtype: torch.linspace(start, end, n, dtype=dtype),
    "scaled_linear": lambda n, start, end, dtype: torch.linspace(start**0.5, end**0.5, n, dtype=dtype).square(),
    "squaredcos_cap_v2": lambda n, start, end, dtype: cosine_beta_schedule(n, max_beta=MAX_BETA).to(dtype),
    "sigmoid": lambda n, start, end, dtype: (
        torch.sigmoid(torch.linspace(-6, 6, n, dtype=dtype)) * (end - start) + start
    ),
    "laplace": lambda n, start, end, dtype: _of_laplace(n).to(dtype),
}


def make_betas(config: Any, dtype: torch.dtype) -> Tensor:
    """The betas that a configuration asks for, computed in float32 or float64."""
    if config.trained_betas is not None:
        betas = torch.as_tensor(np.asarray(config.trained_betas), dtype=dtype)
    else:
        make = BETAS[config.beta_schedule]
        betas = make(config.num_train_timesteps, config.beta_start, config.beta_end, dtype)
    if not config.rescale_betas_zero_snr:
        return betas
    return rescaled_in_float64(betas) if dtype == torch.float64 else _rescaled(betas)


def _rescaled(betas: Tensor) -> Tensor:
    """`schedule.rescale_zero_terminal_snr` (Lin et al. 2023, algorithm 1) in the dtype of betas."""
    root = torch.cumprod(1 - betas, 0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    abar = root.square()
    return 1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])


def spaced(spacing: str, num_train: int, num_steps: int, offset: int) -> Any:
    """The timesteps of DDPMScheduler and DDIMScheduler, descending (Lin et al. 2023, table 2)."""
    if spacing == "linspace":
        return np.linspace(0, num_train - 1, num_steps).round()[::-1].astype(np.int64)
    if spacing == "leading":
        return np.arange(num_steps, dtype=np.int64)[::-1] * (num_train // num_steps) + offset
    return without_overrun(np.arange(num_train, 0, -num_train / num_steps))


def without_overrun(ends: np.ndarray) -> np.ndarray:
    """round(end) - 1 of the trailing spacing, without the -1 that diffusers visits last where the rounding of T / N
    leaves arange one number too many (N = 61, 103, 121 and 59 others of T = 1000)."""
    steps = np.round(ends).astype(np.int64) - 1
    return steps[steps >= 0]


@dataclass(frozen=True)
class Transitions:
    """From timesteps to those after them, float64 [N] each: abar, abar', alpha = abar / abar' and beta = 1 - alpha."""

    abar: Tensor
    abar_next: Tensor
    alpha: Tensor
    beta: Tensor

    @classmethod
    def between(cls, abar: Tensor, abar_next: Tensor) -> Transitions:
        """Of abar as it is kept, in float32."""
        alpha = abar / abar_next
        return cls(abar.double(), abar_next.double(), alpha.double(), (1 - alpha).double())

    @property
    def variance(self) -> Tensor:
        """Of the posterior: beta (1 - abar') / (1 - abar) (Ho et al. 2020, eq. 7)."""
        return (1 - self.abar_next) / (1 - self.abar) * self.beta


def x0_columns(prediction: str, abar: Tensor) -> tuple[Tensor, Tensor]:
    """k0 and k1 of x_0 = k0 x + k1 out."""
    signal, sigma = abar.sqrt(), (1 - abar).sqrt()
    if prediction == "epsilon":
        # rounded as the kernel will, so that k1 / k0 keeps to sigma where it is nearly 1
        inverse = torch.where(signal > 0, 1 / signal, SATURATED).float().double()
        return inverse, -inverse * sigma
    if prediction == "sample":
        return torch.zeros_like(signal), torch.ones_like(signal)
    return signal, -sigma


def eps_columns(prediction: str, abar: Tensor) -> tuple[Tensor, Tensor]:
    """c and d of eps = c x + d out."""
    signal, sigma = abar.sqrt(), (1 - abar).sqrt()
    if prediction == "epsilon":
        return torch.zeros_like(signal), torch.ones_like(signal)
    if prediction == "sample":
        return 1 / sigma, -signal / sigma
    return sigma, signal


def rows(*columns: Tensor) -> Tensor:
    """Columns k0 .. k6, float64 [N], and the bounds of the log-variance where the network learns it: [N, 9]."""
    bounds = columns[7:] or (torch.zeros_like(columns[0]),) * 2
    return torch.stack([*columns[:7], *bounds], dim=1)


class Rows:
    """A table of coefficients whose rows belong to timesteps, on every device that asks for it.

    Args:
        table: float64 [N, 9]. timesteps: int64 [N], of the rows. total: T; a row for a timestep in [0, T).
    """

    def __init__(self, table: Tensor, timesteps: Tensor, total: int) -> None:
        missing = torch.full((1, table.shape[1]), torch.nan, dtype=table.dtype)
        self._table = torch.cat([table, missing])
        self._row = torch.full((total + 1,), len(table))
        self._row[timesteps] = torch.arange(len(table))
        self._known: list[int] = self._row.tolist()
        self._moved: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def at(self, t: Tensor | int, device: torch.device) -> tuple[Tensor, Tensor | int]:
        """The table on a device, and the row of timestep t.

        An int [] on the device gives such a row: looked up there, and one of NaN for a timestep that has none.

        Raises:
            ValueError: t is a number that has no row.
        """
        if device not in self._moved:
            with torch.inference_mode(False):
                self._moved[device] = self._table.to(device, non_blocking=True), self._row.to(device, non_blocking=True)
        table, row = self._moved[device]
        if isinstance(t, Tensor):
            at = t.to(device, torch.int64).clamp(0, len(self._known) - 1)
            return table, row.index_select(0, at.reshape(1)).reshape(())
        if not 0 <= t < len(self._known) or self._known[t] == len(self._table) - 1:
            raise ValueError(
                f"step: expected one of the timesteps that set_timesteps chose, got {t}; "
                "iterate over scheduler.timesteps"
            )
        return table, self._known[t]


def schedule_of(config: Any) -> Schedule:
    """Of a configuration, in float64 throughout."""
    return Schedule.from_betas(make_betas(config, torch.float64))
