"""How much each timestep counts: weights of the loss, and ways to draw t. Tables are float64 [T] on the CPU.

Index t = 0..T-1 is the least to the most noisy step; a weight multiplies the mean squared error of the prediction.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .ops import philox
from .prediction import x0_coefficients
from .schedule import Schedule

UNIFORM_SHARE = 1e-3
"""How much of a uniform distribution `LossSecondMoment` mixes in, so that no t is forgotten."""


def simple_weight(schedule: Schedule) -> Tensor:
    """One for every t: the unweighted loss (Ho et al. 2020, eq. 14)."""
    return torch.ones_like(schedule.betas)


def vlb_weight(prediction: str, schedule: Schedule) -> Tensor:
    """The weight that turns the squared error into the term L_{t-1} of the bound, in nats, for variance sigma_q^2.

    KL(q || p) = (mu_theta - mu_q)^2 / (2 sigma_q^2) (Ho et al. 2020, eq. 8), and mu_theta - mu_q = m (prediction -
    target), so w = m^2 / (2 sigma_q^2). At index 0 sigma_q is 0 and the bound has the decoder: w is that of index 1.

    Args:
        prediction: "eps", "x0", "v" or "mu".
        schedule: T >= 2.

    Returns: float64 [T].

    Raises:
        ValueError: T = 1; see `fastddpm.prediction.check_prediction`.
    """
    slope = _mean_slope(prediction, schedule)
    if schedule.num_timesteps < 2:
        raise ValueError("vlb_weight: expected a schedule of at least 2 steps, got 1; its bound is the decoder alone")
    weight = slope[1:].square() / (2 * schedule.posterior_variance[1:])
    return torch.cat([weight[:1], weight])


def min_snr_weight(prediction: str, schedule: Schedule, gamma: float = 5.0) -> Tensor:
    """min(s, gamma) as weight of the error of x_0, with s = abar / (1 - abar) (Hang et al. 2023, section 3.4).

    The same loss on each kind: eps min(s, gamma) / s, x0 min(s, gamma), v min(s, gamma) / (s + 1).

    Args:
        prediction: "eps", "x0" or "v".
        schedule: where s comes from; s = 0 gives 0.
        gamma: > 0.

    Returns: float64 [T].

    Raises:
        ValueError: gamma out of range; "mu", or see `fastddpm.prediction.check_prediction`.
    """
    if not gamma > 0:
        raise ValueError(f"min_snr_weight: expected gamma > 0, got {gamma}; 5 is usual")
    if prediction == "mu":
        raise ValueError("min_snr_weight: expected prediction 'eps', 'x0' or 'v', got 'mu'; choose one of these")
    snr = schedule.snr
    # the error of x_0 is b times that of the prediction: b^2 is 1/s, 1 and 1/(s + 1)
    return snr.clamp(max=gamma) * x0_coefficients(prediction, schedule)[:, 1].square()


def p2_weight(schedule: Schedule, gamma: float = 1.0) -> Tensor:
    """(1 + s)^-gamma with s = abar / (1 - abar), meant for the error of eps (Choi et al. 2022, eq. 8, with k = 1).

    Args:
        schedule: where s comes from.
        gamma: >= 0; 0 leaves all weights at 1.

    Returns: float64 [T].

    Raises:
        ValueError: gamma out of range.
    """
    if not gamma >= 0:
        raise ValueError(f"p2_weight: expected gamma >= 0, got {gamma}; 1 is usual")
    return schedule.one_minus_alphas_cumprod**gamma  # 1 + s = 1 / (1 - abar)


def hybrid_vlb_weight(num_timesteps: int) -> float:
    """T / 1000: the weight of the bound's t-th term, in bits per dimension, beside the simple loss.

    It is 0.001 L_vlb with L_vlb the sum over all T terms (Nichol and Dhariwal 2021, eq. 16).
    """
    return num_timesteps / 1000


def vlb_table(prediction: str, schedule: Schedule, variance: str) -> Tensor:
    """What `fastddpm.ops.diffusion_loss` needs for the bound's term of a learned variance: float64 [T, 4].

    Args:
        prediction: "eps", "x0", "v" or "mu".
        schedule: where the tables come from.
        variance: "learned_range", or "learned" (the network's output is the log-variance itself).

    Returns: columns
        m with mu_theta - mu_q = m (prediction - target); at index 0 that is mu_theta - x_0;
        the log-variance at v = -1 and at v = 1: ln sigma_q^2 and ln beta, or -1 and 1;
        the log-variance of q, clipped.

    Raises:
        ValueError: another variance; see `fastddpm.prediction.check_prediction`.
    """
    if variance not in ("learned", "learned_range"):
        raise ValueError(f"vlb_table: expected variance 'learned' or 'learned_range', got {variance!r}; choose one")
    log_variance_q = schedule.posterior_log_variance_clipped
    if variance == "learned_range":
        bounds = log_variance_q, torch.log(schedule.betas)
    else:
        bounds = -torch.ones_like(log_variance_q), torch.ones_like(log_variance_q)
    return torch.stack([_mean_slope(prediction, schedule), *bounds, log_variance_q], dim=1)


def uniform_timesteps(num_timesteps: int, *, seed: Tensor | int, sample: Tensor, step: Tensor | int) -> Tensor:
    """Independent t, uniform on 0..T-1. Returns int64 [B].

    Args:
        num_timesteps: T >= 1.
        seed, sample, step: where it is drawn: int or int64 [] / int64 [B] / int or int64 [], see `fastddpm.ops.philox`.
    """
    return _floor(_uniform(seed, sample, step), num_timesteps)


def stratified_timesteps(num_timesteps: int, *, seed: Tensor | int, sample: Tensor, step: Tensor | int) -> Tensor:
    """One t from each of B equal parts of 0..T-1: floor(T ((u + k/B) mod 1)) (low discrepancy, Kingma et al. 2021).

    Each t alone is uniform; together they spread evenly, so the loss of a batch varies less. The one u is that of the
    batch's first sample. Arguments are those of `uniform_timesteps`. Returns int64 [B].
    """
    u = _uniform(seed, sample[:1], step)
    k = torch.arange(len(sample), dtype=u.dtype, device=u.device)
    return _floor((u + k / max(len(sample), 1)) % 1, num_timesteps)


class LossSecondMoment(nn.Module):
    """Importance sampling of t by the size of its loss: p_t ~ sqrt(E[L_t^2]) (Nichol and Dhariwal 2021, eq. 18).

    E[L_t^2] is the mean over the last ``history`` losses at t; until every t has that many, t is uniform. A thousandth
    of a uniform distribution is mixed in. The state is two buffers on the device, so `state_dict` makes an exact
    resume, and no method stops the device.

    Args:
        num_timesteps: T >= 1.
        history: number of losses kept for each t, >= 1.

    Raises:
        ValueError: a number out of its range.

    Numerics: probabilities are multiples of 2^-40, nearly, summed as integers: exact in any order, on any device.
    """

    losses: Tensor
    counts: Tensor

    def __init__(self, num_timesteps: int, history: int = 10) -> None:
        super().__init__()
        if num_timesteps < 1:
            raise ValueError(f"LossSecondMoment: expected num_timesteps >= 1, got {num_timesteps}; 1000 is usual")
        if history < 1:
            raise ValueError(f"LossSecondMoment: expected history >= 1, got {history}; 10 is usual")
        self.register_buffer("losses", torch.zeros(num_timesteps, history, dtype=torch.float32))
        self.register_buffer("counts", torch.zeros(num_timesteps, dtype=torch.int64))

    def probabilities(self) -> Tensor:
        """p_t, float64 [T], on the device."""
        parts = self._parts().double()
        return parts / parts.sum()

    def sample(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Draw t by inverting the distribution function.

        Args:
            u: [B], uniform in [0, 1], float32 or float64.

        Returns: t int64 [B], and 1 / (T p_t) float32 [B]: the mean of correction x loss is that of the uniform t.
        """
        parts = self._parts()
        ends = torch.cumsum(parts, 0)
        place = torch.minimum((u.double() * ends[-1]).long(), ends[-1] - 1)
        t = torch.searchsorted(ends, place, right=True)
        return t, (ends[-1].double() / (len(parts) * parts[t]).double()).float()

    @torch.no_grad()
    def update(self, t: Tensor, losses: Tensor) -> None:
        """Keep the losses of a batch, in its order, each in place of the oldest of its t.

        Args:
            t: int64 [B], values in [0, T); the same t may come more than once.
            losses: [B], unweighted by the correction of `sample`. One that is not finite counts as 0.
        """
        num_timesteps, history = self.losses.shape
        t, order = torch.sort(t, stable=True)
        values = losses.to(self.losses.dtype)[order]
        values = torch.where(values.isfinite(), values, 0.0)
        starts = torch.searchsorted(t, torch.arange(num_timesteps + 1, device=t.device))
        repeats = starts.diff()
        place = torch.arange(len(t), device=t.device)
        rank = place - starts[t]
        # where a batch holds more of one t than are kept, those that share a slot all write the last one's value
        last = place + (repeats[t] - 1 - rank) // history * history
        slot = (self.counts[t] + rank) % history
        self.losses.view(-1).scatter_(0, t * history + slot, values[last])
        self.counts.add_(repeats)

    def _parts(self) -> Tensor:
        """p_t 2^40 rounded to integers, at least 1: int64 [T]."""
        num_timesteps, history = self.losses.shape
        moment = self.losses.double().square().mean(1).sqrt()
        total = moment.sum()
        ready = (self.counts >= history).all() & (total > 0)
        p = torch.where(ready, moment / total * (1 - UNIFORM_SHARE) + UNIFORM_SHARE / num_timesteps, 1 / num_timesteps)
        return (p * 2.0**40).round().long().clamp(min=1)


def _mean_slope(prediction: str, schedule: Schedule) -> Tensor:
    """m with mu_theta - mu_q = m (prediction - target): mu = coef1 x_0 + coef2 x_t and x_0 = a x_t + b prediction."""
    return schedule.posterior_mean_coef1 * x0_coefficients(prediction, schedule)[:, 1]


def _uniform(seed: Tensor | int, sample: Tensor, step: Tensor | int) -> Tensor:
    return philox.uniform(1, seed=seed, sample=sample, step=step, stream=philox.T, dtype=torch.float64).squeeze(1)


def _floor(u: Tensor, num_timesteps: int) -> Tensor:
    """floor(T u) for u in [0, 1): int64."""
    return (u * num_timesteps).long()
