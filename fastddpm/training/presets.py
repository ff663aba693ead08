"""Named recipes: fields of the three configurations that differ from the defaults, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..diffusion import DiffusionConfig
from ..nn.unet import UNetConfig
from .config import TrainConfig

Fields = Mapping[str, Any]

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # the handwritten digits of scikit-learn, 8 x 8 with 17 grey levels: few steps, the first below half a grey level
    "digits": {
        "unet": dict(
            image_size=(8, 8), in_channels=1, base_channels=32, channel_mult=(1, 2), num_res_blocks=1,
            attention_resolutions=(4,), num_groups=8, dropout=0.1,
        ),
        "diffusion": dict(
            schedule="log_snr", num_timesteps=100, log_snr_max=6.5, log_snr_min=-8.0, variance="fixed_small",
            timestep_sampling="stratified", levels=17,
        ),
        "train": dict(
            num_images=140_800, batch_size=64, learning_rate=2e-3, warmup_images=6_400, lr_decay="cosine",
            adam_beta2=0.99, ema_decay=0.998, horizontal_flip=False, log_every_images=6_400,
            checkpoint_every_images=70_400,
            sample_every_images=70_400, grid_sampler="ddpm", grid_steps=None,
        ),
    },
    # Ho et al. 2020, appendix B: 800,000 steps of 128
    "cifar10": {
        "unet": dict(image_size=(32, 32), dropout=0.1),
        "diffusion": dict(schedule="linear", num_timesteps=1000, variance="fixed_large", loss="simple"),
        "train": dict(
            num_images=102_400_000, batch_size=128, learning_rate=2e-4, warmup_images=640_000, max_grad_norm=1.0,
            ema_decay=0.9999, ema_warmup=False, horizontal_flip=True, checkpoint_every_images=1_280_000,
            sample_every_images=1_280_000,
        ),
    },
    # Nichol and Dhariwal 2021: hybrid loss, cosine schedule, 4,000 steps; 500,000 training steps of 128
    "improved-cifar10": {
        "unet": dict(
            image_size=(32, 32), learned_variance=True, num_res_blocks=3, attention_resolutions=(16, 8), num_heads=4,
            scale_shift=True, dropout=0.3, norm_eps=1e-5, embedding="adm", downsample_padding="symmetric",
        ),
        "diffusion": dict(schedule="cosine", num_timesteps=4000, variance="learned_range", loss="hybrid"),
        "train": dict(
            num_images=64_000_000, batch_size=128, learning_rate=1e-4, warmup_images=0, max_grad_norm=None,
            ema_decay=0.9999, ema_warmup=False, horizontal_flip=False, checkpoint_every_images=1_280_000,
            sample_every_images=1_280_000,
        ),
    },
    # a small network for a processor without a GPU
    "cifar10-small": {
        "unet": dict(
            image_size=(32, 32), base_channels=32, channel_mult=(1, 2, 2), num_res_blocks=1, attention_resolutions=(8,),
            num_groups=8,
        ),
        "diffusion": dict(
            schedule="log_snr", num_timesteps=1000, log_snr_max=11.0, log_snr_min=-9.0, variance="fixed_large",
            first_log_variance="tiny", timestep_sampling="stratified",
        ),
        "train": dict(
            num_images=240_000, batch_size=32, learning_rate=1e-3, warmup_images=6_400, lr_decay="cosine",
            adam_beta2=0.99, ema_decay=0.999, horizontal_flip=True, log_every_images=3_200,
            checkpoint_every_images=16_000, sample_every_images=40_000, num_grid_samples=36,
        ),
    },
}  # fmt: skip
"""unet, diffusion and train: what each preset sets of `UNetConfig`, `DiffusionConfig` and `TrainConfig`."""


def make_configs(
    preset: str | None = None,
    *,
    unet: Fields | None = None,
    diffusion: Fields | None = None,
    train: Fields | None = None,
) -> tuple[UNetConfig, DiffusionConfig, TrainConfig]:
    """The three configurations of a preset, with some fields changed.

    Args:
        preset: a name in `PRESETS`; None starts from the defaults.
        unet, diffusion, train: fields to set, over those of the preset.

    Raises:
        ValueError: no preset, or no field, of that name; a value out of its range. TypeError: a value of another type.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"make_configs: expected preset to be one of {', '.join(PRESETS)}, got {preset!r}; choose one")
    base = PRESETS[preset] if preset is not None else {"unet": {}, "diffusion": {}, "train": {}}
    return (
        _make(UNetConfig, base["unet"], unet),
        _make(DiffusionConfig, base["diffusion"], diffusion),
        _make(TrainConfig, base["train"], train),
    )


def _make(kind: Any, base: Fields, changes: Fields | None) -> Any:
    known = [f.name for f in fields(kind)]
    unknown = [name for name in changes or {} if name not in known]
    if unknown:
        raise ValueError(
            f"make_configs: expected fields of {kind.__name__}, got {', '.join(unknown)}; it has {', '.join(known)}"
        )
    return kind(**{**base, **(changes or {})})
