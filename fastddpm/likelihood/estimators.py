"""Three ways to estimate the part of the bound that depends on the network, and how much each varies from draw to draw.

All values are losses, in nats per dimension, and at t = 0 (t = 1 of the papers) every one has the decoder's
-log p_theta(x_0 | x_1).

    trajectory  x_1, ..., x_T drawn as a chain, T network calls  -sum_t log p(x_{t-1} | x_t)
    pair        t ~ p_t, x_{t-1} given x_0, x_t given x_{t-1}    -log p(x_{t-1} | x_t) / p_t
    single      t ~ p_t, x_t given x_0                           KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) / p_t

with p = p_theta; uniform t has 1 / p_t = T. With log q = log q(x_{t-1} | x_t, x_0) added, the mean of the first two is
the sum of the KL terms,

    single = E[pair + log q / p_t given t, x_t],  so  Var(single) <= Var(pair + log q / p_t),

and without it their mean is larger by `posterior_entropy`, which the network does not change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..diffusion import (
    GaussianDiffusion,
    discretized_gaussian_log_likelihood,
    p_mean_variance,
    q_posterior,
    q_sample,
)
from ..ops import philox
from ..ops.normal import normal
from ..schedule import Schedule, extract
from .bound import vlb_term


class Estimate(NamedTuple):
    """One draw of an estimator for each sample.

    Attributes:
        value: the estimate, nats per dimension [B].
        log_q: what to add so that its mean is the bound's sum of KL terms: the log q(x_{t-1} | x_t, x_0) that belong to
            the value, weighted as it is, nats per dimension [B]; 0 for the single-sample estimator.
        t: int64 [B], the step it looked at; None for a whole trajectory.
    """

    value: Tensor
    log_q: Tensor
    t: Tensor | None


def trajectory_estimate(
    diffusion: GaussianDiffusion,
    x0: Tensor,
    labels: Tensor | None = None,
    *,
    seed: Tensor | int,
    sample: Tensor | None = None,
    step: int = 0,
) -> Estimate:
    """-sum_t log p_theta(x_{t-1} | x_t) along one draw of the chain x_1, ..., x_T (Ho et al. 2020, eq. 3, without L_T).

    Unit variance: 1/2 sum_{t>1} ||x_{t-1} - mu_theta(x_t, t)||^2 and a constant, plus the decoder.

    Args:
        diffusion: the network with its schedule.
        x0: [B, C, H, W] in [-1, 1], on the grid of ``config.levels`` values.
        labels: int64 [B], for a network with classes.
        seed, sample, step: where all is drawn: int or int64 [] / int64 [B], None counts from 0 / number of the draw.

    Returns: `Estimate`, from T network calls a sample.

    Numerics: in the dtype of x0, float32 or float64; deterministic.
    """
    schedule = diffusion.schedule
    sample = _sample(x0, sample)
    value = torch.zeros(len(x0), dtype=x0.dtype, device=x0.device)
    log_q = torch.zeros_like(value)
    x_prev = x0
    for i in range(diffusion.num_timesteps):
        t = torch.full_like(sample, i)
        draw = step * diffusion.num_timesteps + i
        z = normal(tuple(x0.shape), seed=seed, sample=sample, step=draw, stream=philox.TRAINING_NOISE, dtype=x0.dtype)
        x_t = _one_step(x_prev, t, z, schedule)
        value -= _log_p(diffusion, x0, x_prev, x_t, t, labels)
        log_q += _log_q(x0, x_prev, x_t, t, schedule)
        x_prev = x_t
    return Estimate(value, log_q, None)


def pair_estimate(
    diffusion: GaussianDiffusion,
    x0: Tensor,
    labels: Tensor | None = None,
    *,
    probabilities: Tensor | None = None,
    t: Tensor | None = None,
    seed: Tensor | int,
    sample: Tensor | None = None,
    step: int = 0,
) -> Estimate:
    """-log p_theta(x_{t-1} | x_t) / p_t at one t, with x_{t-1} drawn from q(. | x_0) and x_t from q(. | x_{t-1}).

    Unit variance and uniform t: T/2 ||x_{t-1} - mu_theta(x_t, t)||^2 and a constant; the target is the drawn x_{t-1}.

    Args:
        probabilities: p_t > 0 [T]; None is uniform, 1/T.
        t: int64 [B] in [0, T); None draws it from ``probabilities``. The others are those of `trajectory_estimate`.

    Returns: `Estimate`, from one network call a sample.

    Raises:
        ValueError: probabilities of another shape, not positive, or with another sum than 1.

    Numerics: in the dtype of x0, float32 or float64; deterministic.
    """
    schedule = diffusion.schedule
    sample = _sample(x0, sample)
    t, weight = _step(diffusion, x0, probabilities, t, seed, sample, step, "pair_estimate")
    noise, z = (
        normal(tuple(x0.shape), seed=seed, sample=sample, step=step, stream=stream, dtype=x0.dtype)
        for stream in (philox.TRAINING_NOISE, philox.SAMPLER_NOISE)
    )
    x_prev = torch.where(_first(t), x0, q_sample(x0, (t - 1).clamp(min=0), noise, schedule))
    x_t = _one_step(x_prev, t, z, schedule)
    value = -weight * _log_p(diffusion, x0, x_prev, x_t, t, labels)
    return Estimate(value, weight * _log_q(x0, x_prev, x_t, t, schedule), t)


def single_estimate(
    diffusion: GaussianDiffusion,
    x0: Tensor,
    labels: Tensor | None = None,
    *,
    probabilities: Tensor | None = None,
    t: Tensor | None = None,
    seed: Tensor | int,
    sample: Tensor | None = None,
    step: int = 0,
) -> Estimate:
    """KL(q(x_{t-1} | x_t, x_0) || p_theta(x_{t-1} | x_t)) / p_t at one t, with x_t drawn from q(. | x_0) (eq. 5).

    Args, errors and numerics are those of `pair_estimate`. Returns: `Estimate`, from one network call a sample.
    """
    sample = _sample(x0, sample)
    t, weight = _step(diffusion, x0, probabilities, t, seed, sample, step, "single_estimate")
    noise = normal(tuple(x0.shape), seed=seed, sample=sample, step=step, stream=philox.TRAINING_NOISE, dtype=x0.dtype)
    value = weight * vlb_term(diffusion, x0, t, noise, labels)
    return Estimate(value, torch.zeros_like(value), t)


def posterior_entropy(schedule: Schedule) -> float:
    """sum_{t>1} H(q(x_{t-1} | x_t, x_0)) = sum_{t>1} ln(2 pi e sigma_q^2) / 2, nats per dimension."""
    return float((0.5 * torch.log(2 * math.pi * math.e * schedule.posterior_variance[1:])).sum())


@dataclass(frozen=True)
class EstimatorVariance:
    """How much one estimator varies between draws, for a given image; averages over the images.

    Attributes:
        name: of the estimator; "+ log q" where `Estimate.log_q` is added.
        timesteps: how t is chosen: "all", "uniform" or "importance".
        mean: nats per dimension, and ``standard_error`` of it.
        variance: between the draws of one image, (nats per dimension)^2.
        network_calls: evaluations of the network for one draw.
    """

    name: str
    timesteps: str
    mean: float
    standard_error: float
    variance: float
    network_calls: int

    @property
    def variance_per_network_call(self) -> float:
        """Variance of the mean of as many draws as one network call pays for: variance times calls per draw."""
        return self.variance * self.network_calls


def estimator_variances(
    diffusion: GaussianDiffusion,
    x0: Tensor,
    draws: int,
    labels: Tensor | None = None,
    *,
    probabilities: Tensor | None = None,
    seed: int = 0,
) -> list[EstimatorVariance]:
    """Draw every estimator many times for the same images, with t uniform and by importance; see `variance_table`.

    Args:
        diffusion: the network, in evaluation mode while this runs.
        x0: [B, C, H, W] in [-1, 1], one batch, on the network's device.
        draws: of each estimator for each image, >= 2. A draw costs T + 4 network calls an image.
        labels: int64 [B], for a network with classes.
        probabilities: of the importance-sampled t, [T]; None makes them from T further calls an image, see
            `importance_probabilities`.
        seed: of all draws.

    Returns: a row for each estimator.

    Raises:
        ValueError: draws < 2; see `pair_estimate`.

    Numerics: estimators in the dtype of x0, their moments in float64; deterministic.
    """
    if draws < 2:
        raise ValueError(f"estimator_variances: expected draws >= 2, got {draws}; a variance needs two")
    values: dict[tuple[str, str], list[Tensor]] = {}

    def keep(name: str, timesteps: str, value: Tensor) -> None:
        values.setdefault((name, timesteps), []).append(value.double())

    with diffusion.evaluating():
        if probabilities is None:
            probabilities = importance_probabilities(diffusion, x0, labels, seed=seed)
        for step in range(draws):
            whole = trajectory_estimate(diffusion, x0, labels, seed=seed, step=step)
            keep("trajectory", "all", whole.value)
            keep("trajectory + log q", "all", whole.value + whole.log_q)
            for timesteps, p in (("uniform", None), ("importance", probabilities)):
                pair = pair_estimate(diffusion, x0, labels, probabilities=p, seed=seed, step=step)
                keep("pair", timesteps, pair.value)
                keep("pair + log q", timesteps, pair.value + pair.log_q)
                single = single_estimate(diffusion, x0, labels, probabilities=p, seed=seed, step=step)
                keep("single", timesteps, single.value)
        rows = []
        for (name, timesteps), drawn in values.items():
            table = torch.stack(drawn)
            variance = float(table.var(0).mean())
            calls = diffusion.num_timesteps if timesteps == "all" else 1
            error = math.sqrt(variance / table.numel())
            rows.append(EstimatorVariance(name, timesteps, float(table.mean()), error, variance, calls))
    return rows


def importance_probabilities(
    diffusion: GaussianDiffusion, x0: Tensor, labels: Tensor | None = None, *, seed: int = 0
) -> Tensor:
    """p_t ~ sqrt(E[L_t^2]) (Nichol and Dhariwal 2021, eq. 18), from one term of the bound for each image and t.

    Args are those of `estimator_variances`. A thousandth of a uniform distribution is mixed in.

    Returns: float64 [T], on the CPU. The draws behind it are not those of the estimators, which stay unbiased.
    """
    steps = diffusion.num_timesteps
    sample = _sample(x0, None)
    moments = torch.empty(steps, dtype=torch.float64)
    with diffusion.evaluating():
        for i in range(steps):
            noise = normal(tuple(x0.shape), seed=seed, sample=sample, step=i, stream=philox.X_T, dtype=x0.dtype)
            term = vlb_term(diffusion, x0, torch.full_like(sample, i), noise, labels)
            moments[i] = term.double().square().mean().sqrt()
        return 0.999 * moments / moments.sum() + 0.001 / steps


def variance_table(rows: list[EstimatorVariance]) -> str:
    """The rows as a table of text: mean, variance per draw, calls per draw and variance per network call."""
    head = f"{'estimator':<20}{'t':<12}{'mean':>18}{'variance per draw':>20}{'calls':>7}{'variance per call':>20}"
    lines = [
        f"{r.name:<20}{r.timesteps:<12}{f'{r.mean:.4f} +- {r.standard_error:.4f}':>18}"
        f"{r.variance:>20.4g}{r.network_calls:>7}{r.variance_per_network_call:>20.4g}"
        for r in rows
    ]
    return "\n".join([head, *lines, "nats per dimension; variances between draws for one image"])


def _log_p(
    diffusion: GaussianDiffusion, x0: Tensor, x_prev: Tensor, x_t: Tensor, t: Tensor, labels: Tensor | None
) -> Tensor:
    """log p_theta(x_{t-1} | x_t), the decoder where t = 0; nats per dimension [B]."""
    c = diffusion.config
    out = diffusion.predict(x_t, t, labels)
    mean, log_variance, _ = p_mean_variance(out, x_t, t, diffusion.schedule, c.prediction, c.variance, c.clip_denoised)
    decoder = discretized_gaussian_log_likelihood(x0, mean, log_variance, c.levels)
    return torch.where(_first(t), decoder, _normal_log_density(x_prev, mean, log_variance)).flatten(1).mean(1)


def _log_q(x0: Tensor, x_prev: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """log q(x_{t-1} | x_t, x_0), nats per dimension [B]; 0 where t = 0, since the decoder's term has no such part."""
    mean, _, log_variance = q_posterior(x0, x_t, t, schedule)
    return torch.where(_first(t), 0.0, _normal_log_density(x_prev, mean, log_variance)).flatten(1).mean(1)


