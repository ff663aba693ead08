"""The lists of visited timesteps: published values, and what every list must be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastddpm.sampling import SPACINGS, timesteps


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ("trailing", list(range(999, 0, -20))),
        ("leading", list(range(980, -1, -20))),
        ("linspace", np.linspace(0, 999, 50).round()[::-1].astype(int).tolist()),
    ],
)
def test_published_lists_of_50_of_1000(spacing: str, expected: list[int]) -> None:
    steps = timesteps(1000, 50, spacing)
    assert steps.tolist() == expected
    assert (steps[0], steps[-1]) == {"trailing": (999, 19), "leading": (980, 0), "linspace": (999, 0)}[spacing]


@pytest.mark.parametrize("num_steps", [10, 20])
def test_quadratic_is_the_published_formula_where_that_does_not_repeat(num_steps: int) -> None:
    published = [int(value) for value in np.linspace(0, np.sqrt(1000 * 0.8), num_steps) ** 2]
    assert timesteps(1000, num_steps, "quadratic").flip(0).tolist() == published


def test_quadratic_takes_the_next_timestep_where_the_formula_repeats() -> None:
    published = torch.tensor([int(value) for value in np.linspace(0, np.sqrt(1000 * 0.8), 50) ** 2])
    assert len(published.unique()) < 50
    steps = timesteps(1000, 50, "quadratic").flip(0)
    assert bool((steps >= published).all()) and steps[-1] == published[-1] == 800
    repeats = [0, *(1 + i for i in range(49) if published[i + 1] <= steps[i])]
    for i in repeats[1:]:
        assert steps[i] == steps[i - 1] + 1


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_timesteps", [1, 2, 3, 7, 50, 97])
def test_every_list_is_strictly_descending_and_in_range(num_timesteps: int, spacing: str) -> None:
    for num_steps in range(1 if spacing == "trailing" else min(2, num_timesteps), num_timesteps + 1):
        steps = timesteps(num_timesteps, num_steps, spacing)
        assert steps.dtype == torch.int64 and steps.shape == (num_steps,)
        assert bool((steps.diff() < 0).all()) and steps[0] < num_timesteps and steps[-1] >= 0


@pytest.mark.parametrize("spacing", SPACINGS)
def test_as_many_steps_as_timesteps_visit_all(spacing: str) -> None:
    assert timesteps(97, 97, spacing).tolist() == list(range(96, -1, -1))


def test_trailing_always_starts_at_the_last_timestep_and_is_the_default() -> None:
    assert all(timesteps(1000, n)[0] == 999 for n in (1, 2, 3, 7, 30, 50, 333, 999))
    assert timesteps(1000, 1).tolist() == [999]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1000, 50, "even"), r"timesteps: expected spacing to be one of trailing, .*, got 'even'; choose"),
        ((0, 1, "trailing"), r"timesteps: expected num_timesteps >= 1, got 0; 1000 is usual"),
        ((10, 11, "leading"), r"timesteps: expected num_steps in \[1, 10\], got 11; a chain of 10 steps"),
        ((10, 0, "trailing"), r"timesteps: expected num_steps in \[1, 10\], got 0; "),
        ((10, 1, "leading"), r"timesteps: expected num_steps >= 2 with spacing 'leading', got 1, .* use"),
        ((10, 1, "linspace"), r"timesteps: expected num_steps >= 2 with spacing 'linspace', got 1"),
        ((10, 1, "quadratic"), r"timesteps: expected num_steps >= 2 with spacing 'quadratic', got 1"),
    ],
)
def test_errors(arguments: tuple[int, int, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timesteps(*arguments)
