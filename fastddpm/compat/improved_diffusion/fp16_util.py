"""Empty: half precision is by autocast here, over float32 weights, and needs no functions of its own."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    raise ImportError(
        f"{__name__}: expected UNetModel.convert_to_fp16 or TrainLoop(use_fp16=True), which keep float32 weights by "
        f"themselves, got {name!r}; leave it out"
    )
