"""AdamW with gradient clipping and the moving average of the weights, in one op; and the learning rate.

The state is named tensors and device scalars, so a checkpoint is a copy of it, and no step waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
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


def learning_rate(images: int, config: TrainConfig, warmup: int | None = None) -> float:
    """The learning rate of the step that brings the number of images seen to ``images``.

    Linear from 0 over ``warmup`` images (None: those of the configuration); then constant, or down to
    final_learning_rate at num_images, with x the share of the way done: by a line, or by a half cosine,
    final + (peak - final) (1 + cos(pi x)) / 2.
    """
    peak, final = config.learning_rate, config.final_learning_rate
    warmup = config.warmup if warmup is None else warmup
    if images < warmup:
        return peak * images / warmup
    if config.lr_decay == "constant":
        return peak
    x = min(1.0, (images - warmup) / max(1, config.num_images - warmup))
    remaining = 1 - x if config.lr_decay == "linear" else (1 + math.cos(math.pi * x)) / 2
    return final + (peak - final) * remaining


class AdamEMA:
    """The optimiser of a network: `fastddpm.ops.adam_ema` over its parameters that need a gradient.

    Args:
        model: on its device, in its memory format.
        betas, eps, weight_decay, max_grad_norm: see `fastddpm.ops.adam_ema`.
        gradients: dtype in which gradients wait for the update, see `keeping`.
        mirror: dtype of a copy of the weights, which an update writes in the same pass; None keeps none.
        mirrored: names of the parameters that the model reads from that copy, within `keeping`.
        average: keep the moving average of the weights; without, ``ema`` is empty.
        scaled: gradients are those of the loss times ``scale.scale``; a step whose gradients are not finite is left
            out, and the scale chosen anew.

    Attributes:
        parameters, exp_avg, exp_avg_sq, ema, mirror: tensors by name of the parameter.
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
        mirror: torch.dtype | None = None,
        mirrored: Collection[str] = (),
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
        # of all parameters, as the op wants it: those that are not read from it are few
        self.mirror = {name: p.detach().to(mirror) for name, p in self.parameters.items() if mirror is not None}
        self._read = {name: nn.Parameter(x) for name, x in self.mirror.items() if name in mirrored}
        read = {self.parameters[name]: half for name, half in self._read.items()}
        self._places = [
            (module._parameters, key, p, read[p])
            for module in model.modules()
            for key, p in module._parameters.items()
            if p is not None and p in read
        ]
        self._versions = self._versions_now()  # of the parameters that the mirror is a copy of
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
        """Around forward and backward: the model reads its weights from the mirror, and each gradient is rounded to
        ``gradients`` as soon as it is whole. Those of the mirror come in its dtype, and are summed in ``gradients``."""
        self._drop_gradients()  # of a step whose recording failed midway: nothing has computed them
        taken = self._read if self.gradients == torch.float32 else {**self.parameters, **self._read}
        hooks = [p.register_post_accumulate_grad_hook(partial(self._keep, n)) for n, p in taken.items()]
        try:
            for parameters, key, _, half in self._places:
                parameters[key] = half
            yield
        finally:
            for parameters, key, p, _ in self._places:
                parameters[key] = p
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _keep(self, name: str, p: Tensor) -> None:
        gradient, before = p.grad, self._kept.get(name)
        assert gradient is not None
        if before is not None:
            gradient = before.to(self.gradients).add_(gradient)
        elif gradient.itemsize > self.gradients.itemsize:
            gradient = gradient.to(self.gradients)
        self._kept[name], p.grad = gradient, None

    @torch.no_grad()
    def follow(self, anyway: bool = False) -> None:
        """Copy the weights into the mirror where others than `update` wrote to them; through ``.data`` nobody sees it.

        Args:
            anyway: copy them whether seen or not.
        """
        if anyway or self._versions != self._versions_now():
            for name, x in self.mirror.items():
                x.copy_(self.parameters[name])
            self._versions = self._versions_now()

    def _versions_now(self) -> list[int]:
        return [p._version for p in self.parameters.values()] if self.mirror else []

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
            mirror=list(self.mirror.values()) or None,
            found_inf=self.found_inf if scale is None else scale.found_inf.copy_(self.found_inf),
            **self.options,
        )
        if scale is not None:
            scale.update()
        self.skipped.add_(self.found_inf)
        self._drop_gradients()
        self._versions = self._versions_now()
        return norm

    def _drop_gradients(self) -> None:
        self._kept.clear()
        for p in (*self.parameters.values(), *self._read.values()):
            p.grad = None

    def written(self) -> None:
        """Tell autograd that weights were written, where a recorded `update` did it unseen; the mirror has them."""
        torch.autograd.graph.increment_version(self.parameters.values())
        self._versions = self._versions_now()

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """All of the state but the weights themselves, in groups for a checkpoint."""
        scale = {} if self.scale is None else {"scale": self.scale.scale, "good_steps": self.scale.good}
        return {
            **({"ema": self.ema} if self.ema else {}),
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
            "optimizer": {"step": self.step, **scale},
        }
