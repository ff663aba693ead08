"""The diffusion of improved-diffusion: its class and functions, over our schedule, our samplers' tables and our ops.

Images are [B, C, H, W] in [-1, 1]; t is int64 [B], 0 = least noise. Noise comes from torch's generators in the order of
the original, x_T and one tensor a step, so `torch.manual_seed` gives its images and its losses. Not as there: tables
are copied to a device once and no step waits for it; a loop of sampling is one `solver_step` a step; the terms of the
bound are evaluated for many timesteps in one call of a network in eval mode.
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ... import diffusion as theory
from ... import ops
from ..._allocator import freed_memory_kept
from ..._checks import FLOATS, is_dense
from ..._graph import Replayed
from ...sampling import ddim_table, ddpm_table
from ...schedule import Schedule, cosine_beta_schedule, extract
from .losses import discretized_gaussian_log_likelihood, normal_kl
from .nn import mean_flat
from .unet import UNetModel

Array = npt.NDArray[np.float64]
Model = Callable[..., Tensor]
Kwargs = dict[str, Any]

BOUND_PIXELS = 2**18
"""How many pixels `GaussianDiffusion.calc_bpd_loop` gives to a network at once, at most, where a batch has less."""
LEAST_RECORDED = 10
"""Steps of a sampling on a GPU from which on it is worth to record one."""


class ModelMeanType(enum.Enum):
    """What the network predicts: x_{t-1}, x_0 or eps."""

    PREVIOUS_X = enum.auto()
    START_X = enum.auto()
    EPSILON = enum.auto()


class ModelVarType(enum.Enum):
    """The variance of a step: the network's second half of channels as log-variance (LEARNED) or between the two fixed
    ones (LEARNED_RANGE); that of the posterior (FIXED_SMALL); beta (FIXED_LARGE)."""

    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()


class LossType(enum.Enum):
    """MSE: squared error, plus the bound's term for a learned variance; RESCALED_MSE: that term times T / 1000.
    KL: the bound's term; RESCALED_KL: times T."""

    MSE = enum.auto()
    RESCALED_MSE = enum.auto()
    KL = enum.auto()
    RESCALED_KL = enum.auto()

    def is_vb(self) -> bool:
        """Whether the loss is a term of the bound alone."""
        return self in (LossType.KL, LossType.RESCALED_KL)


PREDICTIONS = {ModelMeanType.PREVIOUS_X: "mu", ModelMeanType.START_X: "x0", ModelMeanType.EPSILON: "eps"}
VARIANCES = {
    ModelVarType.LEARNED: "learned",
    ModelVarType.FIXED_SMALL: "fixed_small",
    ModelVarType.FIXED_LARGE: "fixed_large",
    ModelVarType.LEARNED_RANGE: "learned_range",
}


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> Array:
    """Betas by name: "linear", from 0.1 / T to 20 / T, or "cosine" (Nichol and Dhariwal 2021, eq. 17).

    Returns: float64 [T], NumPy.

    Raises:
        NotImplementedError: another name.
    """
    if schedule_name == "linear":
        scale = 1000 / num_diffusion_timesteps
        return np.linspace(scale * 1e-4, scale * 0.02, num_diffusion_timesteps, dtype=np.float64)
    if schedule_name == "cosine":
        return cosine_beta_schedule(num_diffusion_timesteps).cpu().numpy()
    raise NotImplementedError(
        f"get_named_beta_schedule: expected schedule_name 'linear' or 'cosine', got {schedule_name!r}; "
        "or pass betas of your own to SpacedDiffusion"
    )


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> Array:
    """beta_i = min(1 - abar((i + 1) / T) / abar(i / T), max_beta) for a function abar on [0, 1]; float64 [T]."""
    ends = [alpha_bar(i / num_diffusion_timesteps) for i in range(num_diffusion_timesteps + 1)]
    betas = [min(1 - b / a, max_beta) for a, b in pairwise(ends)]
    return np.array(betas, dtype=np.float64)


