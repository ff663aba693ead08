"""Between two states: ends, lengths, angles."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from fastddpm.sampling import lerp, slerp
from tests.tolerance import assert_equal_to_rounding


def test_lerp_is_the_line_with_exact_ends() -> None:
    a, b = torch.randn(2, 3, 2, 4, 4)
    assert torch.equal(lerp(a, b, 0.0), a) and torch.equal(lerp(a, b, 1.0), b)
    weights = torch.tensor([0.0, 0.25, 1.0])
    mixed = lerp(a, b, weights)
    assert torch.equal(mixed[0], a[0]) and torch.equal(mixed[2], b[2])
    assert_equal_to_rounding(mixed[1], 0.75 * a[1] + 0.25 * b[1], 4, scale=4.0)


def test_slerp_of_perpendicular_states_turns_by_a_right_angle() -> None:
    a, b = torch.zeros(2, 1, 2, 1, 1, dtype=torch.float64)
    a[0, 0], b[0, 1] = 3.0, 3.0
    for weight in (0.0, 0.3, 0.5, 1.0):
        angle = weight * math.pi / 2
        expected = torch.tensor([3 * math.cos(angle), 3 * math.sin(angle)], dtype=torch.float64)
        assert_equal_to_rounding(slerp(a, b, weight).flatten(), expected, scale=3.0)


def test_slerp_keeps_the_length_of_noise_and_turns_evenly() -> None:
    a, b = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64)
    a, b = (14 * torch.nn.functional.normalize(x.flatten(1), dim=1).reshape(x.shape) for x in (a, b))
    path = [slerp(a, b, weight) for weight in torch.linspace(0, 1, 5).tolist()]
    assert_equal_to_rounding(path[0], a, scale=14.0)
    assert_equal_to_rounding(path[-1], b, scale=14.0)
    for x in path:
        assert_equal_to_rounding(x.flatten(1).norm(dim=1), 14.0)
    chords = torch.stack([(x - y).flatten(1).norm(dim=1) for x, y in pairwise(path)])
    assert_equal_to_rounding(chords, chords[0], 64)
    assert bool((lerp(a, b, 0.5).flatten(1).norm(dim=1) < 0.9 * 14).all())


def test_slerp_takes_each_sample_by_itself() -> None:
    a, b = torch.randn(2, 3, 2, 4, 4)
    weights = torch.tensor([0.2, 0.5, 0.9])
    together = slerp(a, b, weights)
    assert together.dtype == torch.float32
    for i, weight in enumerate(weights):
        assert_equal_to_rounding(together[i : i + 1], slerp(a[i : i + 1], b[i : i + 1], weight.reshape(1)), scale=4.0)


@pytest.mark.parametrize("factor", [1.0, 2.0, 1.0 + 1e-9, -1.0])
def test_slerp_of_parallel_states_is_the_line(factor: float) -> None:
    a = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    mixed = slerp(a, factor * a, 0.25)
    assert_equal_to_rounding(mixed, (0.75 + 0.25 * factor) * a, 64, scale=2 * float(a.abs().max()))


@pytest.mark.parametrize("op", [lerp, slerp])
def test_errors(op: object) -> None:
    a = torch.randn(2, 3, 4, 4)
    name = op.__name__  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=rf"{name}: expected b of shape \[2, 3, 4, 4\], got \[1, 3, 4, 4\]"):
        op(a, a[:1], 0.5)  # type: ignore[operator]
    with pytest.raises(ValueError, match=rf"{name}: expected weight of shape \[2\], got \[3\]"):
        op(a, a, torch.ones(3))  # type: ignore[operator]
