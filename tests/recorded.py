"""CUDA graphs on a CPU: a recording repeats the same operators on the same memory, and runs no Python in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastddpm import _graph
from fastddpm.nn import layers
from fastddpm.ops.linear import native_impl

Operator = tuple[Any, Any, Any, list[Tensor]]


def record_on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have the CPU record as a GPU does; returns what happens from now on: "record" and "replay"."""
    happened: list[str] = []

    def capture(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
        happened.append("record")
        graph = Recorder()
        with graph:
            function()
        graph.undo()

        def replay() -> None:
            happened.append("replay")
            graph.replay()

        return replay

    monkeypatch.setattr(_graph, "can_record", lambda device: True)
    monkeypatch.setattr(_graph, "beside", lambda function, device: function())
    monkeypatch.setattr(_graph, "capture", capture)
    for module in (layers, native_impl):
        monkeypatch.setattr(module, "is_kept", lambda: False)  # on a GPU no weights are kept transformed
    return happened


def waits(func: Any, given: list[Tensor]) -> bool:
    """Whether an operator on these tensors makes the host wait for a device: it reads a number, or counts elements."""
    if func.overloadpacket is torch.ops.aten.index:  # by a mask
        return any(x.dtype in (torch.bool, torch.uint8) for x in given[1:])
    reads = any("Tensor" not in str(returned.type) for returned in func._schema.returns)
    return (reads and bool(given)) or torch.Tag.dynamic_output_shape in func.tags


class Recorder(TorchDispatchMode):
    """Writes down the operators. What they give lies afterwards where it lay; what they wrote to is put back."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[Operator] = []
        self.own: set[int] = set()
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if waits(func, given):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        places = {_place(x) for x in given}
        if func._schema.is_mutable:
            self.before += [(x, x.clone()) for x in given if _place(x) not in self.own]
        result = func(*args, **kwargs)
        made = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor) and _place(x) not in places]
        self.own.update(map(_place, made))
        self.operators.append((func, args, kwargs, made))
        return result

    def undo(self) -> None:
        """As if nothing had run."""
        for _, _, _, made in self.operators:
            for x in made:
                x.fill_(float("nan") if x.is_floating_point() else 1)
        for x, value in reversed(self.before):
            x.copy_(value)

    def replay(self) -> None:
        """Run it."""
        with torch.autocast("cpu", enabled=False), torch.no_grad():
            for func, args, kwargs, made in self.operators:
                places = {_place(x) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
                found = pytree.tree_leaves(func(*args, **kwargs))
                new = [x for x in found if isinstance(x, Tensor) and _place(x) not in places]
                for x, value in zip(made, new, strict=True):
                    x.copy_(value)


def _place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
