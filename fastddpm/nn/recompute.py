"""Parts of a network that keep their inputs alone, and are computed again for their gradients (Chen et al. 2016).

torch.utils.checkpoint does the same, and imports torch.compile for it: 145 MiB, where memory is what is short.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from .. import _native


def recomputed(function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """``function(*inputs)``, of which nothing but the inputs is kept for backward.

    Args:
        function: computes the same, in the same order, whenever it is called.
        inputs: tensors on one device, or None; the first is one.

    Numerics: the bits of ``function(*inputs)`` and of its gradients, as far as the function gives the same bits twice.
    """
    if torch.compiler.is_compiling():
        compiled: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
        return compiled
    kept = _Inputs(function, inputs)
    with saved_tensors_hooks(kept.pack, kept.unpack):
        return function(*inputs)


class _Inputs:
    """In place of the tensors that autograd saves stand their numbers; backward's first question computes them all."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor | None, ...]) -> None:
        assert inputs[0] is not None
        device = inputs[0].device.type
        self.function, self.count, self.saved = function, 0, dict[int, Tensor]()
        self.inputs = [x if x is None else x.detach().requires_grad_(x.requires_grad) for x in inputs]
        # Without its cache: weights that are cast here would be found, without their gradient, by who comes next.
        self.autocast = torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=False
        )

    def pack(self, _: Tensor) -> int:
        """The number of a tensor that is not kept."""
        self.count += 1
        return self.count - 1

    def unpack(self, number: int) -> Tensor:
        """The tensor again."""
        if number not in self.saved:
            self.saved = {}
            _native.free_scratch()  # what the largest convolution of other parts took stands in nobody's way then
            with torch.enable_grad(), self.autocast, saved_tensors_hooks(self._save, lambda _: _):
                self.function(*self.inputs)
        return self.saved.pop(number)

    def _save(self, x: Tensor) -> None:
        self.saved[len(self.saved)] = x.detach()
