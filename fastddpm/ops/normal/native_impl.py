"""normal by the kernels of csrc/normal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..native_common import drawing, reason_against, register_fake


def unsupported(*, sample: Tensor, dtype: torch.dtype, **_: Any) -> str | None:
    """Why these kernels cannot run, or None."""
    return reason_against(sample, dtype=dtype)


def forward(
    shape: tuple[int, ...],
    *,
    seed: Tensor | int,
    sample: Tensor,
    step: Tensor | int,
    stream: int,
    dtype: torch.dtype,
) -> Tensor:
    """See the interface."""
    z: Tensor = torch.ops.fastddpm.normal.default(shape, *drawing(seed, sample, step), stream, dtype)
    return z


@register_fake("normal")
def _(shape: list[int], seed: int, seed_tensor: Tensor | None, sample: Tensor, *args: Any) -> Tensor:
    return torch.empty(shape, dtype=args[-1], device=sample.device)