def _normal_log_density(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    return -0.5 * (math.log(2 * math.pi) + log_variance + (x - mean).square() * torch.exp(-log_variance))


def _one_step(x_prev: Tensor, t: Tensor, z: Tensor, schedule: Schedule) -> Tensor:
    """x_t = sqrt(alpha_t) x_{t-1} + sqrt(beta_t) z: a draw from q(x_t | x_{t-1}) (Ho et al. 2020, eq. 2)."""
    signal, sigma = schedule.alphas.sqrt().to(z.dtype), schedule.betas.sqrt().to(z.dtype)
    return extract(signal, t, z.dim()) * x_prev + extract(sigma, t, z.dim()) * z


def _step(
    diffusion: GaussianDiffusion,
    x0: Tensor,
    probabilities: Tensor | None,
    t: Tensor | None,
    seed: Tensor | int,
    sample: Tensor,
    step: int,
    op: str,
) -> tuple[Tensor, Tensor]:
    """t, drawn by inverting the distribution function unless given, and 1 / p_t in the dtype of x0; each [B]."""
    steps = diffusion.num_timesteps
    if probabilities is None:
        p = torch.full((steps,), 1 / steps, dtype=torch.float64, device=x0.device)
    else:
        p = probabilities.to(x0.device, torch.float64)
        if p.shape != (steps,) or not bool((p > 0).all()) or abs(float(p.sum()) - 1) > 1e-6:
            raise ValueError(
                f"{op}: expected probabilities of shape [{steps}], positive and with sum 1, got {list(p.shape)} with "
                f"sum {float(p.sum())}; divide them by their sum"
            )
    if t is None:
        u = philox.uniform(1, seed=seed, sample=sample, step=step, stream=philox.T, dtype=torch.float64).squeeze(1)
        t = torch.searchsorted(torch.cumsum(p, 0), u, right=True).clamp(max=steps - 1)
    return t, (1 / p[t]).to(x0.dtype)


def _first(t: Tensor) -> Tensor:
    return (t == 0).reshape(-1, 1, 1, 1)


def _sample(x0: Tensor, sample: Tensor | None) -> Tensor:
    return torch.arange(len(x0), device=x0.device) if sample is None else sample
