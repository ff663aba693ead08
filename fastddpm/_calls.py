"""Calls that are the same but for the numbers in their tensors: recorded once for each kind, then repeated.

On a GPU a recording is a CUDA graph (`_graph`), on a CPU the list of operators (`_tape`).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import _dispatch, _graph, _tape
from .ops.kept import Transformed, keep_transformed

KINDS = 8
"""Kinds of calls of one function that are recorded: on a GPU each keeps its activations."""
LOOPS = 4
"""Kinds of loops over one network whose recordings are kept, those of the last ones: each keeps its activations."""


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
        call = (*modes(device), str(structure), tuple(map(_kind, leaves)))
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


class Loops:
    """The recordings of the loops over one network, each with the tensors it works on, for the next of its kind.

    A loop takes what is kept, and gives it back when it is done: two at a time, one within the other or in another
    thread, share nothing.
    """

    def __init__(self) -> None:
        self.forget(None)

    def forget(self, state: Hashable) -> None:
        """Drop all that was kept, and keep from now on what depends on this state."""
        self.state = state
        self.kept: dict[Hashable, Loop] = {}

    def take(self, given: dict[str, Any], device: torch.device) -> Loop:
        """A loop that starts with these values, by their names: tensors may have other numbers in another loop of its
        kind, all else is the same."""
        kind = (*modes(device), *((name, _kind(value)) for name, value in given.items()))
        loop = self.kept.pop(kind, None)
        if loop is None:
            held = {name: x.clone() if isinstance(x, Tensor) else x for name, x in given.items()}
            return Loop(SimpleNamespace(**held), _graph.Replayed(device, "sampling"), (self.state, kind))
        for name, value in given.items():
            if isinstance(value, Tensor):
                getattr(loop.at, name).copy_(value)
        return loop

    def run(self, loop: Loop, step: Callable[[], None]) -> None:
        """Do a step; where memory does not suffice, what other loops keep is given up for it."""
        try:
            loop.run(step)
        except torch.OutOfMemoryError:
            if not self.kept:
                raise
            self.kept.clear()
            loop.run(step)

    def give_back(self, loop: Loop) -> None:
        """Keep it for the next of its kind, and the last ones of other kinds."""
        state, kind = loop.kind
        if state == self.state:
            self.kept[kind] = loop
            while len(self.kept) > LOOPS:
                self.kept.pop(next(iter(self.kept)), None)


class Loop:
    """Steps on tensors that stay where they are.

    Attributes:
        at: the tensors, and other values, by name. run: does a step, see `Replayed`. kind: where it is kept.
    """

    def __init__(
        self, at: SimpleNamespace, run: _graph.Replayed, kind: tuple[Hashable, Hashable] = (None, None)
    ) -> None:
        self.at, self.run, self.kind = at, run, kind


_loops: WeakKeyDictionary[nn.Module, Loops] = WeakKeyDictionary()


def loops_of(network: nn.Module) -> Loops:
    """What is kept of the loops over a network, as long as its weights lie where they lie and nothing is hung on it.

    What is in the weights may change: a recording reads it anew. It is dropped with the network, and by `forget`.
    """
    state = _state_of(list(network.modules()))
    found = _loops.setdefault(network, Loops())
    if found.state != state:
        found.forget(state)
    return found


def _state_of(modules: list[nn.Module]) -> tuple[Hashable, ...]:
    """Where their weights lie, and what is hung on them."""
    weights = tuple((x.data_ptr(), *_kind(x)) for x in _tensors_of(modules))
    hung = tuple((id(m), type(m), *m._forward_hooks, *m._forward_pre_hooks, id(m._compiled_call_impl)) for m in modules)
    return weights, hung


def _tensors_of(modules: list[nn.Module]) -> list[Tensor]:
    """Parameters and buffers, each once. To ask each module takes a third of the time of ``parameters()``."""
    found = (x for m in modules for x in (*m._parameters.values(), *m._buffers.values()) if x is not None)
    return list(dict.fromkeys(found))


def forget(network: nn.Module) -> None:
    """Drop what is kept of the loops over a network, and its memory."""
    _loops.pop(network, None)


class Repeated:
    """Steps of a training on a CPU, the same at each call: done as they are for the first times, then from the list of
    their operators, in place on tensors that stay where they are.

    What is hung on the network, a hook or a compiled part, is not in a list: with it steps are done as they are.

    Args:
        network: what is trained. wanted: False never records.
    """

    WARM_UP = 8
    """To write down a step takes as long as a few of them, and a short training has no use for it."""

    def __init__(self, network: nn.Module, wanted: bool) -> None:
        self.network, self.wanted = network, wanted
        self.state: Hashable = None
        self.calls = 0
        self.replay: Callable[..., Any] | None = None

    def __call__(self, function: Callable[[], None], given: list[Tensor]) -> None:
        """Do it once. The function is not kept.

        Args:
            given: tensors that others write to between the calls; those of the network are not meant.
        """
        modules = list(self.network.modules())
        if not self.wanted or _has_hooks(modules):
            return function()
        tensors = [*given, *_tensors_of(modules)]
        training = tuple(x.requires_grad for x in tensors), tuple(m.training for m in modules)
        state = modes(torch.device("cpu")), _state_of(modules), training, tuple(map(_kind, given))
        if state != self.state:
            self.state, self.calls, self.replay = state, 0, None
        if self.replay is not None:
            with torch.no_grad():  # what backward does is in the list
                self.replay(*tensors)
        elif self.calls < self.WARM_UP:
            function()
        else:
            try:
                _, self.replay = _tape.record(lambda *_: function(), tensors)
            except _tape.CannotRepeatError as error:
                self.wanted = False
                warnings.warn(
                    f"training goes on without a list of its operators: {error}; turn cuda_graph off to leave out the "
                    "attempt",
                    stacklevel=2,
                )
        self.calls += 1


def _has_hooks(modules: list[nn.Module]) -> bool:
    """Whether something is called, beside the modules, or in their place."""
    if torch.nn.modules.module._has_any_global_hook():
        return True
    on_weights = (p._backward_hooks or p._post_accumulate_grad_hooks for p in _tensors_of(modules))
    on_modules = (
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        or m._compiled_call_impl is not None for m in modules
    )  # fmt: skip
    return any(on_weights) or any(on_modules)


def modes(device: torch.device) -> tuple[Hashable, ...]:
    """What decides, beside its arguments, how a call is computed."""
    found: tuple[Hashable, ...] = (
        _dispatch._forced,
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
    )
    if device.type != "cuda":  # operators in a list ask for the rest themselves
        return found
    cudnn = torch.backends.cudnn
    precisions = torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return (*found, *precisions, cudnn.enabled, cudnn.benchmark, torch.are_deterministic_algorithms_enabled())


def _kind(x: Any) -> tuple[Any, ...]:
    return (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else (type(x), x)


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

        self.replay = _graph.record(call, device)

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
