"""What a network predicts, and how each prediction becomes another (Ho et al. 2020, section 3.2; Salimans and Ho 2022).

x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps and v = sqrt(abar) eps - sqrt(1 - abar) x_0 are x_0 and eps, turned. So each
kind is p x_t + q v, and the table of p and q says it all:

    kind                                        p                             q
    eps  the noise                              sqrt(1 - abar)                sqrt(abar)
    x0   the clean image                        sqrt(abar)                    -sqrt(1 - abar)
    v                                           0                             1
    mu   the mean of x_{t-1} given x_t and x_0  coef1 sqrt(abar) + coef2      -coef1 sqrt(1 - abar)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .schedule import Schedule, extract

PREDICTIONS = ("eps", "x0", "v", "mu")


def check_prediction(kind: str, schedule: Schedule) -> None:
    """Refuse an unknown kind, and eps where the last step holds no signal.

    Raises:
        ValueError: ``kind`` is unknown, or it is "eps" and abar_T = 0, where eps says nothing about x_0.
    """
    _check_kind(kind)
    if kind == "eps" and schedule.zero_terminal_snr:
        raise ValueError(
            "prediction: expected a kind that determines x_0 at every step, got 'eps' with zero terminal SNR, where x_T"
            " is pure noise and x_0 = (x_T - eps) / 0; use 'v' or 'x0', or a schedule that keeps some signal"
        )


def conversion(source: str, target: str, schedule: Schedule) -> Tensor:
    """a_t and b_t of target = a_t x_t + b_t source: b = q_target / q_source, a = p_target - p_source b; float64 [T, 2].

    Args:
        source, target: "eps", "x0", "v" or "mu"; the same kind twice gives exactly 0 and 1.
        schedule: where abar, coef1 and coef2 come from.

    Raises:
        ValueError: see `check_prediction`, for ``source``; ``target`` is unknown.
    """
    check_prediction(source, schedule)
    _check_kind(target)
    p_source, q_source = _coordinates(source, schedule)
    p_target, q_target = _coordinates(target, schedule)
    b = q_target / q_source
    return torch.stack([p_target - p_source * b, b], dim=1)


def x0_coefficients(kind: str, schedule: Schedule) -> Tensor:
    """a_t and b_t of x_0 = a_t x_t + b_t value, for a value of this kind: float64 [T, 2].

    Raises:
        ValueError: see `check_prediction`.
    """
    return conversion(kind, "x0", schedule)


def convert(value: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule, source: str, target: str) -> Tensor:
    """A prediction of kind ``source`` as one of kind ``target``, see `conversion`.

    Args:
        value, x_t: [B, ...].
        t: int64 [B] in [0, T).
        schedule: where the coefficients come from.
        source, target: "eps", "x0", "v" or "mu".

    Returns: [B, ...].

    Raises:
        ValueError: see `conversion`.

    Numerics: arithmetic and result in float32, or float64 if an input is: at t = 999 of the linear schedule an error of
    eps is 157 times as large in x_0, so half precision would not do.
    """
    dtype = torch.promote_types(torch.promote_types(x_t.dtype, value.dtype), torch.float32)
    table = conversion(source, target, schedule).to(dtype)
    a, b = extract(table[:, 0], t, x_t.dim()), extract(table[:, 1], t, x_t.dim())
    return a * x_t.to(dtype) + b * value.to(dtype)


def x0_from(kind: str, value: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """The clean image [B, ...] that a prediction implies. Args, errors and numerics are those of `convert`."""
    return convert(value, x_t, t, schedule, kind, "x0")


def value_from_x0(kind: str, x0: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """The value [B, ...] of a kind at x_t and x0. Args, errors and numerics are those of `convert`."""
    return convert(x0, x_t, t, schedule, "x0", kind)


def _coordinates(kind: str, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """p_t and q_t of kind = p x_t + q v: float64 [T] each."""
    signal, sigma = schedule.signal_sigma.unbind(1)
    coef1, coef2 = schedule.posterior_mean_coef1, schedule.posterior_mean_coef2
    pairs: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "eps": lambda: (sigma, signal),
        "x0": lambda: (signal, -sigma),
        "v": lambda: (torch.zeros_like(signal), torch.ones_like(signal)),
        "mu": lambda: (coef1 * signal + coef2, -coef1 * sigma),
    }
    return pairs[kind]()


def _check_kind(kind: str) -> None:
    if kind not in PREDICTIONS:
        raise ValueError(
            f"prediction: expected kind to be one of {', '.join(PREDICTIONS)}, got {kind!r}; choose one of these"
        )
