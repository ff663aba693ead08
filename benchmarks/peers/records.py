"""What was found of one contestant, as plain data: a line of a record."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """One contestant at one task.

    Attributes:
        device: "cpu" or "cuda". task: "train", "sample" or "memory" (of a training). network, batch, threads: of what.
        library, setting, dtype: who; ``default`` and ``ema`` are as in `Contestant`, ``own`` is another network.
        seconds: the best step: an optimiser step, or one step of a sampling. None where nothing ran, for ``note``.
        floor: the least of such a step in this dtype, in seconds, measured in the same run.
        memory: bytes at the most, of task "memory". parts: seconds by kind of op, where they were measured.
    """

    device: str
    task: str
    network: str
    batch: int
    threads: int
    library: str
    setting: str
    dtype: str
    default: bool
    ema: bool
    own: bool
    seconds: float | None
    floor: float | None = None
    memory: int | None = None
    parts: dict[str, float] = field(default_factory=dict)
    note: str = ""
