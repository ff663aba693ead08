"""The factor of the loss that keeps small gradients from being 0 in float16 (Micikevicius et al. 2018, section 3.2)."""

from __future__ import annotations

from typing import Any

import torch

FIRST = 65536.0
"""Factor of the first step."""


class LossScale:
    """The factor of the loss in float16: halved where gradients are not finite, doubled after 2,000 good steps.

    Nothing is read from the device. The state is that of torch.amp.GradScaler.

    Attributes:
        scale: float32 []. found_inf: float32 []; 1 where the gradients of the last step were not finite.
        good: int32 [], steps in a row with finite gradients.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), FIRST, device=device)
        self.found_inf = torch.zeros((), device=device)
        self.good = torch.zeros((), dtype=torch.int32, device=device)
        self.growth_factor, self.backoff_factor, self.growth_interval = 2.0, 0.5, 2000

    def update(self) -> None:
        """Choose the scale of the next step by the outcome of the last one."""
        bad = self.found_inf != 0
        good = torch.where(bad, 0, self.good + 1)
        grows = good == self.growth_interval
        larger = self.scale * self.growth_factor
        grown = torch.where(grows & larger.isfinite(), larger, self.scale)
        self.scale.copy_(torch.where(bad, self.scale * self.backoff_factor, grown))
        self.good.copy_(torch.where(grows, 0, good))

    def state_dict(self) -> dict[str, Any]:
        """As torch.amp.GradScaler gives it."""
        return {
            "scale": float(self.scale),
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval,
            "_growth_tracker": int(self.good),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As torch.amp.GradScaler takes it."""
        self.scale.fill_(state["scale"])
        self.good.fill_(state["_growth_tracker"])
        self.growth_factor, self.backoff_factor = state["growth_factor"], state["backoff_factor"]
        self.growth_interval = state["growth_interval"]
