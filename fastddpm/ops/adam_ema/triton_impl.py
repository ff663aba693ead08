"""adam_ema in Triton: two launches over all parameters of the same dtypes."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import float_or_tensor, reason_against, run, save

CHUNK = 2048  # elements of a program
TYPES = {
    torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float64: tl.float64
}  # fmt: skip

# Two tables on the device. A row of addresses belongs to a parameter, a row of chunks to a program:
PARAM, EXP_AVG, EXP_AVG_SQ, EMA, GRAD, MIRROR = range(6)
# parameter, first element, elements
ADDRESSES, FIELDS, WRITTEN = 6, 3, 32  # columns of each; addresses that one launch writes


@triton.jit(do_not_specialize=[f"a{i}" for i in range(WRITTEN)])
def write_addresses_kernel(
    to, a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15,
    a16, a17, a18, a19, a20, a21, a22, a23, a24, a25, a26, a27, a28, a29, a30, a31,
):  # fmt: skip
    """Addresses from arguments to memory: a copy from the host would wait, or not outlive the capture of a graph."""
    values = (
        a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15,
        a16, a17, a18, a19, a20, a21, a22, a23, a24, a25, a26, a27, a28, a29, a30, a31,
    )  # fmt: skip
    for i in tl.static_range(32):
        tl.store(to + i, values[i])


@triton.jit
def read(address, at, inside, TYPE: tl.constexpr, FULL: tl.constexpr):
    """Elements of a tensor, as float32; all of them with FULL."""
    pointer = address.to(tl.pointer_type(TYPE))
    if FULL:
        return tl.load(tl.multiple_of(pointer, 16) + at).to(tl.float32)
    else:
        return tl.load(pointer + at, mask=inside, other=0).to(tl.float32)


@triton.jit
def write(address, at, x, inside, TYPE: tl.constexpr, FULL: tl.constexpr):
    pointer = address.to(tl.pointer_type(TYPE))
    if FULL:
        save(tl.multiple_of(pointer, 16) + at, x, None)
    else:
        save(pointer + at, x, inside)


@triton.jit
def gradient_squares_kernel(chunks, addresses, partial, GRAD: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr):
    """The sum of the squares of a chunk of gradients, to its place in ``partial``. Bytes an element: 4 read."""
    row = chunks + tl.program_id(0).to(tl.int64) * 3
    address, begin, size = tl.load(addresses + tl.load(row) * 6 + 4), tl.load(row + 1), tl.load(row + 2)
    part = tl.arange(0, CHUNK)
    at = begin + part
    if ALIGNED and size == CHUNK:
        g = read(address, tl.multiple_of(begin, 16) + part, part < size, GRAD, True)
    else:
        g = read(address, at, part < size, GRAD, False)
    tl.store(partial + tl.program_id(0), tl.sum(g.to(tl.float64) * g.to(tl.float64), axis=0))


@triton.jit
def lerp(start, end, weight):
    return tl.where(weight < 0.5, start + weight * (end - start), end - (end - start) * (1.0 - weight))


@triton.jit
def update(
    of, numbers, at, inside, GRAD: tl.constexpr, EMA: tl.constexpr, MIRROR: tl.constexpr, FULL: tl.constexpr
):  # fmt: skip
    factor, weight1, weight2 = tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3)
    rate, shrink, root, eps = tl.load(numbers + 4), tl.load(numbers + 5), tl.load(numbers + 6), tl.load(numbers + 7)
    param, first, second = tl.load(of), tl.load(of + 1), tl.load(of + 2)
    g = read(tl.load(of + 4), at, inside, GRAD, FULL) * factor
    m = lerp(read(first, at, inside, tl.float32, FULL), g, weight1)
    v = lerp(read(second, at, inside, tl.float32, FULL), g * g, weight2)
    p = read(param, at, inside, tl.float32, FULL) * shrink - m / (tl.sqrt(v) / root + eps) * rate
    write(first, at, m, inside, tl.float32, FULL)
    write(second, at, v, inside, tl.float32, FULL)
    write(param, at, p, inside, tl.float32, FULL)
    if EMA:
        average = tl.load(of + 3)
        of_average = lerp(read(average, at, inside, tl.float32, FULL), p, tl.load(numbers + 8))
        write(average, at, of_average, inside, tl.float32, FULL)
    if MIRROR is not None:
        write(tl.load(of + 5), at, p, inside, MIRROR, FULL)


@triton.jit
def adam_ema_kernel(
    chunks, addresses, numbers, GRAD: tl.constexpr, EMA: tl.constexpr, MIRROR: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Clip, AdamW, moving average and mirror of a chunk (Loshchilov and Hutter 2019, algorithm 2).

    Bytes an element: 4 read of the gradient, 12 read and 12 written of p, m and v, 8 of the average, 2 of a mirror in
    half precision. What limits it is memory.
    """
    row = chunks + tl.program_id(0).to(tl.int64) * 3
    of, begin = addresses + tl.load(row) * 6, tl.load(row + 1)
    # nothing is read or written where the step is skipped
    size = tl.where(tl.load(numbers) > 0.5, tl.load(row + 2), 0)
    part = tl.arange(0, CHUNK)
    if ALIGNED and size == CHUNK:
        update(of, numbers, tl.multiple_of(begin, 16) + part, part < size, GRAD, EMA, MIRROR, True)
    else:
        update(of, numbers, begin + part, part < size, GRAD, EMA, MIRROR, False)


