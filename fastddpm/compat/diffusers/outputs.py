"""What a step returns: a dataclass that is also read by key and by number, as diffusers' users do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor


class Output(dict[str, Any]):
    """Base of the outputs: out.name, out["name"], out[0] and out.to_tuple() are the same fields; those that are None
    are left out of all but the first."""

    __dataclass_fields__: ClassVar[dict[str, Any]]  # its subclasses are dataclasses

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if value is not None:
                super().__setitem__(name, value)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        object.__setattr__(self, key, value)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name in self:
            super().__setitem__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, name) for name in self.__dataclass_fields__)

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in their order."""
        return tuple(self.values())


@dataclass(eq=False)
class SchedulerOutput(Output):
    """The sample at the next timestep visited, [B, ...]."""

    prev_sample: Tensor


@dataclass(eq=False)
class SampleAndPrediction(Output):
    """The sample at the next timestep visited, and the clean sample predicted on the way there, [B, ...] each."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None
