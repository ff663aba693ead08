"""The tolerance rule catches what it is for, on a case where the mean is much larger than the deviation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastddpm
from tests.tolerance import assert_equal_to_rounding, assert_near_peer, assert_normals_within, assert_within

Statistics = Callable[[Tensor], tuple[Tensor, Tensor]]


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """A contract case: mean 30, deviation 0.1."""
    generator = torch.Generator().manual_seed(0)
    x = 30 + 0.1 * torch.randn(2, 8, 9, 7, generator=generator)
    return x.to(dtype), torch.randn(8, generator=generator).to(dtype), torch.randn(8, generator=generator).to(dtype)


def with_statistics(statistics: Statistics, gain: float = 1.0) -> Tensor:
    x, weight, bias = inputs()
    mean, variance = statistics(x.reshape(2, 4, -1))
    n = (x.reshape(2, 4, -1) - mean[..., None]) * torch.rsqrt(variance[..., None] + 1e-6)
    n = n.reshape(x.shape) * weight[:, None, None] * gain + bias[:, None, None]
    return torch.nn.functional.silu(n)


def centred(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(-1), (x - x.mean(-1, keepdim=True)).square().mean(-1)


def difference_of_squares(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(-1), x.square().mean(-1) - x.mean(-1).square()


def bfloat16_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, variance = centred(x)
    return mean.bfloat16().float(), variance.bfloat16().float()


def references() -> tuple[Tensor, Tensor]:
    exact = fastddpm.group_norm_silu(*inputs(torch.float64), 4)
    single = fastddpm.group_norm_silu(*inputs(), 4)
    assert isinstance(exact, Tensor)
    assert isinstance(single, Tensor)
    # the float32 inputs are what both are given
    x, weight, bias = (v.double() for v in inputs())
    exact = fastddpm.group_norm_silu(x, weight, bias, 4)
    assert isinstance(exact, Tensor)
    return exact, single


def test_a_right_implementation_passes() -> None:
    assert_within(with_statistics(centred), *references())


@pytest.mark.parametrize(
    "planted",
    [
        lambda: with_statistics(difference_of_squares),
        lambda: with_statistics(bfloat16_statistics),
        lambda: with_statistics(centred, gain=1.003),
        lambda: with_statistics(centred).where(torch.arange(7) < 6, torch.nan),
    ],
    ids=["E[x^2] - E[x]^2", "bf16 statistics", "0.3% gain", "an unwritten element"],
)
def test_a_planted_fault_fails(planted: Callable[[], Tensor]) -> None:
    with pytest.raises(AssertionError):
        assert_within(planted(), *references())


def test_the_other_rules_fail_too() -> None:
    z = torch.randn(1000, dtype=torch.float64)
    assert_normals_within(z * (1 + 1e-6), z)
    with pytest.raises(AssertionError, match="relative"):
        assert_normals_within(z * (1 + 1e-5), z)
    with pytest.raises(AssertionError, match="largest"):
        assert_normals_within(z + 2e-3 * (torch.arange(1000) == 5), z)
    assert_equal_to_rounding(torch.tensor(1.0), torch.tensor(1.0 + 2**-23))
    with pytest.raises(AssertionError, match="roundings"):
        assert_equal_to_rounding(torch.tensor(1.0), torch.tensor(1.0 + 2**-18))
    assert_near_peer(torch.tensor([1.0]), torch.tensor([1.00005]))
    with pytest.raises(AssertionError, match="other library"):
        assert_near_peer(torch.tensor([1.0]), torch.tensor([1.0003]))
