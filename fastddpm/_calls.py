"""Calls that are the same but for the numbers in their tensors: recorded once for each kind, then repeated.

On a GPU a recording is a CUDA graph (`_graph`), on a CPU the list of operators (`_tape`).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import _dispatch, _graph, _tape
from .ops.conv3x3 import Transformed, keep_transformed

KINDS = 8
"""Kinds of calls of one function that are recorded: on a GPU each keeps its activations."""


class Calls:
    """The recordings of one function; a copy starts without them.

    Args:
        what: is called, for the warning. remedy: what to do about it.
    """

    def __init__(self, what: str, remedy: str) -> None:
        self.what, self.remedy = what, remedy
        self.given_up = False
        self._forget(None)

    def _forget(self, state: Hashable) -> None:
        self.state = state
        self.seen: Counter[Hashable] = Counter()
        self.recorded: dict[Hashable, _Graph | _List] = {}
        self.transformed = Transformed()

    def __reduce__(self) -> Any:
        return Calls, (self.what, self.remedy)

    def __call__(
        self, function: Callable[..., Any], device: torch.device, state: Hashable, args: Any, kwargs: Any
    ) -> Any:
        """The result of the call.

        Args:
            function: what is recorded. device: where it works.
            state: what a recording depends on beside the arguments: with another all are made anew.
            args, kwargs: tensors may have other values at each call; all else must be the same to be the same call.
        """
        if state != self.state:
            self._forget(state)
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        kinds = [(x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else (type(x), x) for x in leaves]
        modes = _dispatch._forced, torch.is_inference_mode_enabled(), torch.is_autocast_enabled(device.type)
        call = (*modes, torch.get_autocast_dtype(device.type), str(structure), tuple(kinds))
        try:
            recording = self.recorded.get(call)
        except TypeError:  # an argument that cannot be compared
            return function(*args, **kwargs)
        make = _Graph if device.type == "cuda" else _List
        if recording is None:
            self.seen[call] += 1
            if self.given_up or self.seen[call] <= make.WARM_UP:
                return function(*args, **kwargs)
            if len(self.recorded) >= KINDS:
                return self._give_up(f"it was called in more than {KINDS} ways", function, args, kwargs)
        try:
            if recording is None:
                recording = self.recorded[call] = make(function, device, leaves, structure)
            with keep_transformed(self.transformed):  # one for all kinds of calls
                return recording(tensors)
        except RuntimeError as error:  # a wait for the device, a copy from the host, a number that is read
            if recording is not None and recording.sure:
                raise
            self.recorded.pop(call, None)
            return self._give_up(str(error), function, args, kwargs)

    def _give_up(self, why: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.given_up = True
        warnings.warn(f"{self.what} goes on without further recordings: {why}; {self.remedy}", stacklevel=5)
        return function(*args, **kwargs)


class _Graph:
    """One call as a CUDA graph, on tensors that stay where they are."""

    WARM_UP = _graph.WARM_UP
    sure = True

    def __init__(
        self, function: Callable[..., Any], device: torch.device, leaves: list[Any], structure: pytree.TreeSpec
    ) -> None:
        here = [x.to(device, copy=True) if isinstance(x, Tensor) else x for x in leaves]
        args, kwargs = pytree.tree_unflatten(here, structure)
        self.inputs = [x for x in here if isinstance(x, Tensor)]
        self.output: Any = None

        def call() -> None:
            self.output = function(*args, **kwargs)

        self.replay = _graph.record(call)

    def __call__(self, tensors: list[Tensor]) -> Any:
        """The result, in tensors of its own."""
        for held, given in zip(self.inputs, tensors, strict=True):
            held.copy_(given, non_blocking=True)
        self.replay()
        return pytree.tree_map_only(Tensor, Tensor.clone, self.output)


class _List:
    """One call as a list of operators: written down at its first use, at its second held against the function."""

    WARM_UP = 1

    def __init__(
        self, function: Callable[..., Any], device: torch.device, leaves: list[Any], structure: pytree.TreeSpec
    ) -> None:
        others = [None if isinstance(x, Tensor) else x for x in leaves]
        places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]

        def call(*tensors: Tensor) -> Any:
            given = list(others)
            for i, x in zip(places, tensors, strict=True):
                given[i] = x
            args, kwargs = pytree.tree_unflatten(given, structure)
            return function(*args, **kwargs)

        self.function = call
        self.replay: Callable[..., Any] | None = None
        self.sure = False

    def __call__(self, tensors: list[Tensor]) -> Any:
        """The result."""
        if self.replay is None:
            result, self.replay = _tape.record(self.function, tensors)
            return result
        result = self.replay(*tensors)
        if not self.sure:
            expected = self.function(*tensors)
            if not all(map(_same, pytree.tree_leaves(result), pytree.tree_leaves(expected))):
                raise RuntimeError("repeating its operators gives something else")
            self.sure = True
        return result


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num()) if isinstance(a, Tensor) else bool(a == b)
