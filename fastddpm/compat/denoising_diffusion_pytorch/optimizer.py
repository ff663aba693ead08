"""torch's Adam in one pass with clipping, loss scaling and the moving average; the scale; the average."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...training.scale import LossScale

Averages = Sequence[tuple[Tensor, Tensor]]  # (average, what it is of)


@dataclass
class _Together:
    """Parameters that are updated in one pass, and their state: the tensors of the optimiser's own state."""

    parameters: list[Tensor]
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]
    step: Tensor  # int64 []; the optimiser's own is out of date meanwhile


class Adam(torch.optim.Adam):
    """torch.optim.Adam, without weight decay, which can also clip, unscale, step and average in one pass.

    The state dict is torch's, whichever way steps were made.

    Args:
        params: as torch's. lr: learning rate. betas: decays of the moments.
    """

    _together: _Together | None = None

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, lr=lr, betas=betas)

    @torch.no_grad()
    def update(
        self,
        max_grad_norm: float | None,
        averages: Averages = (),
        decay: float = 0.0,
        scale: LossScale | None = None,
    ) -> Tensor:
        """Clip the gradients, make a step, average the parameters, and drop the gradients.

        Nothing changes where a gradient is not finite, but for the averages where a scale is given.

        Args:
            max_grad_norm: > 0, or None not to clip.
            averages: of these, x <- decay x + (1 - decay) p.
            scale: by which the loss was multiplied; is told how it went.

        Returns: the norm of all gradients before clipping, [].
        """
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        together = self._join(parameters)
        if together is None:
            norm = self._update_one_by_one(parameters, max_grad_norm, scale)
        else:
            group = self.param_groups[0]
            # where a scale is used, steps are left out now and then, but averages are taken all the same
            of = {id(p): average for average, p in averages} if scale is None and decay > 0 else {}
            fused = bool(of) and all(id(p) in of for p in parameters)
            norm = ops.adam_ema(
                [p.detach() for p in parameters],
                [_laid_out_like(p, p.grad) for p in parameters],
                together.exp_avg,
                together.exp_avg_sq,
                step=together.step,
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                max_grad_norm=max_grad_norm,
                ema=[of[id(p)] for p in parameters] if fused else None,
                ema_decay=decay if fused else None,
                grad_scale=None if scale is None else scale.scale,
                found_inf=None if scale is None else scale.found_inf.zero_(),
            )
            if fused:
                done = {id(p) for p in parameters}
                averages = [(average, p) for average, p in averages if id(p) not in done]
        lerp(averages, decay)
        if scale is not None:
            scale.update()
        self.zero_grad()
        return norm

    def step(self, closure: Any = None) -> Any:
        """As torch's."""
        self._settle()
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        """As torch's."""
        self._settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's."""
        self._together = None
        super().load_state_dict(state_dict)

    def _join(self, parameters: list[Tensor]) -> _Together | None:
        """State of the parameters for one pass; None where they need torch's own loop."""
        together = self._together
        if together is not None and [id(p) for p in together.parameters] == [id(p) for p in parameters]:
            return together
        self._settle()
        group = self.param_groups[0]
        plain = len(self.param_groups) == 1 and not (group["weight_decay"] or group["amsgrad"] or group["maximize"])
        first = parameters[0] if parameters else None
        if first is None or not plain or first.dtype not in (torch.float32, torch.float64):
            return None
        if any((p.dtype, p.device) != (first.dtype, first.device) or not _dense(p) for p in parameters):
            return None
        steps = {float(self.state[p]["step"]) if self.state.get(p) else 0.0 for p in parameters}
        if len(steps) != 1:
            return None
        for p in parameters:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p, requires_grad=False) for _ in range(2))
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = _laid_out_like(p, state[name])
        self._together = _Together(
            parameters,
            [self.state[p]["exp_avg"] for p in parameters],
            [self.state[p]["exp_avg_sq"] for p in parameters],
            torch.tensor(int(steps.pop()), dtype=torch.int64, device=first.device),
        )
        return self._together

    def _settle(self) -> None:
        """Tell the optimiser's own state how many steps were made."""
        if self._together is not None:
            step = float(self._together.step)
            for p in self._together.parameters:
                self.state[p]["step"] = torch.tensor(step)
            self._together = None

    def _update_one_by_one(
        self, parameters: list[Tensor], max_grad_norm: float | None, scale: LossScale | None
    ) -> Tensor:
        """The same by torch's own loop, which waits for the device."""
        self._settle()
        gradients = [p.grad for p in parameters if p.grad is not None]
        if scale is not None:
            torch._foreach_mul_(gradients, 1 / scale.scale)
        norm: Tensor = nn.utils.get_total_norm(gradients)
        if scale is not None:
            scale.found_inf.copy_(~norm.isfinite())
        if bool(norm.isfinite()):
            if max_grad_norm is not None:
                torch._foreach_mul_(gradients, (max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
            super().step()
        return norm


class EMA(nn.Module):
    """A network and the moving average of its parameters and buffers, with the state dict of ema-pytorch's EMA.

    At update s = 0, 1, ... the average is left alone unless s is a multiple of update_every (0 is one); then it is a
    copy up to s = update_after_step, and later x <- d x + (1 - d) p with
    d = min(beta, max(min_value, 1 - (1 + (s - update_after_step) / inv_gamma)^-power)).

    Args:
        model: what is averaged; kept as ``online_model``, its average as ``ema_model``.
        beta: the largest decay, in [0, 1]; at 1 the average stays what it was after the last copy.

    Attributes:
        initted, step: bool [] and int64 [], whether there was an update, and how many.

    Numerics: d in float64. No update waits for the device.
    """

    initted: Tensor
    step: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        beta: float = 0.9999,
        update_after_step: int = 100,
        update_every: int = 10,
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        min_value: float = 0.0,
    ) -> None:
        super().__init__()
        self.beta, self.update_after_step, self.update_every = beta, update_after_step, update_every
        self.inv_gamma, self.power, self.min_value = inv_gamma, power, min_value
        self.online_model = model
        self.ema_model = copy.deepcopy(model).requires_grad_(False)
        self.register_buffer("initted", torch.tensor(False))
        self.register_buffer("step", torch.tensor(0))
        self._updates = 0

    def next_decay(self) -> float | None:
        """The decay of the next update: 0 copies; None leaves the average alone."""
        s = self._updates
        if s % self.update_every:
            return None
        if s <= self.update_after_step:
            return 0.0
        if self.beta == 1:
            return None
        warm: float = 1 - (1 + (s - self.update_after_step) / self.inv_gamma) ** -self.power
        return min(self.beta, max(self.min_value, warm))

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(average, what it is of), for every parameter and buffer of floats."""
        online, average = ([*m.parameters(), *m.buffers()] for m in (self.online_model, self.ema_model))
        return [(a, p) for a, p in zip(average, online, strict=True) if a.is_floating_point() or a.is_complex()]

    def count(self) -> None:
        """Note that the update is made."""
        self._updates += 1
        self.step += 1
        self.initted.fill_(True)

    @torch.no_grad()
    def update(self) -> None:
        """Make the next update."""
        decay = self.next_decay()
        if decay is not None:
            lerp(self.pairs(), decay)
        self.count()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the averaged network."""
        return self.ema_model(*args, **kwargs)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As torch's; of older versions of ema-pytorch too, whose counters were [1]."""
        shaped = {k: v.reshape(()) if k in ("initted", "step") else v for k, v in state_dict.items()}
        result = super().load_state_dict(shaped, strict, assign)
        self._updates = int(self.step)
        return result


@torch.no_grad()
def lerp(averages: Averages, decay: float) -> None:
    """x <- decay x + (1 - decay) p for each pair; a copy at 0."""
    if not averages:
        return
    targets, sources = [x.detach() for x, _ in averages], [p.detach() for _, p in averages]
    if decay == 0:
        torch._foreach_copy_(targets, sources)
    else:
        torch._foreach_lerp_(targets, sources, 1 - decay)


def _dense(p: Tensor) -> bool:
    return p.is_contiguous() or (p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last))


def _laid_out_like(p: Tensor, x: Tensor | None) -> Tensor:
    """The same numbers, in memory as those of ``p``."""
    assert x is not None
    return x if x.stride() == p.stride() else torch.empty_like(p, requires_grad=False).copy_(x)
