"""normal in plain PyTorch: the specification of every implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import philox


def forward(
    shape: tuple[int, ...],
    *,
    seed: Tensor | int,
    sample: Tensor,
    step: Tensor | int,
    stream: int,
    dtype: torch.dtype,
) -> Tensor:
    """See the interface. Arithmetic in float32 (float64 for float64); one rounding."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return philox.normal(shape, seed=seed, sample=sample, step=step, stream=stream, dtype=compute).to(dtype)
