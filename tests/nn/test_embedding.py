"""The sinusoids of the timestep against their formula, and in the precision that they need."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastddpm.nn import TimeEmbedding, sinusoidal_embedding
from tests.tolerance import assert_equal_to_rounding


def entry(kind: str, t: float, i: int, channels: int) -> float:
    """Element i of e(t), written from the papers."""
    half = channels // 2
    w = 10000.0 ** (-(i % half) / (half - 1 if kind in ("ddpm", "ddpm_cos_first") else half))
    sine_first = kind in ("ddpm", "adm_sin_first")
    return math.sin(w * t) if (i < half) == sine_first else math.cos(w * t)


@pytest.mark.parametrize("kind", ["ddpm", "adm", "ddpm_cos_first", "adm_sin_first"])
@pytest.mark.parametrize("t", [0.0, 1.0, 17.5, 999.0])
def test_values_are_those_of_the_formula(kind: str, t: float) -> None:
    e = sinusoidal_embedding(torch.tensor([t], dtype=torch.float64), 128, kind, torch.float64)[0]
    expected = torch.tensor([entry(kind, t, i, 128) for i in range(128)], dtype=torch.float64)
    assert_equal_to_rounding(e, expected, scale=max(t, 1.0))  # the rounding of w is multiplied by t


@pytest.mark.parametrize("kind", ["ddpm", "adm"])
def test_float32_is_as_good_as_the_rounding_of_the_angle(kind: str) -> None:
    t = torch.arange(1000)
    e32, e64 = (sinusoidal_embedding(t, 128, kind, dtype) for dtype in (torch.float32, torch.float64))
    assert_equal_to_rounding(e32, e64, ulps=4, scale=t.clamp(min=1).unsqueeze(1))


def test_integer_and_float_timesteps_agree() -> None:
    t = torch.tensor([0, 3, 999])
    for other in (t.int(), t.float(), t.double()):
        assert torch.equal(sinusoidal_embedding(t, 32), sinusoidal_embedding(other, 32))


def test_a_scale_multiplies_the_timesteps() -> None:
    t = torch.tensor([0, 3, 3999])
    module = TimeEmbedding(32, 8, "adm", scale=0.25)
    assert torch.equal(seen_by_linear1(module, t), sinusoidal_embedding(t / 4, 32, "adm"))
    wide = seen_by_linear1(module.double(), t)
    assert torch.equal(wide, sinusoidal_embedding(t.double() / 4, 32, "adm", torch.float64))
    assert "scale=0.25" in repr(module)


def test_an_odd_length_ends_in_zero() -> None:
    e = sinusoidal_embedding(torch.tensor([5]), 7)
    assert torch.equal(e[:, :6], sinusoidal_embedding(torch.tensor([5]), 6))
    assert e[0, 6] == 0


@pytest.mark.parametrize("channels", [2, 3])
def test_one_frequency_alone(channels: int) -> None:
    e = sinusoidal_embedding(torch.tensor([2.0]), channels, dtype=torch.float64)
    assert_equal_to_rounding(e[0, :2], torch.tensor([math.sin(2.0), math.cos(2.0)], dtype=torch.float64))


def seen_by_linear1(module: TimeEmbedding, t: Tensor) -> Tensor:
    seen: list[Tensor] = []
    with module.linear1.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        module(t)
    return seen[0]


def test_under_autocast_the_sinusoid_is_float32() -> None:
    assert torch.tensor(999).bfloat16() == torch.tensor(1000).bfloat16()  # so t itself must not be rounded
    module, t = TimeEmbedding(32, 64), torch.tensor([999, 1000])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        e = seen_by_linear1(module, t)
    assert e.dtype == torch.float32
    assert torch.equal(e, sinusoidal_embedding(t, 32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_with_weights_in_half_precision_the_sinusoid_is_rounded_once(dtype: torch.dtype) -> None:
    module, t = TimeEmbedding(32, 64).to(dtype), torch.tensor([999, 1000])
    e = seen_by_linear1(module, t)
    assert torch.equal(e, sinusoidal_embedding(t, 32).to(dtype))
    assert not torch.equal(e[0], e[1])


def test_with_float64_weights_the_sinusoid_is_float64() -> None:
    module, t = TimeEmbedding(32, 64).double(), torch.tensor([999])
    assert torch.equal(seen_by_linear1(module, t), sinusoidal_embedding(t, 32, dtype=torch.float64))


def test_the_two_layers() -> None:
    module, t = TimeEmbedding(8, 16, "adm").double(), torch.tensor([3, 500])
    e = sinusoidal_embedding(t, 8, "adm", torch.float64)
    h = e @ module.linear1.weight.T + module.linear1.bias
    expected = (h / (1 + torch.exp(-h))) @ module.linear2.weight.T + module.linear2.bias
    assert_equal_to_rounding(module(t), expected, ulps=32, scale=1.0)


def test_frequencies_fall_from_1_to_1_over_theta() -> None:
    e = sinusoidal_embedding(torch.tensor([1.0], dtype=torch.float64), 8, dtype=torch.float64, theta=100.0)[0]
    expected = [-i / 3 * math.log(100) for i in range(4)]
    assert_equal_to_rounding(e[:4].asin().log(), torch.tensor(expected, dtype=torch.float64), scale=5.0)


def test_errors() -> None:
    t = torch.tensor([1])
    with pytest.raises(ValueError, match="sinusoidal_embedding: expected channels >= 2, got 1; "):
        sinusoidal_embedding(t, 1)
    with pytest.raises(ValueError, match=r"sinusoidal_embedding: expected kind 'ddpm' or 'adm' or .*, got 'fourier'; "):
        sinusoidal_embedding(t, 8, "fourier")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"sinusoidal_embedding: expected dtype float32 or float64, got torch.bfloat"):
        sinusoidal_embedding(t, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="sinusoidal_embedding: expected theta > 0, got 0; "):
        sinusoidal_embedding(t, 8, theta=0)
