"""Each op of this library at the shapes that a configuration gives it, against the time in which its bytes move."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .._dispatch import explain
from ..nn.norm import GroupNormSiLU
from ..nn.unet import UNet, UNetConfig
from .parts import trace_calls
from .timing import Call, copy_rate, least, update_rate
from .work import Work


@dataclass(frozen=True)
class OpTime:
    """One op at one shape.

    Attributes:
        op, shape: of its main argument. backend: which implementation ran.
        calls: how often a training step calls it; a sampling step, for solver_step.
        seconds: the best of its calls. bytes: that it must move: inputs read once, outputs written once.
        floor: seconds that a copy of as many bytes takes; of adam_ema, which writes where it reads, an update in place.
    """

    op: str
    shape: tuple[int, ...]
    backend: str
    calls: int
    seconds: float
    bytes: int
    floor: float

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Case:
    """An op to time: what is called, with what `explain` is asked, and the bytes it must move."""

    op: str
    shape: tuple[int, ...]
    calls: int
    bytes: int
    call: Call
    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def measure_ops(
    work: Work, *, repeat: int = 20, seconds: float = 2.0, only: str | None = None, trace: Path | None = None
) -> list[OpTime]:
    """Time every op of a training step and of a sampling step.

    Args:
        work: whose network, batch size and dtype are taken.
        repeat: calls of each, the best counts. seconds: for one case at most, once three calls are timed.
        only: the name of one op; None takes all.
        trace: where to write a trace for Perfetto, with one call of each under its op and shape; None writes none.

    Raises:
        ValueError: ``only`` is no op that a step calls; a number out of its range.
    """
    if only is not None and only not in MAKERS:
        raise ValueError(f"measure_ops: expected only to be one of {', '.join(MAKERS)}, got {only!r}; choose one")
    device, found = work.device, []
    makers = [make for name, make in MAKERS.items() if only in (None, name)]
    for case in _cases(makers, work):
        best = least(case.call, device, repeat, seconds)
        rate = update_rate if case.op == "adam_ema" else copy_rate
        floor = case.bytes / rate(case.bytes, device, repeat)
        found.append(OpTime(case.op, case.shape, _backend(case), case.calls, best, case.bytes, floor))
    if trace is not None:
        trace_calls(((f"{case.op} {_size(case)}", case.call) for case in _cases(makers, work)), device, trace)
    return found


def _cases(makers: Sequence[Callable[[Work], Iterator[Case]]], work: Work) -> Iterator[Case]:
    """One after the other, so that there is memory for the largest alone."""
    for make in makers:
        yield from make(work)


def _size(case: Case | OpTime) -> str:
    return "x".join(map(str, case.shape))


def table_of(found: list[OpTime]) -> list[str]:
    """The times as text in columns: a line for each op and shape."""
    head = f"{'op':<26}{'shape':<20}{'calls':>5}{'ms':>10}{'images/s':>12}{'GB/s':>8}{'of floor':>9}  implementation"
    lines = [head]
    for row in found:
        rate = f"{row.shape[0] / row.seconds:>12,.0f}" if row.op != "adam_ema" else f"{'':>12}"
        lines.append(
            f"{row.op:<26}{_size(row):<20}{row.calls:>5}{row.seconds * 1e3:>10.3f}{rate}"
            f"{row.bytes / row.seconds / 1e9:>8.1f}{row.floor / row.seconds:>9.0%}  {row.backend}"
        )
    return lines


def _backend(case: Case) -> str:
    with contextlib.redirect_stdout(io.StringIO()):
        text = explain(case.function, *case.arguments, **case.options)
    return next(line.split()[0] for line in text.splitlines() if line.endswith("chosen"))


def _images(work: Work) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 images [B, C, H, W], t [B] and the index of each sample [B]."""
    c, batch, device = UNetConfig(**work.unet), work.config.batch_size, work.device
    images = torch.randint(0, 256, (batch, c.in_channels, *c.image_size), dtype=torch.uint8, device=device)
    return images, torch.full((batch,), 1, device=device), torch.arange(batch, device=device)


def _q_sample(work: Work) -> Iterator[Case]:
    images, t, sample = _images(work)
    table = torch.full((2, 2), 0.5, device=work.device)
    options: dict[str, Any] = dict(seed=0, sample=sample, step=0)
    size = images.numel() * (1 + 4)
    yield _case("q_sample", ops.q_sample, images.shape, 1, size, (images, t, table), options)


