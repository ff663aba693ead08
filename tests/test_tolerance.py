"""The tolerance rule itself: what is right passes, and planted faults fail."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastddpm
from tests.ops.cases import CASES, Inputs, converted
from tests.tolerance import assert_equal_to_rounding, assert_near_peer, assert_normals_within, assert_within

CASE = next(case for case in CASES if case.name == "mean much larger than the deviation")


def centred(g: Tensor) -> tuple[Tensor, Tensor]:
    mean = g.mean(dim=-1, keepdim=True)
    return mean, (g - mean).square().mean(dim=-1, keepdim=True)


def difference_of_squares(g: Tensor) -> tuple[Tensor, Tensor]:
    mean = g.mean(dim=-1, keepdim=True)
    return mean, g.square().mean(dim=-1, keepdim=True) - mean.square()


def kept_in_bfloat16(g: Tensor) -> tuple[Tensor, Tensor]:
    mean, variance = centred(g)
    return mean.bfloat16().to(g.dtype), variance.bfloat16().to(g.dtype)


def normalised(
    inputs: Inputs, statistics: Callable[[Tensor], tuple[Tensor, Tensor]] = centred, gain: float = 1
) -> Tensor:
    """group_norm_silu of the plain case, written anew, with a place for a fault."""
    x, wide = inputs["x"], torch.float64 if inputs["x"].dtype == torch.float64 else torch.float32
    groups = x.to(wide).contiguous().unflatten(1, (inputs["num_groups"], -1)).flatten(2)
    mean, variance = statistics(groups)
    n = ((groups - mean) * torch.rsqrt(variance + 1e-6)).reshape(x.shape)
    weight, bias = (inputs[name].to(wide).reshape(-1, 1, 1) for name in ("weight", "bias"))
    return (torch.nn.functional.silu(n * weight + bias) * gain).to(x.dtype)


FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
FAULTS = [
    pytest.param(centred, 1.003, (FLOAT32, FLOAT16, BFLOAT16), id="a gain of 0.3%"),
    pytest.param(kept_in_bfloat16, 1.0, (FLOAT32, FLOAT16, BFLOAT16), id="statistics in bfloat16"),
    # mean 100, deviation 1: off by 100^2 2^-24 = 6e-4, less than the 2e-3 to which bfloat16 rounds
    pytest.param(difference_of_squares, 1.0, (FLOAT32, FLOAT16), id="E[x^2] - E[x]^2"),
]


@pytest.mark.parametrize(("fault", "gain", "dtypes"), FAULTS)
def test_planted_faults_fail(
    fault: Callable[[Tensor], tuple[Tensor, Tensor]], gain: float, dtypes: tuple[torch.dtype, ...]
) -> None:
    """On a contract case whose mean is much larger than its deviation; without the fault it passes."""
    for dtype in dtypes:
        inputs = CASE.inputs(dtype)
        in64, in32 = (normalised(converted(inputs, wide)) for wide in (torch.float64, torch.float32))
        assert_within(normalised(inputs), in64, in32)
        with pytest.raises(AssertionError, match="of the error is"):
            assert_within(normalised(inputs, fault, gain), in64, in32)


def test_the_case_is_what_the_op_computes() -> None:
    inputs = CASE.inputs()
    in64, in32 = (normalised(converted(inputs, wide)) for wide in (torch.float64, torch.float32))
    y = fastddpm.group_norm_silu(**inputs)
    assert isinstance(y, Tensor)
    assert_within(y, in64, in32)


def test_rule_against_its_formula() -> None:
    """2 ||n - r|| + 4 eps ||r||, on each of the two norms: just below passes, just above fails."""
    r = torch.tensor([3.0, -4.0, 0.1], dtype=torch.float64)
    n = r.float()
    rounding = n.double() - r
    for norm, direction in (
        (2, torch.tensor([0.6, -0.8, 0.0], dtype=torch.float64)),  # the 2-norm is the one that is reached
        (math.inf, torch.tensor([0.0, -1.0, 0.0], dtype=torch.float64)),
    ):
        limits = [2 * rounding.norm(p) + 4 * torch.finfo(torch.float32).eps * r.norm(p) for p in (2, math.inf)]
        reached = min(limit / direction.norm(p) for limit, p in zip(limits, (2, math.inf), strict=True))
        assert_within(r + 0.999 * reached * direction, r, n)
        with pytest.raises(AssertionError, match="2-norm" if norm == 2 else "maximum"):
            assert_within(r + 1.001 * reached * direction, r, n)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_fails(value: float) -> None:
    r = torch.ones(3, dtype=torch.float64)
    impl = torch.ones(3)
    impl[1] = value
    with pytest.raises(AssertionError, match="2-norm"):
        assert_within(impl, r, r.float())


def test_references_of_the_wrong_kind_fail() -> None:
    r = torch.ones(3, dtype=torch.float64)
    for impl, ref64, ref32 in ((r, r.float(), r.float()), (r, r, r), (r[:2], r, r.float())):
        with pytest.raises(AssertionError):
            assert_within(impl, ref64, ref32)
    assert_within(torch.ones(0), r[:0], r[:0].float())


def test_equal_to_rounding() -> None:
    eps = torch.finfo(torch.float64).eps
    assert_equal_to_rounding(1.0, 1 + 4 * eps, ulps=4.1)
    assert_equal_to_rounding(torch.tensor([math.inf, 0.0]), torch.tensor([math.inf, 0.0]))
    assert_equal_to_rounding(torch.ones(2), 1 + torch.finfo(torch.float32).eps, ulps=2)  # the coarser dtype decides
    assert_equal_to_rounding(1e-17, 0.0, scale=1.0)
    for a, b, scale in (
        (1.0, 1 + 16 * eps, None),
        (1e-17, 0.0, None),
        (math.nan, math.nan, None),
        (math.inf, 1.0, 1.0),
    ):
        with pytest.raises(AssertionError, match="1 of 1 elements differ"):
            assert_equal_to_rounding(a, b, scale=scale)
    with pytest.raises(AssertionError, match="the worst, number 1"):
        assert_equal_to_rounding(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.5, 3.1]))


def test_normals_within() -> None:
    z = torch.randn(10_000)
    assert_normals_within(z + 1e-6 * z, z)
    with pytest.raises(AssertionError, match="2-norm"):
        assert_normals_within(z + 3e-6 * z, z)
    one = z.clone()
    one[5] += 2e-3
    with pytest.raises(AssertionError, match="largest difference"):
        assert_normals_within(one, z)


def test_near_peer() -> None:
    theirs = torch.tensor([0.5, -3.0])
    assert_near_peer(theirs + 2e-4, theirs)
    with pytest.raises(AssertionError, match="from the other library"):
        assert_near_peer(theirs + 4e-4, theirs)
    with pytest.raises(AssertionError, match="from the other library"):
        assert_near_peer(theirs * 0 + math.nan, theirs)
