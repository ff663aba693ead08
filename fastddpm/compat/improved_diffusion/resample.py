"""How training draws its timesteps, uniformly or by the size of their loss: from NumPy's generator, as the original."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from .gaussian_diffusion import GaussianDiffusion

Array = npt.NDArray[np.float64]


def create_named_schedule_sampler(name: str, diffusion: GaussianDiffusion) -> ScheduleSampler:
    """A sampler by name: "uniform" or "loss-second-moment".

    Raises:
        NotImplementedError: another name.
    """
    if name == "uniform":
        return UniformSampler(diffusion)
    if name == "loss-second-moment":
        return LossSecondMomentResampler(diffusion)
    raise NotImplementedError(
        f"create_named_schedule_sampler: expected 'uniform' or 'loss-second-moment', got {name!r}; choose one of these"
    )


class ScheduleSampler(ABC):
    """A distribution over timesteps, with weights that leave the mean of the loss as it is."""

    @abstractmethod
    def weights(self) -> Array:
        """A positive number for each timestep [T], in proportion to its probability."""

    def sample(self, batch_size: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Draw timesteps from NumPy's global generator.

        Returns: t int64 [batch_size] and 1 / (T p_t) float32 [batch_size], on the device.
        """
        w = self.weights()
        p = w / np.sum(w)
        t = np.random.choice(len(p), size=(batch_size,), p=p)  # noqa: NPY002  # whose seed the user set
        correction = 1 / (len(p) * p[t])
        return torch.from_numpy(t).long().to(device), torch.from_numpy(correction).float().to(device)


class UniformSampler(ScheduleSampler):
    """Every timestep is as likely as any other."""

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        self.diffusion = diffusion
        self._weights = np.ones([diffusion.num_timesteps])

    def weights(self) -> Array:
        """All 1."""
        return self._weights


class LossAwareSampler(ScheduleSampler):
    """A sampler that is told the loss of what it drew.

    On a GPU the losses of a batch are copied to the host beside the work that goes on, and taken up when the next
    timesteps are drawn: no step waits for more than the forward pass of the one before.
    """

    _pending: list[tuple[Tensor, Tensor, torch.cuda.Event]] | None = None

    def sample(self, batch_size: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """See `ScheduleSampler.sample`; all losses told before count."""
        self._take_up()
        return super().sample(batch_size, device)

    def update_with_local_losses(self, local_ts: Tensor, local_losses: Tensor) -> None:
        """Tell the losses of this process's part of a batch; in a process group those of all parts are taken up, in the
        order of their rank.

        Args:
            local_ts: int64 [B]. local_losses: [B], any number of processes, any B in each.
        """
        local_losses = local_losses.detach()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            local_ts, local_losses = _gathered(local_ts), _gathered(local_losses)
        if not local_losses.is_cuda:
            self.update_with_all_losses(local_ts.tolist(), local_losses.tolist())
            return
        t, losses = (x.to("cpu", non_blocking=True) for x in (local_ts, local_losses))
        done = torch.cuda.Event()
        done.record()
        self._pending = [*(self._pending or []), (t, losses, done)]

    @abstractmethod
    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        """Take up losses, the same ones in the same order in every process."""

    def _take_up(self) -> None:
        for t, losses, done in self._pending or []:
            done.synchronize()
            self.update_with_all_losses(t.tolist(), losses.tolist())
        self._pending = None


class LossSecondMomentResampler(LossAwareSampler):
    """p_t ~ sqrt(E[L_t^2]) over the last losses at t (Nichol and Dhariwal 2021, eq. 18).

    Uniform until every timestep has ``history_per_term`` losses; a share ``uniform_prob`` is always uniform.

    Args:
        diffusion: whose timesteps. history_per_term: losses kept for each. uniform_prob: in [0, 1].
    """

    def __init__(self, diffusion: GaussianDiffusion, history_per_term: int = 10, uniform_prob: float = 0.001) -> None:
        self.diffusion = diffusion
        self.history_per_term, self.uniform_prob = history_per_term, uniform_prob
        self._loss_history = np.zeros([diffusion.num_timesteps, history_per_term], dtype=np.float64)
        self._loss_counts = np.zeros([diffusion.num_timesteps], dtype=np.int64)

    def weights(self) -> Array:
        """p_t itself [T]; all 1 until there are losses enough."""
        self._take_up()
        if not self._warmed_up():
            return np.ones([self.diffusion.num_timesteps], dtype=np.float64)
        moment = np.sqrt(np.mean(self._loss_history**2, axis=-1))
        p: Array = moment / np.sum(moment) * (1 - self.uniform_prob) + self.uniform_prob / len(moment)
        return p

    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        """Keep losses, each in place of the oldest of its timestep where there are enough."""
        for t, loss in zip(ts, losses, strict=True):
            if self._loss_counts[t] == self.history_per_term:
                self._loss_history[t, :-1] = self._loss_history[t, 1:]
                self._loss_history[t, -1] = loss
            else:
                self._loss_history[t, self._loss_counts[t]] = loss
                self._loss_counts[t] += 1

    def _warmed_up(self) -> bool:
        return bool((self._loss_counts == self.history_per_term).all())


def _gathered(x: Tensor) -> Tensor:
    """[B] of every process, one after the other; lengths may differ."""
    lengths = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(x)], device=x.device))
    counts = [int(length) for length in lengths]
    padded = torch.cat([x, x.new_zeros(max(counts) - len(x))])
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
