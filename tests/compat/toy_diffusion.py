"""A small diffusion with the interface that the trainers take, and a folder of small images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

SIZE = 6


class Toy(nn.Module):
    """Predicts noise by two convolutions, at one level of it; ``sample`` draws noise and shows what is made of it."""

    is_ddim_sampling = True

    def __init__(self, channels: int = 3, image_size: int | tuple[int, int] = (SIZE, SIZE)) -> None:
        super().__init__()
        self.channels, self.image_size = channels, image_size
        self.net = nn.Sequential(
            nn.Conv2d(channels, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, channels, 3, padding=1)
        ).to(memory_format=torch.channels_last)
        self.register_buffer("level", torch.tensor(0.5))

    def forward(self, images: Tensor) -> Tensor:
        noise = torch.randn_like(images)
        found: Tensor = self.net((images * 2 - 1) * (1 - self.level) + noise * self.level)
        return (found - noise).square().mean()

    @torch.inference_mode()
    def sample(self, batch_size: int) -> Tensor:
        height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        x = torch.randn(batch_size, self.channels, height, width, device=self.level.device)
        found: Tensor = self.net(x).sigmoid()
        return found


class Toy1D(Toy):
    """The same for sequences [B, C, L]."""

    def __init__(self, channels: int = 2, length: int = 8) -> None:
        nn.Module.__init__(self)
        self.channels, self.length = channels, length
        self.net = nn.Sequential(nn.Conv1d(channels, 4, 3, padding=1), nn.SiLU(), nn.Conv1d(4, channels, 3, padding=1))
        self.register_buffer("level", torch.tensor(0.5))

    @torch.inference_mode()
    def sample(self, batch_size: int) -> Tensor:
        found: Tensor = self.net(torch.randn(batch_size, self.channels, self.length)).sigmoid()
        return found


def make_folder(path: Path, count: int = 100, mode: str = "RGB") -> Path:
    """PNG files of random pixels, of different sizes, some in a folder inside."""
    rng = np.random.default_rng(0)
    (path / "inside").mkdir(parents=True)
    channels = len(Image.new(mode, (1, 1)).getbands())
    for i in range(count):
        pixels = rng.integers(0, 256, (7 + i % 5, 9 - i % 4, channels), dtype=np.uint8)
        image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
        image.save(path / ("inside" if i % 3 == 0 else "") / f"{i:03}.png")
    return path
