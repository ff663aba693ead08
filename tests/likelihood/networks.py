"""Networks whose every output is known, or small and fixed, and exact expectations, for the tests of the bound."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastddpm.diffusion import GaussianDiffusion
from fastddpm.likelihood import vlb_term


class Linear(nn.Module):
    """out = slope_t x_t + offset_t; with a learned variance its channels are v_t, whatever x_t is. Float64."""

    def __init__(self, slope: Tensor, offset: Tensor, v: Tensor | None = None) -> None:
        super().__init__()
        self.slope, self.offset = nn.Parameter(slope.double()), nn.Parameter(offset.double())
        self.v = None if v is None else nn.Parameter(v.double())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out = self.slope[t].reshape(-1, 1, 1, 1) * x + self.offset[t].reshape(-1, 1, 1, 1)
        if self.v is None:
            return out
        return torch.cat([out, self.v[t].reshape(-1, 1, 1, 1).expand_as(out)], dim=1)


class Fixed(nn.Module):
    """Two random convolutions with an embedding of t, which never train."""

    def __init__(self, num_timesteps: int, channels: int = 1, *, seed: int = 5, learned_variance: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Conv2d(channels, 8, 3, padding=1)
            self.time = nn.Embedding(num_timesteps, 8)
            self.last = nn.Conv2d(8, channels * (2 if learned_variance else 1), 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.first(x) + self.time(t)[:, :, None, None]))
        return out


def small_diffusion(num_timesteps: int = 6, size: int = 4, channels: int = 1, **options: Any) -> GaussianDiffusion:
    """`Fixed` on a short chain with noticeable noise, 17 grey levels."""
    settings: dict[str, Any] = dict(
        schedule="linear", num_timesteps=num_timesteps, beta_start=0.05, beta_end=0.5, prediction="x0", levels=17
    )
    settings |= options
    learned = settings.get("variance", "").startswith("learned")
    return GaussianDiffusion(Fixed(num_timesteps, channels, learned_variance=learned), size, channels, **settings)


def random_images(count: int, levels: int = 17, size: int = 4, channels: int = 1, seed: int = 0) -> Tensor:
    """uint8 images, each near a grey of its own."""
    generator = torch.Generator().manual_seed(seed)
    grey = torch.rand(count, 1, 1, 1, generator=generator)
    texture = torch.rand(count, channels, size, size, generator=generator)
    return ((0.7 * grey + 0.3 * texture) * (levels - 1)).round().to(torch.uint8)


def gaussian_model(variance: str, *, levels: int = 256) -> GaussianDiffusion:
    """A chain of 5 steps on one pixel whose reverse process is linear, and not the best one."""
    slope, offset = torch.tensor([[0.95, 0.8, 0.75, 0.5, 0.3], [0.02, -0.1, 0.0, 0.15, 0.1]], dtype=torch.float64)
    v = {"learned": [-2.2, -1.8, -1.5, -1.0, -0.4], "learned_range": [0.8, -0.5, 0.1, 0.9, -1.0]}.get(variance)
    return GaussianDiffusion(
        Linear(slope, offset, None if v is None else torch.tensor(v, dtype=torch.float64)), 1, 1,
        schedule="linear", num_timesteps=5, beta_start=0.1, beta_end=0.5, levels=levels, prediction="x0",
        variance=variance, loss="simple" if v is None else "hybrid", clip_denoised=False,
    )  # fmt: skip


def normal_nodes(count: int) -> tuple[Tensor, Tensor]:
    """z_i and w_i with E[f(z)] = sum w_i f(z_i) for a standard normal z, exact up to degree 2 count - 1."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.from_numpy(nodes), torch.from_numpy(weights / math.sqrt(2 * math.pi))


def expected_terms(diffusion: GaussianDiffusion, x0: float, nodes: int) -> Tensor:
    """E[term] over eps for each t, float64 [T], of an image of one pixel."""
    z, weights = normal_nodes(nodes)
    steps = diffusion.num_timesteps
    t = torch.arange(steps).repeat_interleave(nodes)
    noise = z.repeat(steps).reshape(-1, 1, 1, 1)
    with torch.no_grad():
        terms = vlb_term(diffusion, torch.full_like(noise, x0), t, noise)
    return (terms.reshape(steps, nodes) * weights).sum(1)
