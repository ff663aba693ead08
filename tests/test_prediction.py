"""R4 of the theory: the four kinds of prediction, each from its definition, and each as any other."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fastddpm.prediction import (
    PREDICTIONS,
    check_prediction,
    conversion,
    convert,
    value_from_x0,
    x0_coefficients,
    x0_from,
)
from fastddpm.schedule import Schedule, make_schedule
from tests.tolerance import assert_equal_to_rounding

SCHEDULES = {
    "linear": make_schedule("linear", 1000),
    "cosine": make_schedule("cosine", 1000),
    "log_snr": make_schedule("log_snr", 20),
    "zero terminal SNR": make_schedule("linear", 1000, zero_terminal_snr=True),
}
CASES = [
    pytest.param(schedule, source, target, id=f"{source}-{target}-{name}")
    for name, schedule in SCHEDULES.items()
    for source, target in itertools.product(PREDICTIONS, PREDICTIONS)
    if not (schedule.zero_terminal_snr and source == "eps")
]
every_conversion = pytest.mark.parametrize(("schedule", "source", "target"), CASES)


def definitions(schedule: Schedule) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """t = 0..T-1, x_t made of a drawn x_0 and eps, and the value of each kind by its definition; all [T, 3]."""
    t = torch.arange(schedule.num_timesteps)
    x0, eps = torch.randn(2, len(t), 3, dtype=torch.float64)
    abar, noise = schedule.alphas_cumprod[:, None], schedule.one_minus_alphas_cumprod[:, None]
    x_t = abar.sqrt() * x0 + noise.sqrt() * eps
    v = abar.sqrt() * eps - noise.sqrt() * x0
    mu = schedule.posterior_mean_coef1[:, None] * x0 + schedule.posterior_mean_coef2[:, None] * x_t
    return t, x_t, {"eps": eps, "x0": x0, "v": v, "mu": mu}


@every_conversion
def test_each_kind_becomes_each_other(schedule: Schedule, source: str, target: str) -> None:
    t, x_t, values = definitions(schedule)
    found = convert(values[source], x_t, t, schedule, source, target)
    a, b = conversion(source, target, schedule)[:, :, None].abs().unbind(1)
    # a rounding of x_t, or of the source, is so much in the target
    scale = a * x_t.abs() + b * (values[source].abs() + x_t.abs()) + values[target].abs()
    assert_equal_to_rounding(found, values[target], ulps=20, scale=scale)


@every_conversion
def test_conversions_are_inverse_of_each_other(schedule: Schedule, source: str, target: str) -> None:
    if schedule.zero_terminal_snr and target == "eps":
        schedule = make_schedule("linear", 1000)
    a, b = conversion(source, target, schedule).unbind(1)
    c, d = conversion(target, source, schedule).unbind(1)
    assert_equal_to_rounding(b * d, 1.0)
    assert_equal_to_rounding(c + d * a, 0.0, scale=c.abs() + d.abs() + (d * a).abs())
    if source == target:
        assert torch.equal(a, torch.zeros_like(a)) and torch.equal(b, torch.ones_like(b))


@every_conversion
def test_a_detour_changes_nothing(schedule: Schedule, source: str, target: str) -> None:
    t, x_t, values = definitions(schedule)
    direct = convert(values[source], x_t, t, schedule, source, target)
    by_x0 = value_from_x0(target, x0_from(source, values[source], x_t, t, schedule), x_t, t, schedule)
    a, b = conversion(source, "x0", schedule)[:, :, None].abs().unbind(1)
    c, d = conversion("x0", target, schedule)[:, :, None].abs().unbind(1)
    scale = c * x_t.abs() + d * (a * x_t.abs() + b * values[source].abs())
    assert_equal_to_rounding(by_x0, direct, ulps=20, scale=scale)


def test_published_amplification() -> None:
    """An error of eps in x_0, for the linear schedule: 157.4 at t = 999 and 3.44 at t = 500."""
    schedule = SCHEDULES["linear"]
    b = x0_coefficients("eps", schedule)[:, 1].abs()
    assert f"{b[999]:.1f}" == "157.4" and f"{b[500]:.2f}" == "3.44"
    assert x0_coefficients("x0", schedule).unique(dim=0).tolist() == [[0, 1]]
    assert torch.equal(x0_coefficients("v", schedule), schedule.signal_sigma * torch.tensor([1, -1]))


def test_half_precision_inputs_are_computed_in_float32() -> None:
    """In bfloat16 arithmetic x_0 at t = 999 would be off by more than 0.1, and sigma at t = 0 would be 0."""
    schedule, t = SCHEDULES["linear"], torch.tensor([0, 500, 999])
    x_t, eps = torch.randn(2, 3, 2, 4, 4).to(torch.bfloat16)
    found = x0_from("eps", eps, x_t, t, schedule)
    exact = x0_from("eps", eps.double(), x_t.double(), t, schedule)
    assert found.dtype == torch.float32 and exact.dtype == torch.float64
    a, b = x0_coefficients("eps", schedule)[t].reshape(3, 2, 1, 1, 1).unbind(1)
    assert_equal_to_rounding(found, exact, ulps=2, scale=(a * x_t).abs() + (b * eps).abs())
    assert (a.bfloat16() * x_t + b.bfloat16() * eps - exact)[2].abs().max() > 0.1
    assert (1 - schedule.alphas_cumprod.bfloat16()).sqrt()[0] == 0 and schedule.signal_sigma[0, 1] > 0.009


def test_float32_keeps_its_precision_from_v_to_eps() -> None:
    """At t = 0 a detour by x_0 in float32 would divide its rounding by sigma = 0.01."""
    schedule = SCHEDULES["linear"]
    t, x_t, values = definitions(schedule)
    x_t, v = x_t.float(), values["v"].float()
    exact = convert(v.double(), x_t.double(), t, schedule, "v", "eps")
    found = convert(v, x_t, t, schedule, "v", "eps")
    detour = value_from_x0("eps", x0_from("v", v, x_t, t, schedule), x_t, t, schedule)
    assert_equal_to_rounding(found, exact, ulps=2, scale=x_t.abs() + v.abs())
    with pytest.raises(AssertionError, match="differ by more than 2 roundings"):
        assert_equal_to_rounding(detour, exact, ulps=2, scale=x_t.abs() + v.abs())


def test_zero_terminal_snr() -> None:
    """x_T is pure noise: eps is x_T whatever x_0 is; v is -x_0, and says what eps cannot."""
    schedule, t = SCHEDULES["zero terminal SNR"], torch.tensor([999])
    x_t, x0 = torch.randn(2, 1, 5, dtype=torch.float64)
    assert torch.equal(value_from_x0("v", x0, x_t, t, schedule), -x0)
    assert torch.equal(x0_from("v", -x0, x_t, t, schedule), x0)
    assert torch.equal(value_from_x0("eps", x0, x_t, t, schedule), x_t)
    for kind in ("x0", "v", "mu"):
        check_prediction(kind, schedule)
        assert x0_coefficients(kind, schedule).isfinite().all()


def test_shapes_and_dtypes() -> None:
    schedule = SCHEDULES["log_snr"]
    for shape in ((4,), (4, 3), (4, 3, 2, 2)):
        value, x_t = torch.randn(2, *shape)
        assert convert(value, x_t, torch.tensor([0, 3, 3, 19]), schedule, "eps", "mu").shape == shape
    assert convert(value, x_t.double(), torch.tensor([0, 3, 3, 19]), schedule, "v", "eps").dtype == torch.float64
    assert conversion("mu", "v", schedule).dtype == torch.float64


def test_errors() -> None:
    schedule = SCHEDULES["zero terminal SNR"]
    value, x_t, t = torch.randn(1, 2), torch.randn(1, 2), torch.tensor([3])
    for refused in (
        lambda: check_prediction("eps", schedule),
        lambda: x0_coefficients("eps", schedule),
        lambda: x0_from("eps", value, x_t, t, schedule),
        lambda: convert(value, x_t, t, schedule, "eps", "v"),
    ):
        with pytest.raises(
            ValueError, match=r"'eps' with zero terminal SNR, .* x_0 = \(x_T - eps\) / 0; use 'v' or 'x0'"
        ):
            refused()
    for unknown in (
        lambda: check_prediction("noise", schedule),
        lambda: conversion("v", "noise", schedule),
        lambda: value_from_x0("noise", value, x_t, t, schedule),
    ):
        with pytest.raises(ValueError, match="prediction: expected kind to be one of eps, x0, v, mu, got 'noise'"):
            unknown()