def _diffusion_loss(work: Work) -> Iterator[Case]:
    images, t, sample = _images(work)
    pred = torch.randn(images.shape, dtype=work.dtype, device=work.device).requires_grad_()
    options: dict[str, Any] = dict(seed=0, sample=sample, step=0)

    def call() -> object:
        return torch.autograd.grad(ops.diffusion_loss(pred, t, **options)[0], pred)

    size = 2 * pred.numel() * pred.itemsize
    yield Case("diffusion_loss", tuple(pred.shape), 1, size, call, ops.diffusion_loss, (pred, t), options)


def _solver_step(work: Work) -> Iterator[Case]:
    images, _, sample = _images(work)
    x, out = (torch.randn(images.shape, device=work.device) for _ in range(2))
    table = torch.tensor([[1.0, -0.5, 0.5, 0.5, 0.0, 0.1, 0.0, 0.0, 0.0]], device=work.device)
    options: dict[str, Any] = dict(clamp=1.0, seed=0, sample=sample)
    yield _case("solver_step", ops.solver_step, x.shape, 1, 4 * x.numel() * 4, (x, out, table, 0), options)


def _group_norm_silu(work: Work) -> Iterator[Case]:
    for (shape, groups, activation), calls in _norms(work).items():
        x = torch.randn(shape, dtype=work.dtype, device=work.device).contiguous(memory_format=torch.channels_last)
        weight, bias = (torch.rand(shape[1], dtype=work.dtype, device=work.device) for _ in range(2))
        arguments: tuple[Any, ...] = (x, weight, bias, groups)
        options: dict[str, Any] = dict(activation=activation)
        size = x.numel() * x.itemsize
        name = "group_norm_silu" if activation else "group_norm"
        yield _case(name, ops.group_norm_silu, shape, calls, 2 * size, arguments, options)

        wanted = [p.detach().requires_grad_() for p in (x, weight, bias)]
        back = _gradients(ops.group_norm_silu(wanted[0], wanted[1], wanted[2], groups, **options), wanted)
        yield Case(f"{name} backward", shape, calls, 3 * size, back, ops.group_norm_silu, arguments, options)


def _adam_ema(work: Work) -> Iterator[Case]:
    weights = [p.detach() for p in UNet(UNetConfig(**work.unet)).to(work.device).parameters()]
    gradients, first, second, average = ([torch.zeros_like(p) for p in weights] for _ in range(4))
    step, rate, decay = (torch.tensor(v, device=work.device) for v in (0, 1e-4, 0.9999))
    options: dict[str, Any] = dict(step=step, lr=rate, max_grad_norm=1.0, ema=average, ema_decay=decay)
    count = sum(p.numel() for p in weights)
    yield _case("adam_ema", ops.adam_ema, (count,), 1, 40 * count, (weights, gradients, first, second), options)


def _case(
    name: str, function: Any, shape: Any, calls: int, size: int, arguments: tuple[Any, ...], options: dict[str, Any]
) -> Case:
    def call() -> object:
        return function(*arguments, **options)

    return Case(name, tuple(shape), calls, size, call, function, arguments, options)


def _gradients(y: Any, wanted: list[Tensor]) -> Call:
    dy = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)


def _norms(work: Work) -> Counter[tuple[tuple[int, ...], int, bool]]:
    """Shape, groups and whether a SiLU follows of every group norm in the network, and how often."""
    network = UNet(UNetConfig(**work.unet)).to(work.device)
    found: Counter[tuple[tuple[int, ...], int, bool]] = Counter()

    def see(module: nn.Module, arguments: Any, options: Any, y: Tensor) -> None:
        assert isinstance(module, GroupNormSiLU)
        found[tuple(y.shape), module.num_groups, module.activation] += 1

    for module in network.modules():
        if isinstance(module, GroupNormSiLU):
            module.register_forward_hook(see, with_kwargs=True)
    images, t, _ = _images(work)
    with torch.no_grad():
        network.eval()(images.float(), t)
    return found


MAKERS = {
    "q_sample": _q_sample,
    "diffusion_loss": _diffusion_loss,
    "solver_step": _solver_step,
    "group_norm_silu": _group_norm_silu,
    "adam_ema": _adam_ema,
}
