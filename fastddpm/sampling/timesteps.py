"""Which timesteps a sampler visits."""

from __future__ import annotations

import torch
from torch import Tensor

SPACINGS = ("trailing", "leading", "linspace", "quadratic")


def timesteps(num_timesteps: int, num_steps: int, spacing: str = "trailing") -> Tensor:
    """The timesteps to visit, from the noisiest to the least noisy, 0-based.

    With T = num_timesteps, N = num_steps and i = 0..N-1, in the names of Lin et al. 2023, table 2, the list reversed is

        trailing   round((i + 1) T / N) - 1         starts from T - 1, as the noise of a sampler does
        leading    i (T // N)                       ends at 0, and starts below T - 1
        linspace   round(i (T - 1) / (N - 1))       both ends
        quadratic  floor(0.8 T i^2 / (N - 1)^2)     Song et al. 2021 (DDIM), appendix D.2, with the constant of the
                                                    authors' code; where this repeats a timestep, the next one is taken

    Args:
        num_timesteps: T >= 1, the steps of the trained chain.
        num_steps: N in [1, T]; at least 2 where the spacing has two ends, that is for all but "trailing" (T = 1 aside).
        spacing: "trailing", "leading", "linspace" or "quadratic".

    Returns: int64 [N] on the CPU, strictly descending, in [0, T).

    Raises:
        ValueError: a number out of its range, or an unknown spacing.

    Numerics: whole numbers throughout; a half rounds to the even neighbour.
    """
    if spacing not in SPACINGS:
        raise ValueError(
            f"timesteps: expected spacing to be one of {', '.join(SPACINGS)}, got {spacing!r}; choose one of these"
        )
    if num_timesteps < 1:
        raise ValueError(f"timesteps: expected num_timesteps >= 1, got {num_timesteps}; 1000 is usual")
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(
            f"timesteps: expected num_steps in [1, {num_timesteps}], got {num_steps}; a chain of {num_timesteps} steps "
            f"visits each at most once"
        )
    if num_steps == 1:
        if spacing != "trailing" and num_timesteps > 1:
            raise ValueError(
                f"timesteps: expected num_steps >= 2 with spacing {spacing!r}, got 1, which would visit t = 0 alone; "
                f"use spacing='trailing', which visits t = {num_timesteps - 1}"
            )
        return torch.tensor([num_timesteps - 1])

    i = torch.arange(num_steps)
    if spacing == "trailing":
        ascending = _round((i + 1) * num_timesteps, num_steps) - 1
    elif spacing == "leading":
        ascending = i * (num_timesteps // num_steps)
    elif spacing == "linspace":
        ascending = _round(i * (num_timesteps - 1), num_steps - 1)
    else:
        square = 4 * num_timesteps * i.square() // (5 * (num_steps - 1) ** 2)
        ascending = (square - i).cummax(0).values + i  # the smallest strictly ascending list that is nowhere below
    return ascending.flip(0)


def _round(numerator: Tensor, denominator: int) -> Tensor:
    """numerator / denominator to the nearest integer: the quotient of two integers is exact where it is a half."""
    return (numerator.double() / denominator).round().long()
