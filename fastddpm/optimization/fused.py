"""How a module gets another forward and keeps all else: its class is exchanged for one that is made of two.

The new class inherits from a `Fused` one, which has the forward, and from the class that the module had, whose name it
has, too. So names, parameters, hooks, isinstance, repr and the configuration that a library saves stay what they
were, and the way back is to set the class again. A pickle holds the two classes by their names.
"""

from __future__ import annotations

import copyreg
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


class Fused(nn.Module):
    """What has the forward.

    Attributes:
        pattern: what stands in place of what, for the report.
        original: the class that the module had.
    """

    pattern: ClassVar[str]
    original: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As of the class that the module had, with the way to make the class again; deepcopy comes here, too."""
        reduced: Any = super().__reduce_ex__(protocol)
        if reduced[0] is not copyreg.__newobj__ or len(reduced[1]) != 1:  # type: ignore[attr-defined]
            return reduced  # it is pickled in a way of its own
        return _new, (type(self).__bases__[0], self.original), *reduced[2:]


_made: dict[tuple[type[Fused], type[nn.Module]], type[Fused]] = {}


def fused_class(fused: type[Fused], original: type[nn.Module]) -> type[Fused]:
    """The class made of the two, always the same one."""
    if (fused, original) not in _made:
        names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
        _made[fused, original] = type(original.__name__, (fused, original), {**names, "original": original})
    return _made[fused, original]


def _new(fused: type[Fused], original: type[nn.Module]) -> Fused:
    made = fused_class(fused, original)
    module: Fused = made.__new__(made)
    return module


def exchange(module: nn.Module, fused: type[Fused]) -> None:
    """Give the module the forward of ``fused``."""
    module.__class__ = fused_class(fused, type(module))


def give_back(module: nn.Module) -> None:
    """Give the module the class that it had at first."""
    made: type[nn.Module] = type(module)
    while issubclass(made, Fused) and "original" in vars(made):  # else others have made a class of it since
        made = made.original
    if made is not type(module):
        module.__class__ = made


def patterns(module: nn.Module) -> list[str]:
    """The patterns that a module stands for, the last exchange first."""
    made: type[nn.Module] = type(module)
    found: list[str] = []
    while issubclass(made, Fused):
        found.append(made.pattern)
        made = made.original
    return found


def untouched(*modules: nn.Module | None) -> bool:
    """Whether calling each of them does what its class says and no more: no hook, no forward set on the module."""
    return not any(
        m is not None
        and (
            m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
            or "forward" in m.__dict__
        )
        for m in modules
    )  # fmt: skip


def is_plain_conv(module: Any) -> bool:
    """A convolution whose result is F.conv2d(x, weight) + bias, so that the bias may be added elsewhere."""
    return (
        isinstance(module, nn.Conv2d)
        and type(module).forward is nn.Conv2d.forward
        and not hasattr(module, "parametrizations")
        and untouched(module)
    )


def convolve_without_bias(conv: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The convolution, and the bias that is still to be added, if any is."""
    if not is_plain_conv(conv):
        return conv(x), None
    return conv._conv_forward(x, conv.weight, None), conv.bias
