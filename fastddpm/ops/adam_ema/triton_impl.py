"""adam_ema in Triton: two launches over all parameters."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import float_or_tensor, launch, reason_against, save

CHUNK = 4096  # elements of a program
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # numbered so in the table

# What a chunk is: a row of the table. Addresses, then sizes and dtypes.
PARAM, EXP_AVG, EXP_AVG_SQ, EMA, GRAD, MIRROR, SIZE, GRAD_TYPE, MIRROR_TYPE, COLUMNS = range(10)


@triton.jit
def load_as_float(address, at, inside, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.load(address.to(tl.pointer_type(TYPE)) + at, mask=inside, other=0).to(tl.float32)


@triton.jit
def load_any(address, kind, at, inside):  # type: ignore[no-untyped-def]
    """Elements of a tensor whose dtype is a number of the table; one branch is taken by the whole program."""
    if kind == 0:
        x = load_as_float(address, at, inside, tl.float32)
    elif kind == 1:
        x = load_as_float(address, at, inside, tl.bfloat16)
    elif kind == 2:
        x = load_as_float(address, at, inside, tl.float16)
    else:
        x = load_as_float(address, at, inside, tl.float64)
    return x


@triton.jit
def gradient_squares_kernel(chunks, partial, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of the squares of a chunk of gradients, to its place in ``partial``. Bytes an element: 4 read."""
    row = chunks + tl.program_id(0).to(tl.int64) * 9
    address, size, kind = tl.load(row + 4), tl.load(row + 6), tl.load(row + 7)
    at = tl.arange(0, CHUNK)
    g = load_any(address, kind, at, at < size)
    tl.store(partial + tl.program_id(0), tl.sum(g.to(tl.float64) * g.to(tl.float64), axis=0))


@triton.jit
def lerp(start, end, weight):  # type: ignore[no-untyped-def]
    return tl.where(weight < 0.5, start + weight * (end - start), end - (end - start) * (1.0 - weight))


