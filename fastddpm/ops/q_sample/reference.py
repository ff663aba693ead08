"""q_sample in plain PyTorch: the specification of every implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import philox


def forward(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    *,
    index: Tensor | None,
    flip: Tensor | None,
    pixel_scale: float,
    pixel_shift: float,
    noise: Tensor | None,
    seed: Tensor | int | None,
    sample: Tensor | None,
    step: Tensor | int | None,
    returns: str,
    dtype: torch.dtype,
) -> Tensor | tuple[Tensor, Tensor]:
    """See the interface. All arithmetic in float32 (float64 for float64 output); one rounding at the end."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    x = x0 if index is None else x0[index]
    if flip is not None:
        x = torch.where(flip.reshape(-1, 1, 1, 1), x.flip(3), x)
    x = x.to(compute) * pixel_scale + pixel_shift
    given = noise
    if noise is None:
        assert seed is not None and sample is not None and step is not None
        noise = philox.normal(
            tuple(x.shape), seed=seed, sample=sample, step=step, stream=philox.TRAINING_NOISE, dtype=compute
        )
    signal, sigma = table.to(compute)[t].reshape(-1, 2, 1, 1, 1).unbind(1)
    noise = noise.to(compute)
    x_t = signal * x + sigma * noise
    layout = torch.contiguous_format if x0.is_contiguous() else torch.channels_last

    def stored(a: Tensor) -> Tensor:
        return a.to(dtype).contiguous(memory_format=layout)

    if returns == "noise":
        second = noise if given is None else noise.clone()  # never the caller's own tensor
    elif returns == "x0":
        second = x
    elif returns == "v":
        second = signal * noise - sigma * x
    else:
        return stored(x_t)
    return stored(x_t), stored(second)
