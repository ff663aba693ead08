"""Diffusions that visit some of the timesteps that a network was trained with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .gaussian_diffusion import GaussianDiffusion


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """Which timesteps to visit, section by section.

    0..T-1 is cut into as many sections as there are counts, as equal as can be, and each gives as many timesteps as its
    count, evenly from its first to its last.

    Args:
        num_timesteps: T. section_counts: numbers; or a string of such with commas, or "ddimN": N timesteps 0, s, 2s, ..
            with the smallest stride s that gives as many.

    Raises:
        ValueError: a count larger than its section, or no stride that gives N timesteps.
    """
    if isinstance(section_counts, str):
        if section_counts.startswith("ddim"):
            wanted = int(section_counts.removeprefix("ddim"))
            for stride in range(1, num_timesteps):
                visited = range(0, num_timesteps, stride)
                if len(visited) == wanted:
                    return set(visited)
            raise ValueError(
                f"space_timesteps: expected a number of steps that a stride over {num_timesteps} timesteps gives, "
                f"got {section_counts!r}; choose a divisor of {num_timesteps}, or leave out 'ddim'"
            )
        section_counts = [int(count) for count in section_counts.split(",")]
    shortest, longer = divmod(num_timesteps, len(section_counts))
    start = 0
    found: set[int] = set()
    for i, count in enumerate(section_counts):
        size = shortest + (i < longer)
        if size < count:
            raise ValueError(
                f"space_timesteps: expected a count of at most {size} for section {i} of {num_timesteps} timesteps, "
                f"got {count}; take fewer"
            )
        if count > 0:
            between = (size - 1) / max(count - 1, 1)
            # summed, not multiplied: the original's rounding of halves comes of its sum
            places = accumulate(repeat(between, count - 1), initial=0.0)
            found.update(start + round(place) for place in places)
        start += size
    return found


class SpacedDiffusion(GaussianDiffusion):
    """A diffusion over some timesteps of a longer one, whose own betas follow from abar at these (Nichol and Dhariwal
    2021, eq. 19). Its t counts the visited timesteps; the network gets those of the longer one.

    Args:
        use_timesteps: the timesteps to visit, any collection of numbers in [0, T).
        **kwargs: of `GaussianDiffusion`, betas [T] those of the longer one.

    Attributes: use_timesteps, a set; timestep_map, the list of its numbers in order; original_num_steps, T.

    Raises:
        ValueError: none of the timesteps is in [0, T); see `GaussianDiffusion`.
    """

    def __init__(self, use_timesteps: Iterable[int], **kwargs: Any) -> None:
        self.use_timesteps = set(use_timesteps)
        betas = np.asarray(kwargs["betas"], dtype=np.float64)
        self.original_num_steps = len(betas)
        self.timestep_map = [t for t in range(len(betas)) if t in self.use_timesteps]
        if not self.timestep_map:
            raise ValueError(
                f"SpacedDiffusion: expected use_timesteps in [0, {len(betas)}), got {sorted(self.use_timesteps)}; "
                "see space_timesteps"
            )
        # abar from one visited timestep to the next is the product over those it jumps over
        log_abar = torch.log1p(-torch.from_numpy(betas)).cumsum(0)[self.timestep_map]
        kwargs["betas"] = -torch.expm1(torch.diff(log_abar, prepend=log_abar.new_zeros(1))).numpy()
        super().__init__(**kwargs)
        self._map: dict[tuple[torch.device, bool], Tensor] = {}

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        key = t.device, self.rescale_timesteps
        if key not in self._map:
            visited = torch.tensor(self.timestep_map, device=t.device)
            if self.rescale_timesteps:
                visited = visited.float() * (1000.0 / self.original_num_steps)
            self._map[key] = visited
        return self._map[key][t]
