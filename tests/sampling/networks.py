"""Small networks to sample from."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ConvNet(nn.Module):
    """Two convolutions that look at x_t, t and the label; 2C channels out for a learned variance."""

    def __init__(self, channels: int = 3, num_classes: int = 4, learned_variance: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.first = nn.Conv2d(channels, 16, 3, padding=1)
            self.last = nn.Conv2d(16, (1 + learned_variance) * channels, 3, padding=1)
            self.classes = nn.Embedding(num_classes + 1, 16)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        h = self.first(x) + torch.sin(t.to(x.dtype) / 100).reshape(-1, 1, 1, 1)
        if labels is not None:
            h = h + self.classes(labels)[:, :, None, None]
        out: Tensor = self.last(torch.nn.functional.silu(h))
        return out


def pointwise(x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
    """Looks at each pixel alone: the same bits in every batch."""
    return x * (0.9 - t.to(x.dtype).reshape(-1, 1, 1, 1) / 2048)
