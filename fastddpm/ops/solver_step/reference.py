"""solver_step in plain PyTorch: the specification of every implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import philox


def forward(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    step: Tensor | int,
    *,
    pred_prev: Tensor | None,
    out_uncond: Tensor | None,
    guidance_scale: Tensor | float,
    clamp: Tensor | float | None,
    noise: Tensor | None,
    seed: Tensor | int | None,
    sample: Tensor | None,
    mask: Tensor | None,
    known: Tensor | None,
    known_table: Tensor | None,
    known_noise: Tensor | None,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """See the interface. All arithmetic in float32 (float64 for a float64 state); one rounding at the end."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32

    def row(of: Tensor) -> Tensor:  # of[step] would stop the device to read a step that lives there
        return (of.index_select(0, step.reshape(1)).squeeze(0) if isinstance(step, Tensor) else of[step]).to(dtype)

    k0, k1, k2, k3, k4, k5, k6, logvar_min, logvar_max = row(table).unbind()
    state, channels = x.to(dtype), x.shape[1]
    prediction = out[:, :channels].to(dtype)
    if out_uncond is not None:
        unconditional = out_uncond[:, :channels].to(dtype)
        w = guidance_scale.to(dtype) if isinstance(guidance_scale, Tensor) else guidance_scale
        prediction = torch.lerp(unconditional, prediction, w)  # exact at w = 0 and w = 1

    pred = k0 * state + k1 * prediction
    if isinstance(clamp, Tensor):
        bound = clamp.to(dtype).reshape(-1, 1, 1, 1)
        pred = torch.clamp(pred, -bound, bound)
    elif clamp is not None:
        pred = torch.clamp(pred, -clamp, clamp)

    x_next = k2 * pred + k3 * state + k6 * prediction
    if pred_prev is not None:
        x_next = x_next + k4 * pred_prev.to(dtype)
    if noise is None and seed is not None:
        assert sample is not None
        noise = philox.normal(
            tuple(x.shape), seed=seed, sample=sample, step=step, stream=philox.SAMPLER_NOISE, dtype=dtype
        )
    if noise is not None:
        deviation = k5
        if out.shape[1] == 2 * channels:
            fraction = (out[:, channels:].to(dtype) + 1) / 2
            deviation = torch.where(k5 != 0, torch.exp(0.5 * (fraction * logvar_max + (1 - fraction) * logvar_min)), k5)
        x_next = x_next + deviation * noise.to(dtype)

    if mask is not None:
        assert known is not None and known_table is not None
        signal, sigma = row(known_table).unbind()
        if known_noise is None:
            assert seed is not None and sample is not None
            known_noise = philox.normal(
                tuple(x.shape), seed=seed, sample=sample, step=step, stream=philox.TRAINING_NOISE, dtype=dtype
            )
        x_known = signal * known.to(dtype) + sigma * known_noise.to(dtype)
        x_next = torch.lerp(x_next, x_known, mask.to(dtype))

    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    x_next, pred = (a.to(x.dtype).contiguous(memory_format=layout) for a in (x_next, pred))
    if not inplace:
        return x_next, pred
    return x.copy_(x_next), pred if pred_prev is None else pred_prev.copy_(pred)
