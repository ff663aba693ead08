"""Each op as a user calls it, against the shortest PyTorch that a good user would write, at the shapes of U-Nets.

A case gives its contestants and the least number of bytes that the op has to move: inputs read once, outputs written
once. What is timed as "fastddpm" is whichever implementation `fastddpm.explain` names as chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastddpm
from fastddpm.ops import normal as draw_normal

Call = Callable[[], object]

T = 1000
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALPHAS_CUMPROD = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0)
TABLE = torch.stack([ALPHAS_CUMPROD.sqrt(), (1 - ALPHAS_CUMPROD).sqrt()], dim=1).float().to(DEVICE)


@dataclass(frozen=True)
class Contest:
    """Ours, eager and, where there is one, the single ATen operator; bytes moved and normal numbers drawn."""

    ours: Call
    eager: Call
    size: int
    normals: int = 0
    native_op: Call | None = None


def normal(shape: Sequence[int], dtype: torch.dtype) -> Contest:
    sample = torch.arange(shape[0], device=DEVICE)

    def ours() -> object:
        return draw_normal(shape, seed=0, sample=sample, step=0, stream=1, dtype=dtype)

    def eager() -> object:
        return torch.randn(*shape, dtype=dtype, device=DEVICE)

    elements = torch.Size(shape).numel()
    return Contest(ours, eager, elements * dtype.itemsize, elements)


def q_sample(shape: Sequence[int], dtype: torch.dtype) -> Contest:
    """Noise uint8 images."""
    x0 = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)
    t, sample = torch.randint(0, T, (shape[0],), device=DEVICE), torch.arange(shape[0], device=DEVICE)

    def ours() -> object:
        return fastddpm.q_sample(x0, t, TABLE, seed=0, sample=sample, step=0, dtype=dtype)

    def eager() -> object:
        x = x0.to(dtype) * (2 / 255) - 1
        a = TABLE[t].to(dtype)[:, :, None, None, None]
        return a[:, 0] * x + a[:, 1] * torch.randn_like(x)

    return Contest(ours, eager, x0.numel() * (1 + dtype.itemsize), x0.numel())


def diffusion_loss(shape: Sequence[int], dtype: torch.dtype) -> Contest:
    """Weighted squared error and its gradient, ours with the noise drawn again: prediction read, gradient written."""
    pred = torch.randn(shape, dtype=dtype, device=DEVICE).requires_grad_()
    noise, weight = torch.randn(shape, dtype=dtype, device=DEVICE), torch.rand(shape[0], device=DEVICE)
    t, sample = torch.randint(0, T, (shape[0],), device=DEVICE), torch.arange(shape[0], device=DEVICE)

    def ours() -> object:
        loss, _ = fastddpm.diffusion_loss(pred, t, seed=0, sample=sample, step=0, weight=weight)
        return torch.autograd.grad(loss, pred)

    def eager() -> object:
        loss = (F.mse_loss(pred, noise, reduction="none").mean((1, 2, 3)) * weight).mean()
        return torch.autograd.grad(loss, pred)

    return Contest(ours, eager, 2 * pred.numel() * dtype.itemsize, pred.numel())


def solver_step(shape: Sequence[int], dtype: torch.dtype) -> Contest:
    """One DDPM update with noise: state and prediction read; ours writes the state and pred_x0, eager the state."""
    x, out = (torch.randn(shape, dtype=dtype, device=DEVICE) for _ in range(2))
    sample = torch.arange(shape[0], device=DEVICE)
    t = T // 2
    beta = 1 - ALPHAS_CUMPROD[t] / ALPHAS_CUMPROD[t - 1]
    k0, k1 = ALPHAS_CUMPROD[t].rsqrt(), -(1 / ALPHAS_CUMPROD[t] - 1).sqrt()
    k2 = ALPHAS_CUMPROD[t - 1].sqrt() * beta / (1 - ALPHAS_CUMPROD[t])
    k3 = (1 - beta).sqrt() * (1 - ALPHAS_CUMPROD[t - 1]) / (1 - ALPHAS_CUMPROD[t])
    row = [float(k) for k in (k0, k1, k2, k3, 0, beta.sqrt(), 0, beta.log(), beta.log())]
    table = torch.tensor([row], device=DEVICE)

    def ours() -> object:
        return fastddpm.solver_step(x, out, table, 0, clamp=1.0, seed=0, sample=sample)

    def eager() -> object:
        pred = (row[0] * x + row[1] * out).clamp(-1, 1)
        return row[2] * pred + row[3] * x + row[5] * torch.randn_like(x)

    return Contest(ours, eager, 4 * x.numel() * dtype.itemsize, x.numel())


def activation(shape: Sequence[int], dtype: torch.dtype, requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(*shape, dtype=dtype, device=DEVICE).contiguous(memory_format=torch.channels_last)
    weights = (torch.rand(shape[1], dtype=dtype, device=DEVICE) for _ in range(2))
    x, weight, bias = (p.requires_grad_(requires_grad) for p in (x, *weights))
    return x, weight, bias


def backward(y: Tensor | tuple[Tensor, Tensor], *inputs: Tensor) -> Call:
    assert isinstance(y, Tensor)
    dy = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)


def group_norm_silu(shape: Sequence[int], dtype: torch.dtype) -> Contest:
    """GroupNorm and SiLU in channels_last: x read, y written."""
    x, weight, bias = activation(shape, dtype)

    def ours() -> object:
        return fastddpm.group_norm_silu(x, weight, bias, 32)

    def eager() -> object:
        return F.silu(F.group_norm(x, 32, weight, bias, 1e-6))

    def native_op() -> object:
        return F.group_norm(x, 32, weight, bias, 1e-6)

    return Contest(ours, eager, 2 * x.numel() * dtype.itemsize, native_op=native_op)


def group_norm_silu_backward(shape: Sequence[int], dtype: torch.dtype) -> Contest:
    """Its gradients: x and dy read, dx written."""
    x, weight, bias = activation(shape, dtype, requires_grad=True)
    ours = backward(fastddpm.group_norm_silu(x, weight, bias, 32), x, weight, bias)
    eager = backward(F.silu(F.group_norm(x, 32, weight, bias, 1e-6)), x, weight, bias)
    native_op = backward(F.group_norm(x, 32, weight, bias, 1e-6), x, weight, bias)
    return Contest(ours, eager, 3 * x.numel() * dtype.itemsize, native_op=native_op)


def rms_norm_silu(shape: Sequence[int], dtype: torch.dtype) -> Contest:
    """Channel RMSNorm and SiLU in channels_last: x read, y written."""
    x, weight, _ = activation(shape, dtype)

    def ours() -> object:
        return fastddpm.rms_norm_silu(x, weight)

    def eager() -> object:
        return F.silu(F.normalize(x, dim=1) * (weight[:, None, None] * shape[1] ** 0.5))

    return Contest(ours, eager, 2 * x.numel() * dtype.itemsize)


def rms_norm_silu_backward(shape: Sequence[int], dtype: torch.dtype) -> Contest:
    """Its gradients: x and dy read, dx written."""
    x, weight, _ = activation(shape, dtype, requires_grad=True)
    ours = backward(fastddpm.rms_norm_silu(x, weight), x, weight)
    eager = backward(F.silu(F.normalize(x, dim=1) * (weight[:, None, None] * shape[1] ** 0.5)), x, weight)
    return Contest(ours, eager, 3 * x.numel() * dtype.itemsize)


def adam_ema(shape: Sequence[int], dtype: torch.dtype) -> Contest:
    """Clip, AdamW and EMA over 40 tensors: gradients for their norm, then five tensors read and four written."""
    params = [torch.randn(shape, device=DEVICE) for _ in range(40)]
    grads = [torch.randn(shape, device=DEVICE) for _ in params]
    first, second, average = ([torch.zeros_like(p) for p in params] for _ in range(3))
    step, lr, decay = (torch.tensor(v, device=DEVICE) for v in (0, 2e-4, 0.9999))

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

    return Contest(ours, eager, 40 * sum(p.numel() for p in params))


def compiled(eager: Call) -> Call:
    torch._dynamo.reset()
    return torch.compile(eager)


Make = Callable[[Sequence[int], torch.dtype], Contest]
F32, BF16 = torch.float32, torch.bfloat16
CIFAR, LATENT = (128, 3, 32, 32), (8, 4, 64, 64)
HOT = (16, 128, 32, 32)
NORMS = [  # of the U-Nets for CIFAR-10, LSUN, ImageNet-64 and Stable Diffusion
    (16, 256, 32, 32), (16, 384, 32, 32), (16, 256, 16, 16), (16, 512, 8, 8), (16, 256, 4, 4), (1, 128, 256, 256),
    (4, 192, 64, 64), (16, 576, 16, 16), (2, 320, 64, 64),
]  # fmt: skip
# case, shape, dtype, whether torch.compile takes part (5 to 20 seconds each)
CASES: list[tuple[Make, Sequence[int], torch.dtype, bool]] = [
    (normal, CIFAR, F32, False), (normal, (8, 3, 256, 256), F32, False), (normal, CIFAR, BF16, False),
    (q_sample, CIFAR, F32, True), (q_sample, (8, 3, 256, 256), F32, False), (q_sample, LATENT, F32, False),
    (q_sample, CIFAR, BF16, False), (diffusion_loss, CIFAR, F32, False), (diffusion_loss, CIFAR, BF16, False),
    (solver_step, CIFAR, F32, True), (solver_step, LATENT, F32, False),
    (group_norm_silu, HOT, F32, True), (group_norm_silu_backward, HOT, F32, False),
    (group_norm_silu, HOT, BF16, True), (group_norm_silu_backward, HOT, BF16, False),
    *((make, shape, F32, False) for shape in NORMS for make in (group_norm_silu, group_norm_silu_backward)),
    (rms_norm_silu, HOT, F32, True), (rms_norm_silu_backward, HOT, F32, False),
    (rms_norm_silu, HOT, BF16, False), (rms_norm_silu_backward, HOT, BF16, False),
    (adam_ema, (256, 256, 3, 3), F32, False),
]  # fmt: skip


def name_of(make: Make, shape: Sequence[int]) -> str:
    return f"{make.__name__.replace('_backward', ' backward')} {'x'.join(map(str, shape))}"


@pytest.mark.parametrize(
    ("make", "shape", "dtype", "with_compile"),
    [pytest.param(*case, id=f"{name_of(*case[:2])} {str(case[2]).removeprefix('torch.')}") for case in CASES],
)
@pytest.mark.timeout(120)
def test_op(
    make: Make, shape: Sequence[int], dtype: torch.dtype, with_compile: bool, threads: int, compare: Any, benchmark: Any
) -> None:
    torch.manual_seed(0)
    if benchmark.disabled:  # no timing: whether it runs is the question
        shape, with_compile = [min(n, limit) for n, limit in zip(shape, (1, shape[1], 4, 4), strict=True)], False
    contest = make(shape, dtype)
    contestants = {"eager": contest.eager, "fastddpm": contest.ours}
    if with_compile:
        contestants["compile"] = compiled(contest.eager)
    if contest.native_op is not None:
        contestants["native op"] = contest.native_op
    with torch.set_grad_enabled("backward" in make.__name__ or make is diffusion_loss):
        compare(
            contestants, case=name_of(make, shape), dtype=str(dtype).removeprefix("torch."), threads=threads,
            size=contest.size, normals=contest.normals,
        )  # fmt: skip
