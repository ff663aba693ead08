"""Each op as a user calls it, against the shortest PyTorch that a good user would write.

A case returns the two functions and the least number of bytes that the op has to move: inputs read once, outputs
written once. What is timed is whichever implementation `fastddpm.explain` names as chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastddpm

Call = Callable[[], object]
Case = tuple[Call, Call, int]

T = 1000
ALPHAS_CUMPROD = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0)
TABLE = torch.stack([ALPHAS_CUMPROD.sqrt(), (1 - ALPHAS_CUMPROD).sqrt()], dim=1).float()


def q_sample(shape: Sequence[int]) -> Case:
    """Noise uint8 images: 1 byte read and 4 written an element."""
    x0 = torch.randint(0, 256, shape, dtype=torch.uint8)
    t, sample = torch.randint(0, T, (shape[0],)), torch.arange(shape[0])

    def ours() -> object:
        return fastddpm.q_sample(x0, t, TABLE, seed=0, sample=sample, step=0)

    def eager() -> object:
        x = x0.float() * (2 / 255) - 1
        a = TABLE[t][:, :, None, None, None]
        return a[:, 0] * x + a[:, 1] * torch.randn_like(x)

    return ours, eager, 5 * x0.numel()


def diffusion_loss(shape: Sequence[int]) -> Case:
    """Weighted squared error and its gradient, the noise drawn again: the prediction read, the gradient written."""
    pred = torch.randn(shape, requires_grad=True)
    noise, weight = torch.randn(shape), torch.rand(shape[0])
    t, sample = torch.randint(0, T, (shape[0],)), torch.arange(shape[0])

    def ours() -> object:
        loss, _ = fastddpm.diffusion_loss(pred, t, seed=0, sample=sample, step=0, weight=weight)
        return torch.autograd.grad(loss, pred)

    def eager() -> object:
        loss = (F.mse_loss(pred, noise, reduction="none").mean((1, 2, 3)) * weight).mean()
        return torch.autograd.grad(loss, pred)

    return ours, eager, 8 * pred.numel()


def solver_step(shape: Sequence[int]) -> Case:
    """One DDPM update with noise: state and prediction read, state written."""
    x, out, sample = torch.randn(shape), torch.randn(shape), torch.arange(shape[0])
    t = T // 2
    beta = 1 - ALPHAS_CUMPROD[t] / ALPHAS_CUMPROD[t - 1]
    k0, k1 = ALPHAS_CUMPROD[t].rsqrt(), -(1 / ALPHAS_CUMPROD[t] - 1).sqrt()
    k2 = ALPHAS_CUMPROD[t - 1].sqrt() * beta / (1 - ALPHAS_CUMPROD[t])
    k3 = (1 - beta).sqrt() * (1 - ALPHAS_CUMPROD[t - 1]) / (1 - ALPHAS_CUMPROD[t])
    row = [float(k) for k in (k0, k1, k2, k3, 0, beta.sqrt(), 0, beta.log(), beta.log())]
    table = torch.tensor([row])

    def ours() -> object:
        return fastddpm.solver_step(x, out, table, 0, clamp=1.0, seed=0, sample=sample)

    def eager() -> object:
        pred = (row[0] * x + row[1] * out).clamp(-1, 1)
        return row[2] * pred + row[3] * x + row[5] * torch.randn_like(x)

    return ours, eager, 12 * x.numel()


def group_norm_silu(shape: Sequence[int]) -> Case:
    """GroupNorm and SiLU in channels_last: x read, y written."""
    x, weight, bias = _activation(shape)

    def ours() -> object:
        return fastddpm.group_norm_silu(x, weight, bias, 32)

    def eager() -> object:
        return F.silu(F.group_norm(x, 32, weight, bias, 1e-6))

    return ours, eager, 8 * x.numel()


def group_norm_silu_backward(shape: Sequence[int]) -> Case:
    """Its gradients: x and dy read, dx written."""
    x, weight, bias = _activation(shape, requires_grad=True)
    ours = _backward(fastddpm.group_norm_silu(x, weight, bias, 32), x, weight, bias)
    eager = _backward(F.silu(F.group_norm(x, 32, weight, bias, 1e-6)), x, weight, bias)
    return ours, eager, 12 * x.numel()


def rms_norm_silu(shape: Sequence[int]) -> Case:
    """Channel RMSNorm and SiLU in channels_last: x read, y written."""
    x, weight, _ = _activation(shape)

    def ours() -> object:
        return fastddpm.rms_norm_silu(x, weight)

    def eager() -> object:
        return F.silu(F.normalize(x, dim=1) * (weight[:, None, None] * shape[1] ** 0.5))

    return ours, eager, 8 * x.numel()


def rms_norm_silu_backward(shape: Sequence[int]) -> Case:
    """Its gradients: x and dy read, dx written."""
    x, weight, _ = _activation(shape, requires_grad=True)
    ours = _backward(fastddpm.rms_norm_silu(x, weight), x, weight)
    eager = _backward(F.silu(F.normalize(x, dim=1) * (weight[:, None, None] * shape[1] ** 0.5)), x, weight)
    return ours, eager, 12 * x.numel()


def adam_ema(shape: Sequence[int]) -> Case:
    """Clip, AdamW and EMA over 40 tensors: gradients for their norm, then five tensors read and four written."""
    params = [torch.randn(shape) for _ in range(40)]
    grads = [torch.randn(shape) for _ in params]
    first, second, average = ([torch.zeros(shape) for _ in params] for _ in range(3))
    step, lr, decay = torch.zeros((), dtype=torch.int64), torch.tensor(2e-4), torch.tensor(0.9999)

    def ours() -> object:
        return fastddpm.adam_ema(
            params, grads, first, second, step=step, lr=lr, max_grad_norm=1.0, ema=average, ema_decay=decay
        )

    weights = [p.clone().requires_grad_() for p in params]
    for p, g in zip(weights, grads, strict=True):
        p.grad = g.clone()
    optimizer = torch.optim.AdamW(weights, lr=2e-4, weight_decay=0.0, fused=True)
    shadow = [p.detach().clone() for p in weights]

    @torch.no_grad()
    def eager() -> object:
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        torch._foreach_lerp_(shadow, weights, 1e-4)
        return norm

    return ours, eager, 40 * sum(p.numel() for p in params)


def _activation(shape: Sequence[int], requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(*shape).contiguous(memory_format=torch.channels_last).requires_grad_(requires_grad)
    return x, torch.rand(shape[1], requires_grad=requires_grad), torch.randn(shape[1], requires_grad=requires_grad)


def _backward(y: Tensor | tuple[Tensor, Tensor], *inputs: Tensor) -> Call:
    assert isinstance(y, Tensor)
    dy = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)


def _name(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


IMAGES = [(128, 3, 32, 32), (8, 3, 64, 64)]
ACTIVATIONS = [(16, 128, 32, 32), (16, 256, 16, 16)]
CASES: list[Any] = [
    *((q_sample, shape) for shape in IMAGES),
    *((diffusion_loss, shape) for shape in IMAGES),
    *((solver_step, shape) for shape in IMAGES),
    *((case, shape) for case in (group_norm_silu, group_norm_silu_backward) for shape in ACTIVATIONS),
    *((case, shape) for case in (rms_norm_silu, rms_norm_silu_backward) for shape in ACTIVATIONS),
    (adam_ema, (64, 64, 3, 3)),
]


@pytest.mark.parametrize("implementation", ["eager", "fastddpm"])
@pytest.mark.parametrize(("case", "shape"), CASES, ids=lambda part: getattr(part, "__name__", None) or _name(part))
@pytest.mark.benchmark(max_time=0.5, min_rounds=3, warmup=False)
def test_op(case: Callable[[Sequence[int]], Case], shape: Sequence[int], implementation: str, measure: Any) -> None:
    torch.manual_seed(0)
    ours, eager, size = case(shape)
    group = f"{case.__name__} {_name(shape)}"
    measure(eager if implementation == "eager" else ours, group=group, implementation=implementation, size=size)
