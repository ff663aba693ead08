"""The forward of a whole network as one recording, in inference: made once for each kind of call, then repeated."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._calls import Calls
from .fused import Fused

CALLS = "_fastddpm_calls"
"""Where a network keeps its recordings."""
REMEDY = "call restore, then optimize without cuda_graph and frozen, to leave out the attempt"


class Captured(Fused):
    """A network that repeats its forward where nothing needs a gradient and its weights are on a GPU."""

    pattern = "the network: CUDA graph in inference"
    devices: ClassVar[tuple[str, ...]] = ("cuda",)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As it was."""
        weight = next(self.parameters(), None)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or weight is None or not self._records(weight):
            return super().forward(*args, **kwargs)
        calls: Calls = self.__dict__.setdefault(CALLS, Calls("optimize: the network", REMEDY))
        state = self.training, *map(_state_of, itertools.chain(self.parameters(), self.buffers()))
        return calls(super().forward, weight.device, state, args, kwargs)

    def _records(self, weight: Tensor) -> bool:
        device = weight.device.type
        return device in self.devices and not (device == "cuda" and torch.cuda.is_current_stream_capturing())


class Frozen(Captured):
    """A network that does so on a CPU, too: what is computed from its weights alone is kept."""

    pattern = "the network: its operators in inference, and what depends on the weights alone once"
    devices = ("cuda", "cpu")


def _state_of(weight: Tensor) -> tuple[int, int]:
    """Where the weight is and, where a recording holds what was made of it, how often it was changed."""
    counted = weight.device.type == "cpu" and not weight.is_inference()
    return weight.data_ptr(), weight._version if counted else 0
