"""AdamW with gradient clipping and the moving average of the weights, in one op; and the learning rate.

The state is named tensors and device scalars, so a checkpoint is a copy of it, and no step waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .config import TrainConfig
from .scale import LossScale

LEAST_SCALE = 1.0
"""Of the loss: gradients that are too large for float16 even so are those of a training that diverges."""


def learning_rate(images: int, config: TrainConfig) -> float:
    """The learning rate of the step that brings the number of images seen to ``images``.

    Linear from 0 over warmup_images; then constant, or down to final_learning_rate at num_images, with x the share of
    the way done: by a line, or by a half cosine, final + (peak - final) (1 + cos(pi x)) / 2.
    """
    peak, final = config.learning_rate, config.final_learning_rate
    if images < config.warmup_images:
        return peak * images / config.warmup_images
    if config.lr_decay == "constant":
        return peak
    x = min(1.0, (images - config.warmup_images) / (config.num_images - config.warmup_images))
    remaining = 1 - x if config.lr_decay == "linear" else (1 + math.cos(math.pi * x)) / 2
    return final + (peak - final) * remaining


class AdamEMA:
    """The optimiser of a network: `fastddpm.ops.adam_ema` over its parameters that need a gradient.

    Args:
        model: on its device, in its memory format.
        betas, eps, weight_decay, max_grad_norm: see `fastddpm.ops.adam_ema`.
        gradients: dtype in which gradients wait for the update, see `keeping`.
        average: keep the moving average of the weights; without, ``ema`` is empty.
        scaled: gradients are those of the loss times ``scale.scale``; a step whose gradients are not finite is left
            out, and the scale chosen anew.

    Attributes:
        parameters, exp_avg, exp_avg_sq, ema: tensors by name of the parameter.
        scale: a `LossScale`, or None.
        step: int64 [], updates made. learning_rate, ema_decay: float64 [], of the next update.
        found_inf: float32 []; 1 from the first loss or gradient that was not finite: nothing is updated any more. With
            a scale, from the first loss, or gradient at a scale below 1.
        skipped: float32 [], how many updates were not made for that reason.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        gradients: torch.dtype = torch.float32,
        average: bool = True,
        scaled: bool = False,
    ) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError(
                "AdamEMA: expected a model with parameters that need a gradient, got none; check requires_grad"
            )
        self.options: dict[str, Any] = dict(
            betas=betas, eps=eps, weight_decay=weight_decay, max_grad_norm=max_grad_norm
        )
        self.exp_avg = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.parameters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.parameters.items()}
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items() if average}
        self.gradients, self._kept = gradients, dict[str, Tensor]()
        device = next(iter(self.parameters.values())).device
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.learning_rate, self.ema_decay = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(2))
        self.found_inf, self.skipped = (torch.zeros((), device=device) for _ in range(2))
        self.scale = LossScale(device) if scaled else None
        if self.scale is not None:
            self.options["grad_scale"] = self.scale.scale

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Around backward: each gradient is rounded to ``gradients`` as soon as it is whole."""
        if self.gradients == torch.float32:
            yield
            return
        hooks = [p.register_post_accumulate_grad_hook(partial(self._keep, n)) for n, p in self.parameters.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _keep(self, name: str, p: Tensor) -> None:
        assert p.grad is not None
        before = self._kept.get(name)
        self._kept[name] = (p.grad if before is None else p.grad + before).to(self.gradients)
        p.grad = None

    @torch.no_grad()
    def update(self, loss: Tensor) -> Tensor:
        """Update weights, moments and average from the gradients, and drop these; nothing but that if loss or gradients
        are not finite.

        Args:
            loss: [], the one that the gradients are of, before it was scaled.

        Returns: the norm of all gradients before clipping, unscaled, float32 [].
        """
        gradients = []
        for name, p in self.parameters.items():
            gradient = self._kept.pop(name, p.grad)
            gradients.append(torch.zeros_like(p) if gradient is None else gradient)
        scale, broken = self.scale, ~loss.isfinite()
        if scale is not None:
            broken = broken | (scale.scale < LEAST_SCALE)
        self.found_inf.copy_(torch.maximum(self.found_inf, broken.to(self.found_inf.dtype)))
        norm = ops.adam_ema(
            [p.detach() for p in self.parameters.values()],
            gradients,
            list(self.exp_avg.values()),
            list(self.exp_avg_sq.values()),
            step=self.step,
            lr=self.learning_rate,
            ema=list(self.ema.values()) or None,
            ema_decay=self.ema_decay if self.ema else None,
            found_inf=self.found_inf if scale is None else scale.found_inf.copy_(self.found_inf),
            **self.options,
        )
        if scale is not None:
            scale.update()
        self.skipped.add_(self.found_inf)
        for p in self.parameters.values():
            p.grad = None
        return norm

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """All of the state but the weights themselves, in groups for a checkpoint."""
        scale = {} if self.scale is None else {"scale": self.scale.scale, "good_steps": self.scale.good}
        return {
            **({"ema": self.ema} if self.ema else {}),
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
            "optimizer": {"step": self.step, **scale},
        }