@triton.jit
def adam_ema_kernel(chunks, numbers, EMA: tl.constexpr, MIRROR: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Clip, AdamW, moving average and mirror of a chunk (Loshchilov and Hutter 2019, algorithm 2).

    Bytes an element: 4 read of the gradient, 12 read and 12 written of p, m and v, 8 of the average, 2 of a mirror in
    half precision. What limits it is memory.
    """
    row = chunks + tl.program_id(0).to(tl.int64) * 9
    valid, factor, weight1, weight2 = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3)
    rate, shrink, root, eps = tl.load(numbers + 4), tl.load(numbers + 5), tl.load(numbers + 6), tl.load(numbers + 7)
    at = tl.arange(0, CHUNK)
    inside = (at < tl.load(row + 6)) & (valid != 0)  # nothing is read or written where the step is skipped
    param = tl.load(row).to(tl.pointer_type(tl.float32)) + at
    first = tl.load(row + 1).to(tl.pointer_type(tl.float32)) + at
    second = tl.load(row + 2).to(tl.pointer_type(tl.float32)) + at
    g = load_any(tl.load(row + 4), tl.load(row + 7), at, inside) * factor
    m = lerp(tl.load(first, mask=inside, other=0), g, weight1)
    v = lerp(tl.load(second, mask=inside, other=0), g * g, weight2)
    p = tl.load(param, mask=inside, other=0) * shrink - m / (tl.sqrt(v) / root + eps) * rate
    tl.store(first, m, mask=inside)
    tl.store(second, v, mask=inside)
    tl.store(param, p, mask=inside)
    if EMA:
        average = tl.load(row + 3).to(tl.pointer_type(tl.float32)) + at
        tl.store(average, lerp(tl.load(average, mask=inside, other=0), p, tl.load(numbers + 8)), mask=inside)
    if MIRROR:
        address, kind = tl.load(row + 5), tl.load(row + 8)
        if kind == 0:
            save(address.to(tl.pointer_type(tl.float32)) + at, p, inside)
        elif kind == 1:
            save(address.to(tl.pointer_type(tl.bfloat16)) + at, p, inside)
        elif kind == 2:
            save(address.to(tl.pointer_type(tl.float16)) + at, p, inside)
        else:
            tl.store(address.to(tl.pointer_type(tl.float64)) + at, p.to(tl.float64), mask=inside)


def unsupported(*, params: list[Tensor], **_: Any) -> str | None:
    """Why these kernels cannot run, or None."""
    return reason_against(params[0])


class _Table:
    """The chunks of all tensors on the device. Made once: in a training loop the addresses stay the same.

    A gradient that was freed and made again has another address; then the table is made again, too.
    """

    def __init__(self) -> None:
        self.key: tuple[Any, ...] | None = None
        self.rows: Tensor | None = None

    def of(self, lists: list[list[Tensor]], device: torch.device) -> Tensor:
        key = (device, *(x.data_ptr() for tensors in lists for x in tensors), *(x.dtype for x in lists[4] + lists[5]))
        if self.rows is None or key != self.key:
            self.key, self.rows = key, torch.tensor(_rows(lists), dtype=torch.int64).reshape(-1, 9).to(device)
        return self.rows


def _rows(lists: list[list[Tensor]]) -> list[list[int]]:
    """A row for each chunk of each parameter."""
    rows = []
    for i, p in enumerate(lists[PARAM]):
        tensors = [tensors[i] if tensors else p for tensors in lists]
        for begin in range(0, p.numel(), CHUNK):
            addresses = [x.data_ptr() + begin * x.element_size() for x in tensors]
            kinds = [FLOATS.index(tensors[k].dtype) for k in (GRAD, MIRROR)]
            rows.append([*addresses, min(CHUNK, p.numel() - begin), *kinds])
    return rows


_table = _Table()


@torch.library.custom_op(
    "fastddpm::triton_adam_ema_",
    mutates_args=("params", "exp_avg", "exp_avg_sq", "step", "ema", "mirror", "found_inf"),
)
def _adam_ema(
    params: list[Tensor], grads: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor], step: Tensor,
    lr: float | None, lr_tensor: Tensor | None, beta1: float, beta2: float, eps: float, weight_decay: float,
    max_grad_norm: float | None, ema: list[Tensor], ema_decay: float | None, ema_decay_tensor: Tensor | None,
    mirror: list[Tensor], grad_scale: Tensor | None, found_inf: Tensor | None,
) -> Tensor:  # fmt: skip
    device = params[0].device
    chunks = _table.of([params, exp_avg, exp_avg_sq, ema, grads, mirror], device)
    partial = torch.empty(chunks.shape[0], dtype=torch.float64, device=device)
    grid = (chunks.shape[0],)
    if chunks.shape[0]:
        gradient_squares_kernel[grid](chunks, partial, CHUNK=CHUNK, num_warps=8)

    # The numbers that all parameters share, on the device and in double precision.
    one = torch.ones((), dtype=torch.float64, device=device)
    factor = one if grad_scale is None else 1 / grad_scale.double()
    norm = (partial.sum().sqrt() * factor).float()
    if max_grad_norm is not None:
        factor = factor * (max_grad_norm / (norm.double() + 1e-6)).clamp(max=1)
    valid = torch.isfinite(norm)
    if found_inf is not None:
        valid = valid & (found_inf == 0)
        found_inf.copy_(~valid)
    count = (step + 1).double()
    rate = one * lr if lr_tensor is None else lr_tensor.double()
    decay = one * (1.0 if ema_decay is None else ema_decay) if ema_decay_tensor is None else ema_decay_tensor.double()
    numbers = torch.stack([
        valid.double(), factor, one * (1 - beta1), one * (1 - beta2), rate / (1 - beta1**count),
        1 - rate * weight_decay, (1 - beta2**count).sqrt(), one * eps, 1 - decay,
    ]).float()  # fmt: skip
    if chunks.shape[0]:
        adam_ema_kernel[grid](chunks, numbers, EMA=bool(ema), MIRROR=bool(mirror), CHUNK=CHUNK, num_warps=8)
    step.add_(valid)
    return norm


@_adam_ema.register_fake
def _(params: list[Tensor], *args: Any) -> Tensor:
    return params[0].new_empty(())


def forward(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    *,
    step: Tensor,
    lr: Tensor | float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    max_grad_norm: float | None,
    ema: list[Tensor] | None,
    ema_decay: Tensor | float | None,
    mirror: list[Tensor] | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> Tensor:
    """See the interface."""
    norm: Tensor = _adam_ema(
        params, grads, exp_avg, exp_avg_sq, step, *float_or_tensor(lr), *betas, eps, weight_decay, max_grad_norm,
        ema or [], *float_or_tensor(ema_decay), mirror or [], grad_scale, found_inf,
    )  # fmt: skip
    return norm
