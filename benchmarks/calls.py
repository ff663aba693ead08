"""What a call of an op costs beside its work: each op at a size that takes no time.

The operator is what C++ registered, called with the arguments that the call gives it. What the call takes beside it is
Python, which checks the arguments and chooses the implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import contests
from benchmarks.contests import Call, Make

# op: its contest, the shape, and whether it has a gradient
CASES: dict[str, tuple[Make, Sequence[int], bool]] = {
    "normal": (contests.normal, (2, 3, 2, 2), False),
    "q_sample": (contests.q_sample, (2, 3, 2, 2), False),
    "diffusion_loss": (contests.diffusion_loss, (2, 3, 2, 2), True),
    "solver_step": (contests.solver_step, (2, 3, 2, 2), False),
    "group_norm_silu": (contests.group_norm_silu, (2, 32, 2, 2), True),
    "rms_norm_silu": (contests.rms_norm_silu, (2, 32, 2, 2), True),
    "conv3x3": (contests.conv3x3, (1, 32, 2, 2), True),
    "linear": (contests.linear, (2, 32, 32), True),
    "self_attention": (contests.self_attention, (1, 4, 96), True),
}
TIMES = 100  # calls in a row, of which one takes microseconds


class Recorder(TorchDispatchMode):
    """The operators that are called within the block, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def operator_of(call: Call) -> Call:
    """The one operator that a call comes down to, without a gradient."""
    call()  # the first makes what is kept for the others
    with torch.no_grad(), Recorder() as recorder:
        call()
    (operator, args, kwargs), *others = recorder.calls
    if others:
        raise ValueError(f"expected a call of one operator, got {[operator, *(o[0] for o in others)]}")
    return lambda: operator(*args, **kwargs)


def calls_of(op: str) -> dict[str, Call]:
    """By contestant: ours, its operator alone, what a user of PyTorch writes; and these where a gradient is wanted."""
    make, shape, differentiable = CASES[op]
    contest = make(shape, torch.float32)

    def bound(function: Callable[..., object], requires_grad: bool = False) -> Call:
        inputs = tuple(x.detach().requires_grad_(requires_grad and x.is_floating_point()) for x in contest.inputs)
        return lambda: function(*inputs)

    ours = bound(contest.ours)
    calls = {"fastddpm": ours, "operator": operator_of(ours), "eager": bound(contest.eager)}
    calls = {name: repeated(call, gradient=False) for name, call in calls.items()}
    if differentiable:
        calls["fastddpm, gradient"] = repeated(bound(contest.ours, True), gradient=True)
        calls["eager, gradient"] = repeated(bound(contest.eager, True), gradient=True)
    return calls


def repeated(call: Call, gradient: bool) -> Call:
    """So many calls, with autograd or without it, as a sampling loop makes them."""

    def many() -> None:
        with torch.set_grad_enabled(gradient):
            for _ in range(TIMES):
                call()

    return many


class Nothing(torch.autograd.Function):
    """Does nothing but be an autograd.Function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


def yardsticks() -> dict[str, Call]:
    """The least that PyTorch asks for an operator, and for an autograd.Function with one in it."""
    x = torch.randn(2, 32, 2, 2, requires_grad=True)
    return {
        "torch.empty_like": repeated(lambda: torch.empty_like(x), gradient=False),
        "an autograd.Function with it": repeated(lambda: Nothing.apply(x), gradient=True),  # type: ignore[no-untyped-call]
    }