def unsupported(*, params: list[Tensor], **_: Any) -> str | None:
    """Why these kernels cannot run, or None."""
    return reason_against(params[0])


Kinds = tuple[torch.dtype, torch.dtype]
"""Of the gradient and of the mirror of a parameter."""


def _kinds(lists: list[list[Tensor]]) -> list[Kinds]:
    return [(g.dtype, m.dtype) for g, m in zip(lists[GRAD], lists[MIRROR], strict=True)]


class _Tables:
    """The tables of one set of parameters, kept from step to step.

    The chunks follow from sizes and dtypes: those of gradients and mirrors of the same dtypes, end to end, are the work
    of one launch. The addresses are written anew when one has changed, as that of a gradient that was freed and made
    again.
    """

    def __init__(self, lists: list[list[Tensor]]) -> None:
        params, device = lists[PARAM], lists[PARAM][0].device
        rows: list[list[int]] = []
        self.launches: list[tuple[Kinds, int, int]] = []  # of which dtypes, first chunk, the one behind the last
        kinds = _kinds(lists)
        for kind in dict.fromkeys(kinds):
            first = len(rows)
            rows += [
                [i, begin, min(CHUNK, p.numel() - begin)]
                for i, p in enumerate(params)
                if kinds[i] == kind
                for begin in range(0, p.numel(), CHUNK)
            ]
            self.launches.append((kind, first, len(rows)))
        # the copy does not wait for the device: its source stays, and cannot be paged out
        self.host = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda").reshape(-1, FIELDS)
        self.chunks = self.host.to(device, non_blocking=True)
        count = -(-len(params) * ADDRESSES // WRITTEN) * WRITTEN
        self.addresses = torch.zeros(count, dtype=torch.int64, device=device)
        self.written: list[int] = []
        self.aligned = False  # every address to 16 bytes

    def write(self, lists: list[list[Tensor]]) -> None:
        """Bring the addresses up to date."""
        addresses = [tensors[i].data_ptr() for i in range(len(lists[PARAM])) for tensors in lists]
        capturing = _is_capturing(self.addresses.device)
        if capturing:
            _of_graphs.add(self)
        elif self.addresses.is_cuda and self not in _of_graphs:  # nobody gets their memory before this stream is done
            for table in (self.chunks, self.addresses):
                table.record_stream(torch.cuda.current_stream(table.device))
        self.aligned = all(address % 16 == 0 for address in addresses)
        if addresses == self.written and not capturing:
            return
        if capturing:  # a graph has a table of its own: the next step outside of it must not change that
            self.addresses = torch.zeros_like(self.addresses)
        self.written = [] if capturing else addresses
        addresses = addresses + [addresses[0]] * (self.addresses.numel() - len(addresses))
        for begin in range(0, len(addresses), WRITTEN):
            run(write_addresses_kernel, (1,), self.addresses[begin:], *addresses[begin : begin + WRITTEN])


KEPT = 8
_tables: dict[tuple[Any, ...], _Tables] = {}  # of the sets of parameters stepped last, the last one at the end
_of_graphs: set[_Tables] = set()  # a replay reads them, however long ago it was captured


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _tables_of(lists: list[list[Tensor]]) -> _Tables:
    key = (lists[PARAM][0].device, *(p.numel() for p in lists[PARAM]), *_kinds(lists))
    tables = _tables.pop(key, None) or _Tables(lists)
    tables.write(lists)
    _tables[key] = tables
    if len(_tables) > KEPT:
        del _tables[next(iter(_tables))]
    return tables


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
    tables = _tables_of([params, exp_avg, exp_avg_sq, ema or params, grads, mirror or params])
    chunks, addresses = tables.chunks, tables.addresses
    partial = torch.empty(chunks.shape[0], dtype=torch.float64, device=device)
    shared = dict(ALIGNED=tables.aligned, CHUNK=CHUNK, num_warps=8)
    for (grad, _), first, end in tables.launches:
        rows, squares = chunks[first:], partial[first:]
        run(gradient_squares_kernel, (end - first,), rows, addresses, squares, GRAD=TYPES[grad], **shared)

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
    rate = one * (lr or 0.0) if lr_tensor is None else lr_tensor.double()
    decay = one * (1.0 if ema_decay is None else ema_decay) if ema_decay_tensor is None else ema_decay_tensor.double()
    numbers = torch.stack([
        valid.double(), factor, one * (1 - beta1), one * (1 - beta2), rate / (1 - beta1**count),
        1 - rate * weight_decay, (1 - beta2**count).sqrt(), one * eps, 1 - decay,
    ]).float()  # fmt: skip
    for (grad, kept), first, end in tables.launches:
        types = dict(GRAD=TYPES[grad], EMA=bool(ema), MIRROR=TYPES[kept] if mirror else None)
        run(adam_ema_kernel, (end - first,), chunks[first:], addresses, numbers, **types, **shared)
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
