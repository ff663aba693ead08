"""Small networks of every kind, for the tests of this folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastddpm.nn import UNet

TINY: dict[str, Any] = dict(
    image_size=(8, 8), base_channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_groups=4
)
VARIANTS: dict[str, dict[str, Any]] = {
    "ddpm": {},
    "improved": dict(
        attention_resolutions=(8, 4), num_heads=2, scale_shift=True, learned_variance=True, dropout=0.3, norm_eps=1e-5,
        embedding="adm", downsample_padding="symmetric",
    ),
    "adm": dict(
        head_channels=4, scale_shift=True, learned_variance=True, num_classes=3, norm_eps=1e-5, embedding="adm",
        resample="resblock",
    ),
    "grey, down to one pixel": dict(in_channels=1, channel_mult=(1, 1, 2, 2), dropout=0.1, num_classes=2),
    "grey, down to one pixel, resblock": dict(in_channels=1, channel_mult=(1, 1, 2, 2), resample="resblock"),
    "wide, odd numbers": dict(
        image_size=(4, 12), in_channels=5, base_channels=9, attention_resolutions=(4,), num_groups=3, num_heads=3,
    ),
    "of another library": dict(
        base_channels=16, widths=(8, 12), time_width=20, time_scale=0.25, scale_shift=True, num_classes=3,
        null_class=False, middle="plain_attention", middle_scale=1.5, center_input=True, embedding="adm_sin_first",
    ),
    "of another library, without a middle": dict(
        in_channels=3, prediction_channels=2, learned_variance=True, middle="none", embedding="ddpm_cos_first",
        up_attention_resolutions=(8,),
    ),
}  # fmt: skip


def filled(unet: UNet, seed: int = 0) -> UNet:
    """Give every parameter random values: a new network has zeros, and gives zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in unet.named_parameters():
            centre = 1.0 if "norm" in name and "weight" in name else 0.0
            spread = 0.3 if p.dim() == 1 else p[0].numel() ** -0.5
            p.copy_(centre + spread * torch.randn(p.shape, generator=generator))
    return unet


def variant(name: str, **overrides: Any) -> UNet:
    """A network of `VARIANTS` with random weights."""
    return filled(UNet(**{**TINY, **VARIANTS[name], **overrides}))


def inputs(unet: UNet, batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor | None]:
    """Images, timesteps and, for a network with classes, labels: each class, and none."""
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn((batch, unet.in_channels, *unet.config.image_size), generator=generator, dtype=dtype)
    t = torch.arange(batch) * 997 % 1000
    return x, t, None if unet.num_classes is None else torch.arange(batch) % (unet.num_classes + unet.null_class)
