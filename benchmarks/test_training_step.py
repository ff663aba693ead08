"""A training step of the CIFAR-10 U-Net, against the same network on torch's own ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastddpm
from benchmarks.stock import on_stock_ops
from fastddpm._calls import Repeated
from fastddpm.bench import Work
from fastddpm.nn.layers import torch_layers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALPHAS_CUMPROD = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, device=DEVICE), 0)


def stock_step(model: nn.Module, images: Tensor) -> Any:
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=2e-4, weight_decay=0.0, fused=True)
    average = [p.detach().clone() for p in weights]

    def step() -> Tensor:
        x0 = images.float() * (2 / 255) - 1
        t, noise = torch.randint(0, 1000, (len(x0),), device=x0.device), torch.randn_like(x0)
        abar = ALPHAS_CUMPROD[t][:, None, None, None]
        with torch.autocast(x0.device.type, torch.bfloat16), torch_layers():
            pred = model(abar.sqrt() * x0 + (1 - abar).sqrt() * noise, t)
        loss = F.mse_loss(pred.float(), noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, weights, 1e-4)
        return loss

    return step


def our_step(overrides: dict[str, Any], batch: int) -> Any:
    """That of the Trainer, its batches and all, in the course of a run: it has been written down to be repeated."""
    step = Work("train", overrides, {}, dict(batch_size=batch, precision="bfloat16", learning_rate=2e-4)).prepare()
    for _ in range(Repeated.WARM_UP + 1):
        step()
    return step


def network(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return fastddpm.UNet(**overrides).to(DEVICE).train()


def test_the_network_on_stock_ops_is_the_same() -> None:
    model = network(
        base_channels=32, channel_mult=(1, 2), num_res_blocks=1, image_size=(8, 8), attention_resolutions=(4,)
    )
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    stock = on_stock_ops(model)
    x, t = torch.randn(2, 3, 8, 8, device=DEVICE), torch.tensor([1, 700], device=DEVICE)
    with torch_layers():
        expected, found = model(x, t).detach(), stock(x, t).detach()
    assert float((expected - found).norm() / expected.norm()) < 1e-5


@pytest.mark.timeout(300)
@pytest.mark.benchmark(group="training step")
def test_training_step(threads: int, compare: Any, benchmark: Any) -> None:
    small = dict(base_channels=32, channel_mult=(1, 2), num_res_blocks=1) if benchmark.disabled else {}
    model = network(**small)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, device=DEVICE)
    contestants = {"eager": stock_step(on_stock_ops(model), images), "fastddpm": our_step(small, 8)}
    size = 2 * 42 * sum(p.numel() for p in model.parameters())
    case = "training step CIFAR-10 U-Net, batch 8"
    compare(contestants, case=case, dtype="bfloat16", threads=threads, size=size, seconds=12.0, launches=True)
