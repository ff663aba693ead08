"""Twenty steps of training by the kernels and by the references: the same weights, as far as rounding allows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastddpm
from fastddpm.training.optimizer import AdamEMA
from tests.tolerance import assert_within

BATCH = 4


def trained(backend: str, dtype: torch.dtype, steps: int) -> Tensor:
    """All weights and their averages after the steps, flat."""
    torch.manual_seed(0)
    unet = fastddpm.UNet(
        image_size=(8, 8), base_channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,),
        num_groups=4, dropout=0.1,
    )  # fmt: skip
    for p in unet.parameters():  # a new network gives 0: let it give something
        if p.dim() == 4:
            p.data += 0.02 * torch.randn(p.shape).contiguous(memory_format=torch.channels_last)
    diffusion = fastddpm.GaussianDiffusion(unet, num_timesteps=100).to(dtype).train()
    optimizer = AdamEMA(unet, eps=1e-4, max_grad_norm=1.0)
    optimizer.learning_rate.fill_(1e-3)
    optimizer.ema_decay.fill_(0.9)
    images = torch.randint(0, 256, (BATCH, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with fastddpm.use_backend(backend):
        for step in range(steps):
            loss = diffusion.losses(images, seed=3, sample=torch.arange(BATCH) + BATCH * step, step=step).loss
            loss.backward()
            optimizer.update(loss)
    tensors = [*unet.parameters(), *optimizer.ema.values()]
    return torch.cat([p.detach().flatten() for p in tensors])


# Triton's interpreter takes seconds for a step
@pytest.mark.parametrize(
    ("backend", "steps"),
    [
        ("native", 20),
        ("triton", 1),
        pytest.param("triton", 20, marks=[pytest.mark.slow, pytest.mark.timeout(300)]),
    ],
)
def test_the_weights_agree(backend: str, steps: int) -> None:
    exact, reference = (trained("reference", dtype, steps) for dtype in (torch.float64, torch.float32))
    assert_within(trained(backend, torch.float32, steps), exact, reference, backend)
