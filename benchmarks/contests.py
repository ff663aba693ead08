"""Each op as a user calls it, and the shortest PyTorch that a good user would write: what the benchmarks compare.

A contest gives functions of the same large inputs, of which there can be copies to take turns with, and the least
number of bytes that the op has to move: inputs read once, outputs written once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastddpm
from fastddpm.ops import normal as draw_normal

Call = Callable[[], object]
Function = Callable[..., Any]

T = 1000
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALPHAS_CUMPROD = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0)
TABLE = torch.stack([ALPHAS_CUMPROD.sqrt(), (1 - ALPHAS_CUMPROD).sqrt()], dim=1).float().to(DEVICE)


@dataclass(frozen=True)
class Contest:
    """Ours, eager and, where there is one, the single ATen operator, each a function of ``inputs``; bytes moved and
    normal numbers drawn. ``timed``: the call, its gradient alone, or both one after the other. ``updates``: what is
    written was read in the same place.
    """

    inputs: tuple[Tensor, ...]
    ours: Function
    eager: Function
    size: int
    normals: int = 0
    native_op: Function | None = None
    timed: str = "call"
    updates: bool = False

    def bound(self, function: Function, inputs: tuple[Tensor, ...] | None = None) -> Call:
        """What is timed of a function, on these inputs or on copies of them."""
        inputs = self.inputs if inputs is None else inputs
        if self.timed == "call":
            return lambda: function(*inputs)
        if self.timed == "both":
            return lambda: torch.autograd.grad(function(*inputs), inputs)
        y = function(*inputs)
        dy = torch.randn_like(y)
        return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)

    def copied_inputs(self) -> tuple[Tensor, ...]:
        return tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in self.inputs)


DENSE, NHWC = torch.contiguous_format, torch.channels_last


def normal(shape: Sequence[int], dtype: torch.dtype) -> Contest:
    sample = torch.arange(shape[0], device=DEVICE)

    def ours() -> object:
        return draw_normal(shape, seed=0, sample=sample, step=0, stream=1, dtype=dtype)

    def eager() -> object:
        return torch.randn(*shape, dtype=dtype, device=DEVICE)

    elements = torch.Size(shape).numel()
    return Contest((), ours, eager, elements * dtype.itemsize, elements)


def q_sample(shape: Sequence[int], dtype: torch.dtype, order: torch.memory_format = DENSE) -> Contest:
    """Noise uint8 images."""
    x0 = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE).contiguous(memory_format=order)
    t, sample = torch.randint(0, T, (shape[0],), device=DEVICE), torch.arange(shape[0], device=DEVICE)

    def ours(x0: Tensor) -> object:
        return fastddpm.q_sample(x0, t, TABLE, seed=0, sample=sample, step=0, dtype=dtype)

    def eager(x0: Tensor) -> object:
        x = x0.to(dtype) * (2 / 255) - 1
        a = TABLE[t].to(dtype)[:, :, None, None, None]
        return a[:, 0] * x + a[:, 1] * torch.randn_like(x)

    return Contest((x0,), ours, eager, x0.numel() * (1 + dtype.itemsize), x0.numel())


def q_sample_nhwc(shape: Sequence[int], dtype: torch.dtype) -> Contest:
    return q_sample(shape, dtype, NHWC)


def diffusion_loss(shape: Sequence[int], dtype: torch.dtype, order: torch.memory_format = DENSE) -> Contest:
    """Weighted squared error and its gradient, ours with the noise drawn again: prediction read, gradient written."""
    weight = torch.rand(shape[0], device=DEVICE)
    t, sample = torch.randint(0, T, (shape[0],), device=DEVICE), torch.arange(shape[0], device=DEVICE)
    pred, noise = (torch.randn(shape, dtype=dtype, device=DEVICE).contiguous(memory_format=order) for _ in range(2))
    pred.requires_grad_()

    def ours(pred: Tensor) -> object:
        loss, _ = fastddpm.diffusion_loss(pred, t, seed=0, sample=sample, step=0, weight=weight)
        return loss

    def eager(pred: Tensor) -> object:
        return (F.mse_loss(pred, noise, reduction="none").mean((1, 2, 3)) * weight).mean()

    return Contest((pred,), ours, eager, 2 * pred.numel() * dtype.itemsize, pred.numel(), timed="both")


def diffusion_loss_nhwc(shape: Sequence[int], dtype: torch.dtype) -> Contest:
    return diffusion_loss(shape, dtype, NHWC)


def solver_step(shape: Sequence[int], dtype: torch.dtype, order: torch.memory_format = DENSE) -> Contest:
    """One DDPM update with noise: state and prediction read; ours writes the state and pred_x0, eager the state."""
    x, out = (torch.randn(shape, dtype=dtype, device=DEVICE).contiguous(memory_format=order) for _ in range(2))
    sample = torch.arange(shape[0], device=DEVICE)
    t = T // 2
    beta = 1 - ALPHAS_CUMPROD[t] / ALPHAS_CUMPROD[t - 1]
    k0, k1 = ALPHAS_CUMPROD[t].rsqrt(), -(1 / ALPHAS_CUMPROD[t] - 1).sqrt()
    k2 = ALPHAS_CUMPROD[t - 1].sqrt() * beta / (1 - ALPHAS_CUMPROD[t])
    k3 = (1 - beta).sqrt() * (1 - ALPHAS_CUMPROD[t - 1]) / (1 - ALPHAS_CUMPROD[t])
    row = [float(k) for k in (k0, k1, k2, k3, 0, beta.sqrt(), 0, beta.log(), beta.log())]
    table = torch.tensor([row], device=DEVICE)

    def ours(x: Tensor, out: Tensor) -> object:
        return fastddpm.solver_step(x, out, table, 0, clamp=1.0, seed=0, sample=sample)

    def eager(x: Tensor, out: Tensor) -> object:
        pred = (row[0] * x + row[1] * out).clamp(-1, 1)
        return row[2] * pred + row[3] * x + row[5] * torch.randn_like(x)

    return Contest((x, out), ours, eager, 4 * x.numel() * dtype.itemsize, x.numel())


def solver_step_nhwc(shape: Sequence[int], dtype: torch.dtype) -> Contest:
    return solver_step(shape, dtype, NHWC)


def activation(shape: Sequence[int], dtype: torch.dtype, requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(*shape, dtype=dtype, device=DEVICE).contiguous(memory_format=torch.channels_last)
    weights = (torch.rand(shape[1], dtype=dtype, device=DEVICE) for _ in range(2))
    x, weight, bias = (p.requires_grad_(requires_grad) for p in (x, *weights))
    return x, weight, bias


def group_norm_silu(shape: Sequence[int], dtype: torch.dtype, gradient: bool = False) -> Contest:
    """GroupNorm and SiLU in channels_last: x read, y written; or its gradients: x and dy read, dx written."""
    inputs = activation(shape, dtype, gradient)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> object:
        return fastddpm.group_norm_silu(x, weight, bias, 32)

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> object:
        return F.silu(F.group_norm(x, 32, weight, bias, 1e-6))

    def native_op(x: Tensor, weight: Tensor, bias: Tensor) -> object:
        return F.group_norm(x, 32, weight, bias, 1e-6)

    size = (3 if gradient else 2) * inputs[0].numel() * dtype.itemsize
    return Contest(inputs, ours, eager, size, native_op=native_op, timed="gradient" if gradient else "call")


def group_norm_silu_backward(shape: Sequence[int], dtype: torch.dtype) -> Contest:
    return group_norm_silu(shape, dtype, gradient=True)


def rms_norm_silu(shape: Sequence[int], dtype: torch.dtype, gradient: bool = False) -> Contest:
    """Channel RMSNorm and SiLU in channels_last: x read, y written; or its gradients: x and dy read, dx written."""
    x, weight, _ = activation(shape, dtype, gradient)

    def ours(x: Tensor, weight: Tensor) -> object:
        return fastddpm.rms_norm_silu(x, weight)

    def eager(x: Tensor, weight: Tensor) -> object:
        return F.silu(F.normalize(x, dim=1) * (weight[:, None, None] * shape[1] ** 0.5))

    size = (3 if gradient else 2) * x.numel() * dtype.itemsize
    return Contest((x, weight), ours, eager, size, timed="gradient" if gradient else "call")


def rms_norm_silu_backward(shape: Sequence[int], dtype: torch.dtype) -> Contest:
    return rms_norm_silu(shape, dtype, gradient=True)


def conv3x3(shape: Sequence[int], dtype: torch.dtype, gradient: bool = False) -> Contest:
    """A 3x3 convolution to as many channels in channels_last; or its gradients. Arithmetic limits it, not the bytes."""
    c = shape[1]
    x, _, bias = activation(shape, dtype, gradient)
    weight = torch.randn(c, c, 3, 3, dtype=dtype, device=DEVICE).contiguous(memory_format=torch.channels_last)
    weight = weight.div_(3 * c**0.5).requires_grad_(gradient)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> object:
        return fastddpm.conv3x3(x, weight, bias)

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> object:
        return F.conv2d(x, weight, bias, padding=1)

    size = (2 * x.numel() + weight.numel()) * (2 if gradient else 1) * dtype.itemsize
    return Contest((x, weight, bias), ours, eager, size, timed="gradient" if gradient else "call")


def conv3x3_backward(shape: Sequence[int], dtype: torch.dtype) -> Contest:
    return conv3x3(shape, dtype, gradient=True)


def linear(shape: Sequence[int], dtype: torch.dtype, gradient: bool = False) -> Contest:
    """Rows times a matrix, of (rows, inputs, outputs); or its gradients. Arithmetic limits it, not the bytes."""
    rows, inputs, outputs = shape
    x = torch.randn(rows, inputs, dtype=dtype, device=DEVICE)
    weight = torch.randn(outputs, inputs, dtype=dtype, device=DEVICE).div_(inputs**0.5)
    bias = torch.rand(outputs, dtype=dtype, device=DEVICE)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> object:
        return fastddpm.linear(x, weight, bias)

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> object:
        return F.linear(x, weight, bias)

    x, weight, bias = (p.requires_grad_(gradient) for p in (x, weight, bias))
    size = (x.numel() + weight.numel()) * (2 if gradient else 1) + rows * outputs
    return Contest((x, weight, bias), ours, eager, size * dtype.itemsize, timed="gradient" if gradient else "call")


def linear_backward(shape: Sequence[int], dtype: torch.dtype) -> Contest:
    return linear(shape, dtype, gradient=True)


def self_attention(shape: Sequence[int], dtype: torch.dtype, gradient: bool = False) -> Contest:
    """Attention of one head, of (samples, tokens, 3 numbers); or its gradient. Arithmetic limits it, not the bytes."""
    qkv = torch.randn(*shape, dtype=dtype, device=DEVICE).requires_grad_(gradient)

    def ours(qkv: Tensor) -> object:
        return fastddpm.self_attention(qkv)

    def eager(qkv: Tensor) -> object:
        q, k, v = (part.unsqueeze(1) for part in qkv.chunk(3, dim=2))
        return F.scaled_dot_product_attention(q, k, v).squeeze(1)

    size = qkv.numel() * 2 + qkv.numel() // 3 if gradient else qkv.numel() // 3 * 4
    return Contest((qkv,), ours, eager, size * dtype.itemsize, timed="gradient" if gradient else "call")


def self_attention_backward(shape: Sequence[int], dtype: torch.dtype) -> Contest:
    return self_attention(shape, dtype, gradient=True)


def adam_ema(shape: Sequence[int], dtype: torch.dtype) -> Contest:
    """Clip, AdamW and EMA over 40 tensors: gradients for their norm, then five tensors read and four written."""
    params = [torch.randn(shape, device=DEVICE) for _ in range(40)]
    grads = [torch.randn(shape, device=DEVICE) for _ in params]
    first, second, average = ([torch.zeros_like(p) for p in params] for _ in range(3))
    step, lr, decay = (torch.tensor(v, device=DEVICE) for v in (0, 2e-4, 0.9999))

    def ours() -> object:
        norm = fastddpm.adam_ema(
            params, grads, first, second, step=step, lr=lr, max_grad_norm=1.0, ema=average, ema_decay=decay
        )
        return norm, params, first, second, average

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

    return Contest((), ours, eager, 40 * sum(p.numel() for p in params), updates=True)


Make = Callable[[Sequence[int], torch.dtype], Contest]


def name_of(make: Make, shape: Sequence[int]) -> str:
    op = make.__name__.replace("_backward", " backward").replace("_nhwc", " NHWC")
    return f"{op} {'x'.join(map(str, shape))}"


def compiled(eager: Function) -> Function:
    torch._dynamo.reset()
    return torch.compile(eager)


def fastddpm_libraries() -> list[Path]:
    """The shared libraries of the package."""
    return sorted(Path(fastddpm.__file__).parent.glob("*.so"))
