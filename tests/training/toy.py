"""A network that trains in milliseconds, and 64 images of stripes for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastddpm.diffusion import GaussianDiffusion
from fastddpm.nn import UNet
from fastddpm.training import ImageDataset, Trainer, load_images


def stripes(with_labels: bool = False) -> ImageDataset:
    """8 x 8 pixels with 17 grey levels, a bright column each; its half of the picture is the class."""
    images = np.zeros((64, 1, 8, 8), np.uint8)
    column = np.arange(64) % 8
    images[np.arange(64), 0, :, column] = 16
    images[:, 0, 0, 0] = np.arange(64) % 17  # no two the same
    return load_images(images, labels=column // 4 if with_labels else None, channels=1, levels=17, progress=False)


def toy_diffusion(
    *, dropout: float = 0.0, num_classes: int | None = None, learned_variance: bool = False, **options: Any
) -> GaussianDiffusion:
    torch.manual_seed(0)
    model = UNet(
        image_size=8, in_channels=1, base_channels=8, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(),
        num_groups=4, dropout=dropout, num_classes=num_classes, learned_variance=learned_variance,
    )  # fmt: skip
    return GaussianDiffusion(model, **{"num_timesteps": 20, "schedule": "log_snr", "levels": 17, **options})


def toy_trainer(
    directory: Path, diffusion: GaussianDiffusion | None = None, data: Any = None, **options: Any
) -> Trainer:
    """Writes a line of metrics each 16 images and a checkpoint each 32, and no grids."""
    usual: dict[str, Any] = dict(
        output_dir=str(directory), num_images=128, batch_size=8, learning_rate=1e-3, warmup_images=16,
        precision="float32", device="cpu", log_every_images=16, checkpoint_every_images=32, sample_every_images=0,
        num_grid_samples=4, grid_steps=2, ema_decay=0.9, seed=5, progress=False,
    )  # fmt: skip
    return Trainer(diffusion or toy_diffusion(), stripes() if data is None else data, **{**usual, **options})
