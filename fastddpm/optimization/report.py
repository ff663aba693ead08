"""What `optimize` did to a network, as plain data and as text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

SHOWN = 3
"""Names that a line gives."""


@dataclass(frozen=True)
class Replaced:
    """A module with another forward: its qualified name in the network, and what stands in place of what."""

    name: str
    pattern: str


@dataclass(frozen=True)
class Kept:
    """A module that was left as it is: its qualified name, its class, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What `optimize` did.

    Attributes:
        replaced: the modules with another forward.
        kept: norms and blocks that were left as they are, and why.
        memory_format: of the weights of the convolutions, in words.
        compiled: whether torch.compile is on.
        captured: whether calls are recorded as CUDA graphs, where there is a GPU.
        frozen: whether they are recorded on a CPU, too, with what depends on the weights alone.
    """

    replaced: tuple[Replaced, ...]
    kept: tuple[Kept, ...]
    memory_format: str
    compiled: bool
    captured: bool
    frozen: bool

    def __str__(self) -> str:
        lines = [f"replaced: {len(self.replaced)}"]
        lines += _grouped([(module.pattern, module.name) for module in self.replaced])
        lines.append(f"left as they are: {len(self.kept)}")
        lines += _grouped([(f"{module.kind}: {module.reason}", module.name) for module in self.kept])
        lines.append(f"memory format: {self.memory_format}")
        switches = {"torch.compile": self.compiled, "CUDA graph": self.captured, "frozen": self.frozen}
        lines.append("; ".join(f"{name}: {'on' if on else 'off'}" for name, on in switches.items()))
        return "\n".join(lines)


def _grouped(rows: list[tuple[str, str]]) -> list[str]:
    """A line for each text: how many names it has, and the first of them."""
    lines = []
    for text, count in Counter(text for text, _ in rows).items():
        names = [name or "(the network)" for other, name in rows if other == text]
        more = f", and {count - SHOWN} more" if count > SHOWN else ""
        lines.append(f"  {count:4d} x {text}")
        lines.append(f"         {', '.join(names[:SHOWN])}{more}")
    return lines
