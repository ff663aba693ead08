"""Gaussian data x_0 ~ N(m, s^2): the best network, and all that a sampler makes of it, are known in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastddpm.schedule import Schedule


@dataclass(frozen=True)
class GaussianData:
    """Every pixel by itself is N(mean, deviation^2)."""

    mean: float
    deviation: float

    def marginal(self, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """Mean and variance of x_t: float64 [T] each."""
        signal, sigma = schedule.signal_sigma.unbind(1)
        return signal * self.mean, (signal * self.deviation) ** 2 + sigma**2

    def network(self, kind: str, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """The best network of a kind is out = a_t x_t + b_t: float64 [T] each, from E[x_0 | x_t]."""
        signal, sigma = schedule.signal_sigma.unbind(1)
        mean, variance = self.marginal(schedule)
        gain = signal * self.deviation**2 / variance  # E[x0 | x_t] = m + gain (x_t - signal m)
        x0 = (gain, self.mean - gain * mean)
        eps = ((1 - signal * x0[0]) / sigma, -signal * x0[1] / sigma)
        if kind == "x0":
            return x0
        if kind == "eps":
            return eps
        if kind == "v":
            return signal * eps[0] - sigma * x0[0], signal * eps[1] - sigma * x0[1]
        coef1, coef2 = schedule.posterior_mean_coef1, schedule.posterior_mean_coef2
        return coef1 * x0[0] + coef2, coef1 * x0[1]


@dataclass(frozen=True)
class Affine:
    """x = slope z_T + offset + N(0, variance), z_T the noise that the sampling starts from."""

    slope: Tensor
    offset: Tensor
    variance: Tensor

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of x when z_T ~ N(0, 1)."""
        return self.offset, self.slope**2 + self.variance


def propagate(table: Tensor, steps: Tensor, network: tuple[Tensor, Tensor], start: Affine) -> list[Affine]:
    """The state after each row of a table, without a draw: x -> k2 pred + k3 x + k4 pred_prev + k5 z + k6 out."""
    states, x, pred = [], start, None
    zero = torch.zeros((), dtype=torch.float64)
    for row, t in zip(table, steps, strict=True):
        k0, k1, k2, k3, k4, k5, k6 = row[:7].unbind()
        a, b = network[0][t], network[1][t]
        before = (zero, zero) if pred is None else pred
        pred = ((k0 + k1 * a) * x.slope, (k0 + k1 * a) * x.offset + k1 * b)
        factor = k2 * (k0 + k1 * a) + k3 + k6 * a
        assert bool(k4 == 0) or bool(x.variance == 0), "a multistep method would correlate its noises"
        x = Affine(
            slope=factor * x.slope + k4 * before[0],
            offset=factor * x.offset + k2 * k1 * b + k6 * b + k4 * before[1],
            variance=factor**2 * x.variance + k5**2,
        )
        states.append(x)
    return states


def standard_normal() -> Affine:
    """Where sampling starts: x_T = z_T."""
    one = torch.ones((), dtype=torch.float64)
    return Affine(one, 0 * one, 0 * one)
