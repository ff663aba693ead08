"""The forward of a whole network as a CUDA graph, in inference: recorded once for each kind of call, then replayed."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import _graph
from .fused import Fused

GRAPHS = 8
"""Kinds of calls that are recorded: each keeps its activations."""


class Captured(Fused):
    """A network that replays its forward where nothing needs a gradient and its weights are on a GPU."""

    pattern = "the network: CUDA graph in inference"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As it was."""
        weight = next(self.parameters(), None)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or weight is None or not _records(weight.device):
            return super().forward(*args, **kwargs)
        graphs: Graphs = self.__dict__.setdefault(GRAPHS_OF, Graphs())
        state = self.training, *(p.data_ptr() for p in itertools.chain(self.parameters(), self.buffers()))
        return graphs(super().forward, weight.device, state, args, kwargs)


GRAPHS_OF = "_fastddpm_graphs"
"""Where a network keeps them."""


class Graphs:
    """The recordings of one network; a copy of the network starts without them."""

    def __init__(self) -> None:
        self.calls: Counter[Hashable] = Counter()
        self.recorded: dict[Hashable, _Recording] = {}
        self.given_up = False

    def __reduce__(self) -> Any:
        return Graphs, ()

    def __call__(
        self, forward: Callable[..., Any], device: torch.device, state: Hashable, args: Any, kwargs: Any
    ) -> Any:
        """The result of the call.

        Args:
            forward: what is recorded. device: where it works.
            state: of the network: what is recorded for one holds for no other.
            args, kwargs: tensors may have other values at each call; all else must be the same to be the same call.
        """
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        kinds = [(x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else (type(x), x) for x in leaves]
        call = (state, autocast, str(structure), tuple(kinds))
        try:
            recording = self.recorded.get(call)
        except TypeError:  # an argument that cannot be compared
            return forward(*args, **kwargs)
        if recording is None:
            self.calls[call] += 1
            if self.given_up or self.calls[call] <= _graph.WARM_UP:
                return forward(*args, **kwargs)
            if len(self.recorded) >= GRAPHS:
                return self._give_up(f"it was called in more than {GRAPHS} ways", forward, args, kwargs)
            try:
                recording = self.recorded[call] = _Recording(forward, device, leaves, structure)
            except RuntimeError as error:  # a wait for the device, or a copy from the host
                return self._give_up(str(error), forward, args, kwargs)
        return recording(tensors)

    def _give_up(self, why: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.given_up = True
        warnings.warn(
            f"optimize: the network goes on without further CUDA graphs: {why}; "
            "call restore, then optimize without cuda_graph, to leave out the attempt",
            stacklevel=5,
        )
        return forward(*args, **kwargs)


class _Recording:
    """One call on tensors that stay where they are."""

    def __init__(
        self, forward: Callable[..., Any], device: torch.device, leaves: list[Any], structure: pytree.TreeSpec
    ) -> None:
        here = [x.to(device, copy=True) if isinstance(x, Tensor) else x for x in leaves]
        args, kwargs = pytree.tree_unflatten(here, structure)
        self.inputs = [x for x in here if isinstance(x, Tensor)]
        self.output: Any = None

        def call() -> None:
            self.output = forward(*args, **kwargs)

        self.replay = _graph.record(call)

    def __call__(self, tensors: list[Tensor]) -> Any:
        """The result, in tensors of its own."""
        for held, given in zip(self.inputs, tensors, strict=True):
            held.copy_(given, non_blocking=True)
        self.replay()
        return pytree.tree_map_only(Tensor, Tensor.clone, self.output)


def _records(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
