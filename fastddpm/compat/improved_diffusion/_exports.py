"""What is said of a name that the original has and we do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def refuse(module: str, there: Sequence[str]) -> Callable[[str], Any]:
    """A module's ``__getattr__`` that names what is there.

    Args:
        module: its name. there: what it offers.
    """

    def missing(name: str) -> Any:
        if name.startswith("_"):  # Python itself asks for such, and expects this answer
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        raise ImportError(
            f"{module}: expected one of {', '.join(there)}, got {name!r}; the rest of the original is not here"
        )

    return missing
