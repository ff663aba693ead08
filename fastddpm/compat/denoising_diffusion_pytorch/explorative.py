"""Explorative modelling: several candidates of the noise for each image, and the loss of the best one.

loss = mean_b min_k loss(x_b, t_b, eps_{b,k}),   k = 1..K
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map


class XMWrapper(nn.Module):
    """A diffusion whose loss is that of the best of K draws of the noise for each image, at one time for all K.

    Args:
        flow_model: the diffusion: called as the wrapper is, on K times as many images.
        candidates: K >= 1; 1 calls the diffusion as it is.
        max_batch_size: images in one call of the diffusion, >= 1; None is all B K of them. A diffusion whose forward
            takes no ``loss_reduction`` is called on one image at a time.
        random_time_method: name of the method of the diffusion that draws times, given their number.
        random_time_kwarg: name under which its forward takes them.

    Raises:
        ValueError: candidates or max_batch_size below 1.
    """

    def __init__(
        self,
        flow_model: nn.Module,
        candidates: int = 1,
        max_batch_size: int | None = None,
        random_time_method: str = "random_times",
        random_time_kwarg: str = "times",
    ) -> None:
        super().__init__()
        _check(candidates, max_batch_size)
        self.flow_model = flow_model
        self.candidates = candidates
        self.max_batch_size = max_batch_size
        self.has_loss_reduction = "loss_reduction" in inspect.signature(flow_model.forward).parameters
        self.random_time_method = random_time_method
        self.random_time_kwarg = random_time_kwarg

    @property
    def data_shape(self) -> Any:
        """That of the diffusion, where it has one."""
        return getattr(self.flow_model, "data_shape", None)

    @data_shape.setter
    def data_shape(self, shape: Any) -> None:
        if hasattr(self.flow_model, "data_shape"):
            self.flow_model.data_shape = shape

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        """As the diffusion does."""
        return self.flow_model.sample(*args, **kwargs)  # type: ignore[operator]

    def forward(
        self, *args: Any, candidates: int | None = None, max_batch_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        """The loss of the best candidate, mean over the images.

        Args:
            *args, **kwargs: what the diffusion takes. B is the length of the first tensor among them; every tensor of
                that length is repeated for the K candidates.
            candidates, max_batch_size: in place of those given at construction.

        Returns: a scalar; what the diffusion returns where K = 1.

        Raises:
            ValueError: a number below 1; no tensor among the arguments; a diffusion that cannot draw times.

        Numerics: times are drawn first, then the noise of all candidates by the diffusion.
        """
        candidates = self.candidates if candidates is None else candidates
        max_batch_size = self.max_batch_size if max_batch_size is None else max_batch_size
        _check(candidates, max_batch_size)
        if candidates == 1:
            loss: Tensor = self.flow_model(*args, **kwargs)
            return loss
        batch = _batch_of(args, kwargs)
        shared = self._shared(batch, kwargs)
        repeated = tree_map(lambda v: _repeat(v, batch, candidates), (args, {**kwargs, **shared}))

        total = batch * candidates
        if self.has_loss_reduction:
            size, extra = max_batch_size or total, {"loss_reduction": "none"}
        else:
            size, extra = 1, {}
        losses = []
        for start in range(0, total, size):
            some, named = tree_map(lambda v: _rows(v, total, start, start + size), repeated)  # noqa: B023
            found = self.flow_model(*some, **{**named, **extra})
            losses.append(found.reshape(len(found) if found.dim() else 1, -1))
        per_candidate = torch.cat(losses).mean(dim=1).view(batch, candidates)
        return per_candidate.amin(dim=1).mean()

    def _shared(self, batch: int, given: dict[str, Any]) -> dict[str, Any]:
        """What is drawn once for all candidates of an image, and was not given."""
        draw = getattr(self.flow_model, "xm_shared_random_kwargs", None)
        shared = {} if draw is None else {name: v for name, v in draw(batch).items() if name not in given}
        if self.random_time_kwarg not in given and self.random_time_kwarg not in shared:
            times = getattr(self.flow_model, self.random_time_method, None)
            if times is None:
                raise ValueError(
                    f"XMWrapper: expected flow_model with a method {self.random_time_method!r}, got "
                    f"{type(self.flow_model).__name__}; "
                    f"give its name, or {self.random_time_kwarg} at the call"
                )
            shared[self.random_time_kwarg] = times(batch)
        return shared


def _check(candidates: int, max_batch_size: int | None) -> None:
    for name, value in (("candidates", candidates), ("max_batch_size", max_batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"XMWrapper: expected {name} >= 1, got {value}; 4 candidates are usual")


def _batch_of(args: Any, kwargs: Any) -> int:
    leaves, _ = tree_flatten((args, kwargs))
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return len(leaf)
    raise ValueError("XMWrapper: expected a tensor among the arguments, got none; pass the images")


def _repeat(value: Any, batch: int, candidates: int) -> Any:
    """Each row K times in a row, for a tensor of the batch."""
    of_batch = isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch
    return value.repeat_interleave(candidates, dim=0) if of_batch else value


def _rows(value: Any, total: int, start: int, end: int) -> Any:
    of_batch = isinstance(value, Tensor) and value.dim() > 0 and len(value) == total
    return value[start:end] if of_batch else value
