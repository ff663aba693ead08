"""The timestep as a vector: sinusoids of geometric frequencies, then two linear layers.

    e(t) = [sin(w_0 t) .. sin(w_{d/2-1} t), cos(w_0 t) .. cos(w_{d/2-1} t)],   w_i = 10000^(-i / (d/2 - 1))     "ddpm"
    e(t) = [cos(w_0 t) .. cos(w_{d/2-1} t), sin(w_0 t) .. sin(w_{d/2-1} t)],   w_i = 10000^(-i / (d/2))         "adm"
    "ddpm_cos_first" and "adm_sin_first" have the frequencies of the one in the order of the other
    embedding(t) = W_2 silu(W_1 e(t) + b_1) + b_2

The sinusoid is that of Vaswani et al. 2017 (section 3.5); "ddpm" is its form in Ho et al. 2020, "adm" that in improved
DDPM (Nichol and Dhariwal 2021) and ADM (Dhariwal and Nichol 2021). A network trained with one is wrong, without an
error, with the other.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Linear

Embedding = Literal["ddpm", "adm", "ddpm_cos_first", "adm_sin_first"]
EMBEDDINGS: tuple[str, ...] = get_args(Embedding)


def sinusoidal_embedding(
    t: Tensor, channels: int, kind: Embedding = "ddpm", dtype: torch.dtype = torch.float32, theta: float = 10000.0
) -> Tensor:
    """The sinusoids of the timestep, e(t) in the equations of this module.

    Args:
        t: timesteps, integer or floating point, [B].
        channels: length d of the result, >= 2; if it is odd, the last element is 0.
        kind: "ddpm" (sine first, divisor d/2 - 1) or "adm" (cosine first, divisor d/2); "ddpm_cos_first" and
            "adm_sin_first" are these with the other order.
        dtype: of the arithmetic and of the result: float32 or float64.
        theta: base of the frequencies, > 0, in place of 10000.

    Returns: [B, channels].

    Raises:
        ValueError: fewer than 2 channels, another kind, or theta not above 0. TypeError: another dtype.

    Numerics: never in half precision, under autocast either: bfloat16 cannot tell 999 from 1000.
    """
    if channels < 2:
        raise ValueError(f"sinusoidal_embedding: expected channels >= 2, got {channels}; each frequency takes two")
    if kind not in EMBEDDINGS:
        wanted = " or ".join(map(repr, EMBEDDINGS))
        raise ValueError(f"sinusoidal_embedding: expected kind {wanted}, got {kind!r}; choose one of these")
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"sinusoidal_embedding: expected dtype float32 or float64, got {dtype}; round the result afterwards"
        )
    if not theta > 0:
        raise ValueError(f"sinusoidal_embedding: expected theta > 0, got {theta}; 10000 is usual")
    half = channels // 2
    divisor = max(half - 1, 1) if kind.startswith("ddpm") else half
    frequency = torch.exp(torch.arange(half, dtype=dtype, device=t.device) * (-math.log(theta) / divisor))
    angle = t.to(dtype).unsqueeze(1) * frequency
    parts = [angle.sin(), angle.cos()] if kind in ("ddpm", "adm_sin_first") else [angle.cos(), angle.sin()]
    return F.pad(torch.cat(parts, dim=1), (0, channels % 2))


class TimeEmbedding(nn.Module):
    """The embedding of the timestep: W_2 silu(W_1 e(t) + b_1) + b_2.

    Args:
        channels: length of the sinusoid, >= 2.
        width: length of the embedding.
        kind: "ddpm" or "adm", see `sinusoidal_embedding`.
        scale: timesteps are multiplied by it first.
    """

    def __init__(self, channels: int, width: int, kind: Embedding = "ddpm", scale: float = 1.0) -> None:
        super().__init__()
        self.channels, self.kind, self.scale = channels, kind, scale
        self.linear1 = Linear(channels, width)
        self.linear2 = Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        """Embed timesteps.

        Args:
            t: timesteps, integer, float32 or float64, [B].

        Returns: [B, width].

        Numerics: the sinusoid is float32 (float64 where the weights are), then rounded once to the type of the weights.
        """
        dtype = self.linear1.weight.dtype
        exact = torch.promote_types(dtype, torch.float32)
        if self.scale != 1:
            t = t.to(exact) * self.scale
        e = sinusoidal_embedding(t, self.channels, self.kind, exact)
        out: Tensor = self.linear2(F.silu(self.linear1(e.to(dtype))))
        return out

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}" + (f", scale={self.scale}" if self.scale != 1 else "")