class GaussianDiffusion:
    """Training, sampling and likelihood of a diffusion, with the network as an argument of each method.

    Args:
        betas: variances of the forward process [T], in (0, 1), the last at most 1.
        model_mean_type, model_var_type, loss_type: see there.
        rescale_timesteps: give the network t 1000 / T, float32, in place of t.
        corrected: take the exact distribution function of the normal for the decoder, so that the probabilities of all
            grey levels add up to 1. False is the original's approximation of it by tanh, whose bits per dimension are
            off in the third digit at t = 0.

    Attributes: the tables of the schedule under the original's names, as float64 arrays of NumPy; num_timesteps.

    Raises:
        ValueError: betas out of range.

    Numerics: tables are made in float64 and used in float32, or in float64 for x in float64.
    """

    def __init__(
        self,
        *,
        betas: Sequence[float] | Array,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        rescale_timesteps: bool = False,
        corrected: bool = False,
    ) -> None:
        self.model_mean_type, self.model_var_type, self.loss_type = model_mean_type, model_var_type, loss_type
        self.rescale_timesteps, self.corrected = rescale_timesteps, corrected
        self.schedule = s = Schedule.from_betas(torch.from_numpy(np.array(betas, dtype=np.float64)))
        self.num_timesteps = s.num_timesteps
        self.betas: Array = s.betas.numpy()
        self.alphas_cumprod: Array = s.alphas_cumprod.numpy()
        self.alphas_cumprod_prev: Array = s.alphas_cumprod_prev.numpy()
        self.alphas_cumprod_next: Array = np.append(self.alphas_cumprod[1:], 0.0)
        self.sqrt_alphas_cumprod: Array = s.alphas_cumprod.sqrt().numpy()
        self.sqrt_one_minus_alphas_cumprod: Array = s.one_minus_alphas_cumprod.sqrt().numpy()
        self.log_one_minus_alphas_cumprod: Array = s.one_minus_alphas_cumprod.log().numpy()
        self.sqrt_recip_alphas_cumprod: Array = s.alphas_cumprod.rsqrt().numpy()
        self.sqrt_recipm1_alphas_cumprod: Array = (s.one_minus_alphas_cumprod / s.alphas_cumprod).sqrt().numpy()
        self.posterior_variance: Array = s.posterior_variance.numpy()
        self.posterior_log_variance_clipped: Array = s.posterior_log_variance_clipped.numpy()
        self.posterior_mean_coef1: Array = s.posterior_mean_coef1.numpy()
        self.posterior_mean_coef2: Array = s.posterior_mean_coef2.numpy()
        self._tables: dict[tuple[Any, ...], Tensor] = {}

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of q(x_t | x_0), each [B, C, H, W] (Ho et al. 2020, eq. 4)."""
        mean = self._at("sqrt_alphas_cumprod", t, x_start) * x_start
        variance = self._at("one_minus_alphas_cumprod", t, x_start)
        log_variance = self._at("log_one_minus_alphas_cumprod", t, x_start)
        return mean, variance.expand_as(x_start), log_variance.expand_as(x_start)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (Ho et al. 2020, eq. 4).

        Args:
            x_start: [B, C, ...]. t: int64 [B] in [0, T). noise: eps, shaped like x_start; drawn when None.

        Raises:
            ValueError: noise of another shape.
        """
        if noise is None:
            noise = torch.randn_like(x_start)
        if noise.shape != x_start.shape:
            raise ValueError(
                f"q_sample: expected noise of shape {list(x_start.shape)}, that of x_start, got {list(noise.shape)}; "
                "draw it with torch.randn_like(x_start)"
            )
        differentiated = torch.is_grad_enabled() and (x_start.requires_grad or noise.requires_grad)
        if not differentiated and t.dtype == torch.int64 and _is_image(x_start) and _is_image(noise):
            table = self._table(("signal_sigma",), lambda: self.schedule.signal_sigma, x_start)
            x_t = ops.q_sample(x_start, t, table, pixel_scale=1.0, pixel_shift=0.0, noise=noise, dtype=table.dtype)
            assert isinstance(x_t, Tensor)
            return x_t
        signal, sigma = (self._at(f"sqrt_{n}alphas_cumprod", t, x_start) for n in ("", "one_minus_"))
        return signal * x_start + sigma * noise

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0), each [B, C, ...] (Ho et al. 2020, eq. 6-7).

        Raises:
            ValueError: x_start and x_t of different shapes.
        """
        if x_start.shape != x_t.shape:
            raise ValueError(
                f"q_posterior_mean_variance: expected x_start of shape {list(x_t.shape)}, that of x_t, "
                f"got {list(x_start.shape)}; pass images of one shape"
            )
        coef1, coef2 = (self._at(f"posterior_mean_coef{n}", t, x_t) for n in (1, 2))
        variance = self._at("posterior_variance", t, x_t).expand_as(x_t)
        log_variance = self._at("posterior_log_variance_clipped", t, x_t).expand_as(x_t)
        return coef1 * x_start + coef2 * x_t, variance, log_variance

    def p_mean_variance(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Kwargs | None = None,
    ) -> dict[str, Tensor]:
        """p_theta(x_{t-1} | x_t), from one call of the network (Ho et al. 2020, eq. 1 and 11).

        Args:
            model: called as model(x, t, **model_kwargs); gives [B, C, ...], or twice the channels for a learned
                variance.
            x: x_t [B, C, ...]. t: int64 [B] in [0, T).
            clip_denoised: keep the predicted x_0 in [-1, 1].
            denoised_fn: applied to the predicted x_0, before it is clipped.

        Returns: "mean", "variance", "log_variance" and "pred_xstart", each shaped like x. For PREVIOUS_X the mean is
        the network's output as it is, whatever becomes of x_0.

        Raises:
            ValueError: t or the output of the network of another shape.
        """
        prediction, values = self._outputs(model, x, t, model_kwargs)
        small, large = self._log_variances(t, x)
        if self.model_var_type == ModelVarType.LEARNED:
            assert values is not None
            log_variance = values
        elif values is not None:
            fraction = (values + 1) / 2
            log_variance = fraction * large + (1 - fraction) * small
        else:
            log_variance = small.expand_as(x)
        if self.model_var_type == ModelVarType.FIXED_SMALL:
            variance = self._at("posterior_variance", t, x).expand_as(x)  # 0 at t = 0, where its logarithm is clipped
        else:
            variance = log_variance.exp()

        pred_xstart = self._x0_from(prediction, x, t)
        if denoised_fn is not None:
            pred_xstart = denoised_fn(pred_xstart)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        mean = prediction
        if self.model_mean_type != ModelMeanType.PREVIOUS_X:
            mean, _, _ = self.q_posterior_mean_variance(x_start=pred_xstart, x_t=x, t=t)
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": pred_xstart}

    def p_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Kwargs | None = None,
    ) -> dict[str, Tensor]:
        """One step of ancestral sampling (Ho et al. 2020, algorithm 2): x_{t-1} = mean + sigma z, z = 0 at t = 0.

        Args are those of `p_mean_variance`. Returns: "sample" and "pred_xstart".
        """
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        noise = torch.randn_like(x)
        sample = out["mean"] + _moves(t, x) * torch.exp(0.5 * out["log_variance"]) * noise
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def p_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Kwargs | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Images by ancestral sampling over all T steps.

        Args:
            model, clip_denoised, denoised_fn, model_kwargs: see `p_mean_variance`.
            shape: [B, C, H, W]. noise: x_T; drawn when None.
            device: where; None is that of the network's parameters.
            progress: show a bar.

        Returns: [B, C, H, W].
        """
        x = _start(model, shape, noise, device)
        own = self._has_own("p_sample_loop_progressive", "p_sample", "p_mean_variance")
        if own and denoised_fn is None and _is_state(x):
            return self._in_place(self._ddpm_table(x), model, x, clip_denoised, model_kwargs, progress)
        steps = self.p_sample_loop_progressive(
            model, shape, x, clip_denoised, denoised_fn, model_kwargs, device, progress
        )
        return _last(steps)["sample"]

    def p_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Kwargs | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Iterator[dict[str, Tensor]]:
        """What `p_sample` gives for each step of `p_sample_loop`, whose arguments these are."""

        def step(x: Tensor, t: Tensor) -> dict[str, Tensor]:
            return self.p_sample(model, x, t, clip_denoised, denoised_fn, model_kwargs)

        table = self._ddpm_table if denoised_fn is None and self._has_own("p_sample", "p_mean_variance") else None
        return self._loop(step, table, model, shape, noise, clip_denoised, model_kwargs, device, progress)

    def ddim_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Kwargs | None = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """One step of DDIM (Song et al. 2021, eq. 12 and 16), with eps taken from the x_0 that was clipped.

        Args are those of `p_mean_variance`; eta: 0 is deterministic, 1 as random as DDPM. Returns: "sample" and
        "pred_xstart".
        """
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        abar, abar_prev = self._at("alphas_cumprod", t, x), self._at("alphas_cumprod_prev", t, x)
        sigma = eta * torch.sqrt((1 - abar_prev) / (1 - abar)) * torch.sqrt(1 - abar / abar_prev)
        noise = torch.randn_like(x)
        mean = out["pred_xstart"] * torch.sqrt(abar_prev) + torch.sqrt(1 - abar_prev - sigma**2) * eps
        return {"sample": mean + _moves(t, x) * sigma * noise, "pred_xstart": out["pred_xstart"]}

    def ddim_reverse_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Kwargs | None = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """One step of DDIM towards more noise, x_t to x_{t+1}: the same equation, read backwards.

        Args and returns are those of `ddim_sample`.

        Raises:
            ValueError: eta is not 0.
        """
        if eta != 0:
            raise ValueError(
                f"ddim_reverse_sample: expected eta = 0, got {eta}; only the deterministic path can be reversed"
            )
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        abar_next = self._at("alphas_cumprod_next", t, x)
        sample = out["pred_xstart"] * torch.sqrt(abar_next) + torch.sqrt(1 - abar_next) * eps
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Kwargs | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Tensor:
        """Images by DDIM over all T steps. Args and returns are those of `p_sample_loop`; eta as in `ddim_sample`.

        Raises:
            ValueError: eta for which a root would not be real (NaN in the original).
        """
        x = _start(model, shape, noise, device)
        methods = "ddim_sample_loop_progressive", "ddim_sample", "p_mean_variance", "_predict_eps_from_xstart"
        if self._has_own(*methods) and denoised_fn is None and _is_state(x):
            return self._in_place(self._ddim_table(x, eta), model, x, clip_denoised, model_kwargs, progress)
        steps = self.ddim_sample_loop_progressive(
            model, shape, x, clip_denoised, denoised_fn, model_kwargs, device, progress, eta
        )
        return _last(steps)["sample"]

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Kwargs | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Iterator[dict[str, Tensor]]:
        """What `ddim_sample` gives for each step of `ddim_sample_loop`, whose arguments these are."""

        def step(x: Tensor, t: Tensor) -> dict[str, Tensor]:
            return self.ddim_sample(model, x, t, clip_denoised, denoised_fn, model_kwargs, eta)

        fused = denoised_fn is None and self._has_own("ddim_sample", "p_mean_variance", "_predict_eps_from_xstart")
        table = functools.partial(self._ddim_table, eta=eta) if fused else None
        return self._loop(step, table, model, shape, noise, clip_denoised, model_kwargs, device, progress)

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: Kwargs | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss of each image at its timestep (Ho et al. 2020, eq. 14; Nichol and Dhariwal 2021, eq. 16).

        Args:
            model, model_kwargs: see `p_mean_variance`.
            x_start: [B, C, ...] in [-1, 1]. t: int64 [B] in [0, T).
            noise: eps; drawn when None.

        Returns: "loss" [B], and for the squared error "mse" [B]; with a learned variance also "vb" [B], the bound's
        term in bits per dimension, whose gradient does not reach the mean.
        """
        if noise is None:
            noise = torch.randn_like(x_start)
        x_t = self.q_sample(x_start, t, noise=noise)
        if self.loss_type.is_vb():
            loss = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised=False, model_kwargs=model_kwargs)["output"]
            return {"loss": loss * self.num_timesteps if self.loss_type == LossType.RESCALED_KL else loss}

        prediction, values = self._outputs(model, x_t, t, model_kwargs)
        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            target, _, _ = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)
        else:
            target = x_start if self.model_mean_type == ModelMeanType.START_X else noise
        terms = {"mse": mean_flat((target - prediction) ** 2)}
        terms["loss"] = terms["mse"]
        if values is not None:
            frozen = torch.cat([prediction.detach(), values], dim=1)
            vb = self._vb_terms_bpd(lambda *_, **__: frozen, x_start, x_t, t, clip_denoised=False)["output"]
            terms["vb"] = vb * (self.num_timesteps / 1000) if self.loss_type == LossType.RESCALED_MSE else vb
            terms["loss"] = terms["mse"] + terms["vb"]
        return terms

    def calc_bpd_loop(
        self, model: Model, x_start: Tensor, clip_denoised: bool = True, model_kwargs: Kwargs | None = None
    ) -> dict[str, Tensor]:
        """The bound in bits per dimension, term by term (Ho et al. 2020, eq. 5).

        A network in eval mode gets as many timesteps at once as `BOUND_PIXELS` allows, their noise drawn one after the
        other all the same: what it gives differs by its own rounding from one batch size to another.

        Args:
            model, clip_denoised, model_kwargs: see `p_mean_variance`.
            x_start: [B, C, H, W] on the grid of 256 values from -1 to 1.

        Returns: "total_bpd" and "prior_bpd" [B]; "vb", "xstart_mse" and "mse" (of eps) [B, T], column 0 at t = T - 1.
        """
        found: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        batch = x_start.shape[0]
        many = self._timesteps_at_once(model, x_start, model_kwargs)
        model_kwargs = {} if model_kwargs is None else model_kwargs
        with torch.no_grad(), freed_memory_kept(x_start.device):
            for last in range(self.num_timesteps, 0, -many):
                steps = torch.arange(last - 1, max(last - many, 0) - 1, -1, device=x_start.device)
                noise = torch.cat([torch.randn_like(x_start) for _ in steps])
                t, x0 = steps.repeat_interleave(batch), torch.cat([x_start] * len(steps))
                repeated = {k: v if len(steps) == 1 else torch.cat([v] * len(steps)) for k, v in model_kwargs.items()}
                x_t = self.q_sample(x_start=x0, t=t, noise=noise)
                out = self._vb_terms_bpd(model, x0, x_t, t, clip_denoised=clip_denoised, model_kwargs=repeated)
                eps = self._predict_eps_from_xstart(x_t, t, out["pred_xstart"])
                for name, terms in (
                    ("vb", out["output"]),
                    ("xstart_mse", mean_flat((out["pred_xstart"] - x0) ** 2)),
                    ("mse", mean_flat((eps - noise) ** 2)),
                ):
                    found[name].append(terms.reshape(len(steps), batch))
            prior_bpd = self._prior_bpd(x_start)
        terms_of = {name: torch.cat(terms).t().contiguous() for name, terms in found.items()}
        return {"total_bpd": terms_of["vb"].sum(dim=1) + prior_bpd, "prior_bpd": prior_bpd, **terms_of}

    def _vb_terms_bpd(
        self,
        model: Model,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        model_kwargs: Kwargs | None = None,
    ) -> dict[str, Tensor]:
        """One term of the bound for each image, bits per dimension: "output" [B], with "pred_xstart" [B, C, ...].

        KL(q(x_{t-1} | x_t, x_0) || p_theta(x_{t-1} | x_t)) for t > 0, -log2 p_theta(x_0 | x_1) for t = 0.
        """
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)
        out = self.p_mean_variance(model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
        mean, log_variance = out["mean"], out["log_variance"]
        kl = normal_kl(true_mean, true_log_variance, mean, log_variance)
        if self.corrected:
            likelihood = theory.discretized_gaussian_log_likelihood(x_start, mean, log_variance)
        else:
            likelihood = discretized_gaussian_log_likelihood(x_start, means=mean, log_scales=0.5 * log_variance)
        nats = torch.where(t == 0, -mean_flat(likelihood), mean_flat(kl))
        return {"output": nats / math.log(2.0), "pred_xstart": out["pred_xstart"]}

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || N(0, I)) in bits per dimension [B], which no network changes."""
        t = torch.full((x_start.shape[0],), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2.0)

    def _predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_0 = x_t / sqrt(abar_t) - sqrt(1 / abar_t - 1) eps."""
        a, b = (self._at(f"sqrt_{n}_alphas_cumprod", t, x_t) for n in ("recip", "recipm1"))
        return a * x_t - b * eps

    def _predict_xstart_from_xprev(self, x_t: Tensor, t: Tensor, xprev: Tensor) -> Tensor:
        """x_0 = (x_{t-1} - coef2 x_t) / coef1, the posterior mean turned round."""
        a, b = (self._at(n, t, x_t) for n in ("recip_posterior_mean_coef1", "ratio_posterior_mean_coefs"))
        return a * xprev - b * x_t

    def _predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        """eps = (x_t / sqrt(abar_t) - x_0) / sqrt(1 / abar_t - 1)."""
        a, b = (self._at(f"sqrt_{n}_alphas_cumprod", t, x_t) for n in ("recip", "recipm1"))
        return (a * x_t - pred_xstart) / b

    def _x0_from(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        if self.model_mean_type == ModelMeanType.START_X:
            return prediction
        if self.model_mean_type == ModelMeanType.EPSILON:
            return self._predict_xstart_from_eps(x_t=x_t, t=t, eps=prediction)
        return self._predict_xstart_from_xprev(x_t=x_t, t=t, xprev=prediction)

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        """What the network gets for t."""
        return t.float() * (1000.0 / self.num_timesteps) if self.rescale_timesteps else t

    def _outputs(self, model: Model, x: Tensor, t: Tensor, model_kwargs: Kwargs | None) -> tuple[Tensor, Tensor | None]:
        """The network's prediction, and for a learned variance what stands for it."""
        out = self._output(model, x, t, model_kwargs)
        channels = x.shape[1]
        return (out[:, :channels], out[:, channels:]) if self._learned else (out, None)

    def _output(self, model: Model, x: Tensor, t: Tensor, model_kwargs: Kwargs | None) -> Tensor:
        """The network's output, checked."""
        if t.shape != x.shape[:1]:
            raise ValueError(
                f"improved_diffusion: expected t of shape [{x.shape[0]}], a timestep for each image, "
                f"got {list(t.shape)}; pass torch.full(({x.shape[0]},), t) for one timestep"
            )
        out = model(x, self._scale_timesteps(t), **(model_kwargs or {}))
        expected = (x.shape[0], (1 + self._learned) * x.shape[1], *x.shape[2:])
        if tuple(out.shape) != expected:
            raise ValueError(
                f"improved_diffusion: expected the network to give {list(expected)} with {self.model_var_type}, got "
                f"{list(out.shape)}; a learned variance needs twice the channels (learn_sigma), a fixed one as many "
                "as the image has"
            )
        return out

    @property
    def _learned(self) -> bool:
        return self.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)

    def _log_variances(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest log-variance at t; equal where it is fixed."""
        small, large = (
            self._table(("log_variance", i), lambda i=i: self._bounds()[i], x)  # type: ignore[misc]
            for i in (0, 1)
        )
        return extract(small, t, x.dim()), extract(large, t, x.dim())

    def _bounds(self) -> tuple[Tensor, Tensor]:
        return theory.model_log_variance(VARIANCES[self.model_var_type], self.schedule)

    def _at(self, name: str, t: Tensor, x: Tensor) -> Tensor:
        """A table at t, [B, 1, ...]."""
        return extract(self._table((name,), lambda: self._tensor(name), x), t, x.dim())

    def _tensor(self, name: str) -> Tensor:
        s = self.schedule
        if name == "one_minus_alphas_cumprod":
            return s.one_minus_alphas_cumprod
        if name == "recip_posterior_mean_coef1":
            return 1 / s.posterior_mean_coef1
        if name == "ratio_posterior_mean_coefs":
            return s.posterior_mean_coef2 / s.posterior_mean_coef1
        return torch.from_numpy(getattr(self, name))

    def _table(self, name: tuple[Any, ...], make: Callable[[], Tensor], x: Tensor) -> Tensor:
        """A table where x is, in float32 or float64 as x; copied there once."""
        key = (*name, x.device, torch.float64 if x.dtype == torch.float64 else torch.float32)
        if key not in self._tables:
            self._tables[key] = make().to(key[-2], key[-1])
        return self._tables[key]

    def _ddpm_table(self, x: Tensor) -> Tensor:
        def make() -> Tensor:
            kind = PREDICTIONS[self.model_mean_type]
            table = ddpm_table(self.schedule, self._all_steps(), kind, VARIANCES[self.model_var_type])
            if self.model_mean_type == ModelMeanType.PREVIOUS_X:  # the mean is the output as it is, not by way of x_0
                table[:, 2:4], table[:, 6] = 0, 1
            return table

        return self._table(("ddpm",), make, x)

    def _ddim_table(self, x: Tensor, eta: float) -> Tensor:
        def make() -> Tensor:
            return ddim_table(self.schedule, self._all_steps(), PREDICTIONS[self.model_mean_type], eta)

        return self._table(("ddim", eta), make, x)

    def _all_steps(self) -> Tensor:
        return torch.arange(self.num_timesteps - 1, -1, -1)

    def _has_own(self, *methods: str) -> bool:
        """Whether these methods are the ones of this module, so that a loop may do their work in another way."""
        return all(getattr(type(self), name) is getattr(GaussianDiffusion, name) for name in methods)

    def _loop(
        self,
        step: Callable[[Tensor, Tensor], dict[str, Tensor]],
        table: Callable[[Tensor], Tensor] | None,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None,
        clip_denoised: bool,
        model_kwargs: Kwargs | None,
        device: torch.device | str | None,
        progress: bool,
    ) -> Iterator[dict[str, Tensor]]:
        """From x_T to x_0: by a `solver_step` each where there is a table and x is a dense image, else by ``step``."""
        x = _start(model, shape, noise, device)
        fused = table is not None and _is_state(x)
        with freed_memory_kept(x.device):
            for i, steps in enumerate(_bar(range(self.num_timesteps - 1, -1, -1), progress)):
                t = torch.full((len(x),), steps, device=x.device)
                with torch.no_grad():
                    if fused:
                        assert table is not None
                        out = self._output(model, x, t, model_kwargs)
                        x_next, pred_xstart = ops.solver_step(
                            x, _dense(out), table(x), i, clamp=1.0 if clip_denoised else None, noise=torch.randn_like(x)
                        )
                        made = {"sample": x_next, "pred_xstart": pred_xstart}
                    else:
                        made = step(x, t)
                yield made
                x = made["sample"]

    def _in_place(
        self, table: Tensor, model: Model, x: Tensor, clip_denoised: bool, model_kwargs: Kwargs | None, progress: bool
    ) -> Tensor:
        """A whole sampling, from x_T to the image. On a GPU a step of our own network is recorded, launched whole."""
        x, row = x.clone(), torch.zeros((), dtype=torch.int64, device=x.device)
        steps = self._all_steps().to(x.device)

        def step() -> None:
            t = steps.index_select(0, row.reshape(1)).repeat(len(x))
            out = self._output(model, x, t, model_kwargs)
            clamp = 1.0 if clip_denoised else None
            ops.solver_step(x, _dense(out), table, row, clamp=clamp, noise=torch.randn_like(x), inplace=True)
            row.add_(1)

        recorded = isinstance(model, UNetModel) and self.num_timesteps >= LEAST_RECORDED
        run = Replayed(x.device, "sampling", recorded)
        with torch.no_grad(), freed_memory_kept(x.device):
            for _ in _bar(range(self.num_timesteps), progress):
                run(step)
        return x

    def _timesteps_at_once(self, model: Model, x_start: Tensor, model_kwargs: Kwargs | None) -> int:
        """How many timesteps of these images go through the network together."""
        apart = not isinstance(model, nn.Module) or model.training  # it may draw numbers, or do who knows what
        given = (model_kwargs or {}).values()
        if apart or not all(isinstance(v, Tensor) and v.dim() and len(v) == len(x_start) for v in given):
            return 1
        return max(1, BOUND_PIXELS // max(1, x_start[:, :1].numel()))


def _start(model: Model, shape: Sequence[int], noise: Tensor | None, device: torch.device | str | None) -> Tensor:
    """x_T, as given or drawn where the network is."""
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"improved_diffusion: expected shape to be a tuple or list, got {shape!r}; (B, C, H, W)")
    if noise is not None:
        return noise
    if device is None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"improved_diffusion: expected device with a model that is no module, got None and {model!r}; pass "
                "device="
            )
        device = next(model.parameters()).device
    return torch.randn(*shape, device=device)


def _moves(t: Tensor, x: Tensor) -> Tensor:
    """1 where t > 0, else 0: [B, 1, ...]."""
    return (t != 0).to(x.dtype if x.dtype == torch.float64 else torch.float32).reshape(-1, *[1] * (x.dim() - 1))


def _is_image(x: Tensor) -> bool:
    """Whether our ops take it."""
    return x.dim() == 4 and x.dtype in FLOATS and is_dense(x)


def _is_state(x: Tensor) -> bool:
    """Whether `solver_step` goes on from it without a change of dtype."""
    return _is_image(x) and x.dtype in (torch.float32, torch.float64)


def _dense(x: Tensor) -> Tensor:
    return x if is_dense(x) else x.contiguous()


def _bar(steps: Iterable[int], progress: bool) -> Iterable[int]:
    if not progress:
        return steps
    from tqdm.auto import tqdm

    bar: Iterable[int] = tqdm(steps)
    return bar


def _last(steps: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    for made in steps:
        last = made
    return last
