"""The chain of one diffusion: its tables as the buffers of denoising-diffusion-pytorch, and all that follows from them.

Equations are those of Ho et al. 2020; v is that of Salimans and Ho 2022. The tables are made in float64 and kept in
float32 under the names of that package, so that its state dicts load; whatever is computed is computed from them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ... import ops
from ..._allocator import freed_memory_kept
from ..._checks import is_nhwc
from ...ops.kept import keep_transformed
from ...schedule import Schedule, cosine_beta_schedule, extract, linear_beta_schedule

if TYPE_CHECKING:
    from typing_extensions import Self

OBJECTIVES = {"pred_noise": "noise", "pred_x0": "x0", "pred_v": "v"}
"""What the network predicts, and what `fastddpm.q_sample` calls it."""
Step = TypeVar("Step")


NOTHING: Mapping[str, Any] = MappingProxyType({})


class ModelPrediction(NamedTuple):
    """What an output of the network says about the noise and the image."""

    pred_noise: Tensor
    pred_x_start: Tensor


def scaled_linear_betas(timesteps: int) -> Tensor:
    """beta = linspace(1e-4, 0.02) 1000 / T: the linear schedule with ends that keep the last signal as T changes."""
    scale = 1000 / timesteps
    return linear_beta_schedule(timesteps, scale * 1e-4, scale * 0.02)


def cosine_betas(timesteps: int, s: float = 0.008) -> Tensor:
    """Nichol and Dhariwal 2021, eq. 17."""
    return cosine_beta_schedule(timesteps, s)


def sigmoid_betas(timesteps: int, start: float = -3, end: float = 3, tau: float = 1, clamp_min: float = 1e-5) -> Tensor:
    """abar_t = (g(1) - g(t/T)) / (g(1) - g(0)), g(u) = sigmoid((start + (end - start) u) / tau) (Jabri et al. 2022).

    g(1) is rounded to float32, as in the tables to match: that is 1e-4 of the last abar. ``clamp_min`` has no effect.
    """
    u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    left = torch.tensor(end / tau, dtype=torch.float32).sigmoid() - torch.sigmoid((start + (end - start) * u) / tau)
    return (1 - left[1:] / left[:-1]).clamp(0, 0.999)


class Chain(nn.Module):
    """A network, the tables of its chain, and the arithmetic between x_0, x_t, the noise and v.

    Args:
        model: the network.
        betas: float64 [T].
        objective: what the network predicts: "pred_noise", "pred_x0" or "pred_v".
        sampling_timesteps: steps of a sampling, in [1, T]; None is T. Less than T means DDIM.
        ddim_sampling_eta: of DDIM, 0 is deterministic, 1 is as random as ancestral sampling.
        auto_normalize: data are in [0, 1] outside and in [-1, 1] inside.
        snr_limit: largest signal-to-noise ratio in the weight of the loss; None is no limit.

    Raises:
        ValueError: an unknown objective, or sampling_timesteps out of range.
    """

    # of the classes that take it further
    model_predictions: Callable[..., Any]
    p_sample: Callable[..., tuple[Tensor, Tensor]]
    _network: Callable[..., Tensor]
    model: Any
    self_condition: bool

    betas: Tensor
    alphas_cumprod: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor
    loss_weight: Tensor

    def __init__(
        self,
        model: nn.Module,
        betas: Tensor,
        objective: str,
        sampling_timesteps: int | None,
        ddim_sampling_eta: float,
        auto_normalize: bool,
        snr_limit: float | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if objective not in OBJECTIVES:
            raise ValueError(
                f"{name}: expected objective to be one of {', '.join(OBJECTIVES)}, got {objective!r}; choose one"
            )
        total = len(betas)
        steps = total if sampling_timesteps is None else sampling_timesteps
        if not 1 <= steps <= total:
            raise ValueError(f"{name}: expected sampling_timesteps in [1, {total}], got {steps}; 250 of 1000 is usual")
        self.model = model
        self.objective = objective
        self.num_timesteps, self.sampling_timesteps = total, steps
        self.is_ddim_sampling = steps < total
        self.ddim_sampling_eta = ddim_sampling_eta
        self.normalize = _to_signed if auto_normalize else _as_it_is
        self.unnormalize = _to_unit if auto_normalize else _as_it_is

        s = Schedule.from_betas(betas, "tiny")
        abar, noise, snr = s.alphas_cumprod, s.one_minus_alphas_cumprod, s.snr
        limited = snr if snr_limit is None else snr.clamp(max=snr_limit)
        weights = {"pred_noise": limited / snr, "pred_x0": limited, "pred_v": limited / (snr + 1)}
        tables = {
            "betas": s.betas,
            "alphas_cumprod": abar,
            "alphas_cumprod_prev": s.alphas_cumprod_prev,
            "sqrt_alphas_cumprod": abar.sqrt(),
            "sqrt_one_minus_alphas_cumprod": noise.sqrt(),
            "log_one_minus_alphas_cumprod": noise.log(),
            "sqrt_recip_alphas_cumprod": abar.rsqrt(),
            "sqrt_recipm1_alphas_cumprod": (noise / abar).sqrt(),
            "posterior_variance": s.posterior_variance,
            "posterior_log_variance_clipped": s.posterior_log_variance_clipped,
            "posterior_mean_coef1": s.posterior_mean_coef1,
            "posterior_mean_coef2": s.posterior_mean_coef2,
            "loss_weight": weights[objective],
        }
        for key, table in tables.items():
            self.register_buffer(key, table.to(torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As for any module, but tables stay float32 where weights become half precision."""
        tables = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in tables.items():
            after = getattr(self, name)
            if after.dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, before.to(after.device))
        return self

    @property
    def device(self) -> torch.device:
        """Where the tables are."""
        return self.betas.device

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_0 = x_t / sqrt(abar) - sqrt(1 / abar - 1) eps. All [B, ...]; t int64 [B]."""
        return self._at(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t - (
            self._at(self.sqrt_recipm1_alphas_cumprod, t, x_t) * noise
        )

    def predict_noise_from_start(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """eps = (x_t / sqrt(abar) - x_0) / sqrt(1 / abar - 1)."""
        scaled = self._at(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t
        return (scaled - x0) / self._at(self.sqrt_recipm1_alphas_cumprod, t, x_t)

    def predict_v(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """v = sqrt(abar) eps - sqrt(1 - abar) x_0."""
        signal, sigma = self._at(self.sqrt_alphas_cumprod, t, x_start), self._sigma(t, x_start)
        return signal * noise - sigma * x_start

    def predict_start_from_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """x_0 = sqrt(abar) x_t - sqrt(1 - abar) v."""
        return self._at(self.sqrt_alphas_cumprod, t, x_t) * x_t - self._sigma(t, x_t) * v

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean [B, ...], variance and clipped log-variance [B, 1, ...] of q(x_{t-1} | x_t, x_0) (eq. 6-7)."""
        mean = self._at(self.posterior_mean_coef1, t, x_t) * x_start + self._at(self.posterior_mean_coef2, t, x_t) * x_t
        log_variance = self._at(self.posterior_log_variance_clipped, t, x_t)
        return mean, self._at(self.posterior_variance, t, x_t), log_variance

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps (eq. 4).

        Args:
            x_start: [B, ...]. t: int64 [B]. noise: eps; None draws it.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        return self._noised(x_start, t, noise)

    def random_times(self, batch_size: int) -> Tensor:
        """int64 [B], uniform in [0, T), of torch's generator."""
        return torch.randint(0, self.num_timesteps, (batch_size,), device=self.device)

    def _at(self, table: Tensor, t: Tensor, like: Tensor) -> Tensor:
        return extract(table, t, like.dim())

    def _sigma(self, t: Tensor, like: Tensor) -> Tensor:
        return self._at(self.sqrt_one_minus_alphas_cumprod, t, like)

    def _predictions(self, out: Tensor, x: Tensor, t: Tensor, clip: bool, rederive: bool) -> ModelPrediction:
        """From the output of the network; eps follows from x_0, unless it is the output and is not derived again."""
        if self._predicts == "pred_noise":
            x_start = self.predict_start_from_noise(x, t, out)
        elif self._predicts == "pred_x0":
            x_start = out
        else:
            x_start = self.predict_start_from_v(x, t, out)
        if clip:
            x_start = x_start.clamp(-1, 1)
        if self._predicts == "pred_noise" and not (clip and rederive):
            return ModelPrediction(out, x_start)
        return ModelPrediction(self.predict_noise_from_start(x, t, x_start), x_start)

    def _noised(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (x_start.requires_grad or noise.requires_grad):
            return self._at(self.sqrt_alphas_cumprod, t, x_start) * x_start + self._sigma(t, x_start) * noise
        return self._noised_and(x_start, t, noise, "x_t")[0]

    def _noised_and(self, x_start: Tensor, t: Tensor, noise: Tensor, returns: str) -> tuple[Tensor, ...]:
        """x_t, and what else `fastddpm.q_sample` returns on request."""
        table = torch.stack([self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod], dim=1)
        made = ops.q_sample(
            as_image(x_start), t, table.to(self._precision), pixel_scale=1.0, pixel_shift=0.0, noise=as_image(noise),
            returns=returns, dtype=torch.promote_types(x_start.dtype, table.dtype),
        )  # fmt: skip
        return tuple(x.view(x_start.shape) for x in (made if isinstance(made, tuple) else (made,)))

    def _noised_with_target(self, x_start: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """x_t, and what the network is compared with."""
        differentiable = torch.is_grad_enabled() and (x_start.requires_grad or noise.requires_grad)
        if self.objective == "pred_v" and self._is_ours("q_sample", "predict_v") and not differentiable:
            x_t, v = self._noised_and(x_start, t, noise, "v")
            return x_t, v
        # a noise that q_sample assigns to images is assigned already
        q_sample = self._noised if self._is_ours("q_sample") else self.q_sample
        x_t = q_sample(x_start=x_start, t=t, noise=noise)
        if self.objective == "pred_v":
            return x_t, self.predict_v(x_start, t, noise)
        return x_t, noise if self.objective == "pred_noise" else x_start

    def _loss(self, out: Tensor, target: Tensor, t: Tensor, loss_reduction: str) -> Tensor:
        """weight_t mean((out - target)^2) of each sample [B], or their mean []."""
        if loss_reduction not in ("mean", "none"):
            raise ValueError(
                f"{type(self).__name__}: expected loss_reduction 'mean' or 'none', got {loss_reduction!r}; choose one"
            )
        weight = self.loss_weight[t]
        if loss_reduction == "none" or (torch.is_grad_enabled() and target.requires_grad):
            per_sample = (out.to(weight.dtype) - target).square().flatten(1).mean(dim=1) * weight
            return per_sample if loss_reduction == "none" else per_sample.mean()
        loss, _ = ops.diffusion_loss(as_image(out), t, target=as_image(target), weight=weight)
        return loss

    @property
    def _predicts(self) -> str:
        """The objective that an output of the network is read by."""
        return self.objective

    @property
    def _precision(self) -> torch.dtype:
        """Of the tables that the ops take."""
        return torch.promote_types(self.betas.dtype, torch.float32)

    @keep_transformed()
    def _ancestral(self, x: Tensor, steps: int, options: dict[str, Any], all_states: bool = False) -> list[Tensor]:
        """x and the states after each step, or the last alone: from t = steps - 1 to the image.

        Args:
            options: passed to the network, or to `p_sample` where a subclass has its own arithmetic.
        """
        table = self._ancestral_table()
        fused = self._is_ours(
            "p_sample", "p_mean_variance", "model_predictions", "q_posterior", "predict_start_from_noise",
            "predict_start_from_v",
        )  # fmt: skip
        pred, states = None, [x]
        with freed_memory_kept(self.device):
            for t in _bar(range(steps - 1, -1, -1)):
                x_self_cond = pred if self.self_condition else None
                if fused:
                    times = torch.full((len(x),), t, device=self.device, dtype=torch.long)
                    out = self._network(x, times, x_self_cond, **options)
                    noise = torch.randn_like(x) if t > 0 else None
                    x, pred = _update(x, out, table, t, noise, 1.0)
                else:
                    x, pred = self.p_sample(x, t, x_self_cond, **options)
                states = [*states, x] if all_states else [x]
        return states

    @keep_transformed()
    def _ddim(
        self, x: Tensor, clip: bool, rederive: bool, options: dict[str, Any], all_states: bool = False
    ) -> list[Tensor]:
        """x and the states after each step of DDIM, or the last alone; see `_ddim_table`."""
        pairs = self._ddim_pairs()
        table = self._ddim_table(pairs, rederive)
        fused = self._is_ours(
            "model_predictions", "predict_start_from_noise", "predict_start_from_v", "predict_noise_from_start"
        )
        pred, states = None, [x]
        with freed_memory_kept(self.device):
            for row, (t, after) in enumerate(_bar(pairs)):
                times = torch.full((len(x),), t, device=self.device, dtype=torch.long)
                x_self_cond = pred if self.self_condition else None
                if fused:
                    out = self._network(x, times, x_self_cond, **options)
                    # drawn for eta = 0, too: it moves the generator
                    noise = torch.randn_like(x) if after >= 0 else None
                    x, pred = _update(x, out, table, row, noise, 1.0 if clip else None)
                else:
                    flags = {"clip_x_start": clip} | ({"rederive_pred_noise": True} if rederive else {})
                    eps, pred, *_ = self.model_predictions(x, times, x_self_cond, **flags, **options)
                    x = pred if after < 0 else self._ddim_step(x, pred, eps, t, after)
                states = [*states, x] if all_states else [x]
        return states

    def _ddim_step(self, x: Tensor, pred: Tensor, eps: Tensor, t: int, after: int) -> Tensor:
        """The equation of `_ddim_table`, for predictions that a subclass made."""
        a, a_next = self.alphas_cumprod[t], self.alphas_cumprod[after]
        sigma = self.ddim_sampling_eta * ((1 - a / a_next) * (1 - a_next) / (1 - a)).sqrt()
        return a_next.sqrt() * pred + (1 - a_next - sigma**2).sqrt() * eps + sigma * torch.randn_like(x)

    def _between(self, x1: Tensor, x2: Tensor, t: int | None, lam: float, corrected: bool) -> Tensor:
        """See `GaussianDiffusion.interpolate`."""
        if x1.shape != x2.shape:
            raise ValueError(
                f"interpolate: expected x1 and x2 of one shape, got {list(x1.shape)} and {list(x2.shape)}; resize one"
            )
        t = self.num_timesteps - 1 if t is None else t
        if not 0 <= t < self.num_timesteps:
            raise ValueError(f"interpolate: expected t in [0, {self.num_timesteps}), got {t}; None is the largest")
        if corrected:
            x1, x2 = self.normalize(x1), self.normalize(x2)
        times = torch.full((len(x1),), t, device=x1.device)
        first, second = (self.q_sample(x, t=times) for x in (x1, x2))
        x = self._ancestral((1 - lam) * first + lam * second, t + 1 if corrected else t, {})[-1]
        return self.unnormalize(x) if corrected else x

    def _ancestral_table(self) -> Tensor:
        """Row t from x_t to x_{t-1}: mean and deviation of q_posterior at the predicted x_0: [T, 9]."""
        mean1, mean2, log_variance = self._float64(
            "posterior_mean_coef1", "posterior_mean_coef2", "posterior_log_variance_clipped"
        )
        k5 = (0.5 * log_variance).exp()
        k5[0] = 0  # the last step adds no noise
        return self._table(torch.arange(len(k5)), mean1, mean2, k5)

    def _ddim_table(self, pairs: list[tuple[int, int]], rederive: bool) -> Tensor:
        """Row i goes from pairs[i][0] to pairs[i][1], -1 being the image itself (Song et al. 2021, eq. 12 and 16).

            x' = sqrt(abar') x_0 + sqrt(1 - abar' - s^2) eps + s z
            s = eta sqrt((1 - abar / abar') (1 - abar') / (1 - abar))

        with eps of the clipped x_0, or with ``rederive`` False and "pred_noise" the output itself, which is k6.
        """
        abar, recip, recipm1 = self._float64(
            "alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"
        )
        now, after = torch.tensor(pairs).unbind(1)
        a = abar[now]
        a_next = torch.where(after < 0, 1.0, abar[after])
        sigma = self.ddim_sampling_eta * ((1 - a / a_next) * (1 - a_next) / (1 - a)).sqrt()
        rest = 1 - a_next - sigma.square()
        if bool((rest < -1e-6).any()):
            raise ValueError(
                f"{type(self).__name__}: expected ddim_sampling_eta for which no step has a negative variance, got "
                f"{self.ddim_sampling_eta}; 0 is deterministic, 1 is as random as ancestral sampling"
            )
        of_eps, k2 = rest.clamp(min=0).sqrt(), a_next.sqrt()
        if self._predicts == "pred_noise" and not rederive:
            return self._table(now, k2, torch.zeros_like(k2), sigma, k6=of_eps)
        of_eps = torch.where(after < 0, 0.0, of_eps / recipm1[now])
        return self._table(now, k2 - of_eps, of_eps * recip[now], sigma)

    def _table(self, t: Tensor, k2: Tensor, k3: Tensor, k5: Tensor, k6: Tensor | None = None) -> Tensor:
        """The rows of `fastddpm.solver_step` for these timesteps, on the device."""
        recip, recipm1, signal, sigma = self._float64(
            "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
            "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
        )  # fmt: skip
        zero = torch.zeros_like(k2)
        k0, k1 = {
            "pred_noise": (recip[t], -recipm1[t]), "pred_x0": (zero, zero + 1), "pred_v": (signal[t], -sigma[t])
        }[self._predicts]  # fmt: skip
        log_variance = torch.where(k5 > 0, 2 * k5.log(), 0.0)
        columns = (k0, k1, k2, k3, zero, k5, zero if k6 is None else k6, log_variance, log_variance)
        return torch.stack(columns, dim=1).to(self.device, self._precision)

    def _float64(self, *names: str) -> Iterator[Tensor]:
        """Buffers as they are now, on the CPU."""
        return (getattr(self, name).detach().to("cpu", torch.float64) for name in names)

    def _ddim_pairs(self) -> list[tuple[int, int]]:
        """Each visited timestep with the next, -1 after the last: a truncated linspace from T - 1 to -1."""
        times = torch.linspace(-1, self.num_timesteps - 1, steps=self.sampling_timesteps + 1).int().tolist()[::-1]
        return list(itertools.pairwise(times))

    def _is_ours(self, *methods: str) -> bool:
        """Whether these methods are those of this package: one that a user's subclass has made its own is called."""
        home = next(c for c in type(self).__mro__ if c.__module__.startswith(str(__package__)))
        return all(getattr(type(self), m) is getattr(home, m) and m not in vars(self) for m in methods)


def as_image(x: Tensor) -> Tensor:
    """[B, ...] as the ops take it: dense, with four dimensions."""
    if x.dim() != 4:
        return x.reshape(len(x), -1, 1, 1)
    return x if x.is_contiguous() or is_nhwc(x) else x.contiguous()


def _update(
    x: Tensor, out: Tensor, table: Tensor, row: int, noise: Tensor | None, clamp: float | None
) -> tuple[Tensor, Tensor]:
    """x' and the predicted x_0, both shaped like x."""
    after, pred = ops.solver_step(
        as_image(x), as_image(out), table, row, clamp=clamp, noise=None if noise is None else as_image(noise)
    )
    return after.view(x.shape), pred.view(x.shape)


def _bar(steps: Iterable[Step]) -> Iterable[Step]:
    from tqdm.auto import tqdm

    bar: Iterable[Step] = tqdm(steps, desc="sampling")
    return bar


def _to_signed(x: Tensor) -> Tensor:
    return x * 2 - 1


def _to_unit(x: Tensor) -> Tensor:
    return (x + 1) * 0.5


def _as_it_is(x: Tensor) -> Tensor:
    return x
