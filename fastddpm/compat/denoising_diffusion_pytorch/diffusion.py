"""GaussianDiffusion of denoising-diffusion-pytorch for images, and the one that learns the variance.

Random numbers come from torch's generator, by the same calls in the same order as in that package: after the same
`torch.manual_seed` the images, and the losses, are the same up to rounding.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...schedule import extract
from .chain import NOTHING, Chain, cosine_betas, scaled_linear_betas, sigmoid_betas

SCHEDULES = {"linear": scaled_linear_betas, "cosine": cosine_betas, "sigmoid": sigmoid_betas}
LEAST_PROBABILITY = 1e-15


class GaussianDiffusion(Chain):
    """A network with the diffusion that trains and samples it: signature, defaults and state dict of 2.3.4.

    A call returns the training loss of images in [0, 1]; `sample` returns images in [0, 1].

    Args:
        model: the network, called as model(x, t, x_self_cond); it has ``channels``, ``out_dim`` and ``self_condition``.
        image_size: (H, W), or a number for both.
        timesteps: T >= 1; the linear schedule takes more than 20.
        sampling_timesteps: steps of a sampling, in [1, T]; None is T. Less than T means DDIM.
        objective: what the network predicts: "pred_noise", "pred_x0" or "pred_v".
        beta_schedule: "linear", "cosine" or "sigmoid".
        schedule_fn_kwargs: options of the schedule: s of "cosine"; start, end and tau of "sigmoid".
        ddim_sampling_eta: 0 is deterministic, 1 is as random as ancestral sampling.
        auto_normalize: bring images from [0, 1] to [-1, 1], and back.
        offset_noise_strength: of noise that is one number for each channel of an image, added to that of the pixels.
        min_snr_loss_weight, min_snr_gamma: limit the signal-to-noise ratio in the weight of the loss (Hang et al.
            2023).
        immiscible: assign the noises of a batch to its images so that the sum of the distances is least (Li et al.
            2024). Needs scipy, and waits for the device.

    Raises:
        ValueError: an option that is unknown or out of range; a network that does not fit.

    Numerics: what denoising-diffusion-pytorch computes, up to rounding, but for these. With ``immiscible`` its loss
        compares with the noise as it was before the assignment, which is not the one in x_t; here the two are one. It
        changes a noise that is given together with offset_noise_strength; here it does not. It keeps every intermediate
        image of a sampling; here only `return_all_timesteps` does. `interpolate` has a switch.

    A subclass that overrides a step of the arithmetic has it called, as there; otherwise a step is one kernel.
    """

    def __init__(
        self,
        model: Any,
        *,
        image_size: int | Sequence[int],
        timesteps: int = 1000,
        sampling_timesteps: int | None = None,
        objective: str = "pred_v",
        beta_schedule: str = "sigmoid",
        schedule_fn_kwargs: Mapping[str, Any] = NOTHING,
        ddim_sampling_eta: float = 0.0,
        auto_normalize: bool = True,
        offset_noise_strength: float = 0.0,
        min_snr_loss_weight: bool = False,
        min_snr_gamma: float = 5,
        immiscible: bool = False,
    ) -> None:
        name = type(self).__name__
        if isinstance(image_size, int):
            image_size = (image_size, image_size)
        if not isinstance(image_size, (tuple, list)) or len(image_size) != 2:
            raise ValueError(f"{name}: expected image_size to be a number or (height, width), got {image_size!r}")
        if beta_schedule not in SCHEDULES:
            raise ValueError(
                f"{name}: expected beta_schedule to be one of {', '.join(SCHEDULES)}, got {beta_schedule!r}; choose one"
            )
        super().__init__(
            model,
            SCHEDULES[beta_schedule](timesteps, **schedule_fn_kwargs),
            objective,
            sampling_timesteps,
            ddim_sampling_eta,
            auto_normalize,
            min_snr_gamma if min_snr_loss_weight else None,
        )
        self._check_model(model)
        self.channels, self.self_condition = model.channels, model.self_condition
        self.image_size = image_size
        self.offset_noise_strength = offset_noise_strength
        self.immiscible = immiscible

    def _check_model(self, model: Any) -> None:
        if type(self) is GaussianDiffusion and model.channels != model.out_dim:
            raise ValueError(
                f"GaussianDiffusion: expected a network that gives as many channels as it takes, got {model.channels} "
                f"and {model.out_dim}; LearnedGaussianDiffusion takes one with a learned variance"
            )
        if getattr(model, "random_or_learned_sinusoidal_cond", False):
            raise ValueError(
                f"{type(self).__name__}: expected a network that embeds integer times, got one with learned or random "
                "frequencies; leave out learned_sinusoidal_cond and random_fourier_features"
            )

    def model_predictions(
        self,
        x: Tensor,
        t: Tensor,
        x_self_cond: Tensor | None = None,
        clip_x_start: bool = False,
        rederive_pred_noise: bool = False,
    ) -> Any:
        """What the network says about the noise and the image.

        Args:
            x: x_t [B, C, H, W]. t: int64 [B]. x_self_cond: the last prediction [B, C, H, W].
            clip_x_start: keep the image in [-1, 1].
            rederive_pred_noise: take the noise that belongs to the clipped image.

        Returns: (pred_noise, pred_x_start), a named tuple.
        """
        out = self.model(x, t, x_self_cond)
        return self._predictions(out, x, t, clip_x_start, rederive_pred_noise)

    def p_mean_variance(
        self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None, clip_denoised: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean, variance, log-variance of p(x_{t-1} | x_t), and the x_0 behind them (eq. 11)."""
        x_start = self.model_predictions(x, t, x_self_cond).pred_x_start
        if clip_denoised:
            x_start = x_start.clamp(-1, 1)
        return (*self.q_posterior(x_start=x_start, x_t=x, t=t), x_start)

    @torch.inference_mode()
    def p_sample(self, x: Tensor, t: int, x_self_cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x_{t-1} and the predicted x_0, from x_t [B, C, H, W]; no noise is drawn at t = 0."""
        times = torch.full((len(x),), t, device=self.device, dtype=torch.long)
        mean, _, log_variance, x_start = self.p_mean_variance(x=x, t=times, x_self_cond=x_self_cond, clip_denoised=True)
        if t == 0:
            return mean, x_start
        return mean + (0.5 * log_variance).exp() * torch.randn_like(x), x_start

    @torch.inference_mode()
    def p_sample_loop(self, shape: Sequence[int], return_all_timesteps: bool = False) -> Tensor:
        """Images by all T steps (algorithm 2).

        Args:
            shape: [B, C, H, W].
            return_all_timesteps: return x_T and the state after each step, too.

        Returns: [B, C, H, W], or [B, T + 1, C, H, W].
        """
        x = torch.randn(tuple(shape), device=self.device)
        return self._finished(self._ancestral(x, self.num_timesteps, {}, return_all_timesteps), return_all_timesteps)

    @torch.inference_mode()
    def ddim_sample(self, shape: Sequence[int], return_all_timesteps: bool = False) -> Tensor:
        """Images by ``sampling_timesteps`` steps of DDIM (Song et al. 2021, eq. 12), with eps of the clipped image.

        Args, returns: see `p_sample_loop`.
        """
        x = torch.randn(tuple(shape), device=self.device)
        states = self._ddim(x, True, True, {}, return_all_timesteps)
        return self._finished(states, return_all_timesteps)

    @torch.inference_mode()
    def sample(self, batch_size: int = 16, return_all_timesteps: bool = False) -> Tensor:
        """Images in [0, 1], by DDIM where sampling_timesteps < T, else by all T steps.

        Args, returns: see `p_sample_loop`; B is batch_size.
        """
        height, width = self.image_size
        loop = self.ddim_sample if self.is_ddim_sampling else self.p_sample_loop
        return loop((batch_size, self.channels, height, width), return_all_timesteps=return_all_timesteps)

    @torch.inference_mode()
    def interpolate(
        self, x1: Tensor, x2: Tensor, t: int | None = None, lam: float = 0.5, *, corrected: bool = False
    ) -> Tensor:
        """Images between two images: both are noised to t, mixed, and denoised (section 4.4).

        As in denoising-diffusion-pytorch, images are in [-1, 1] here, going in and coming out, unlike anywhere else;
        and what is noised to t is denoised as if it were at t - 1. ``corrected`` takes and returns images in [0, 1]
        with auto_normalize, and denoises from t.

        Args:
            x1, x2: [B, C, H, W]. t: in [0, T); None is T - 1. lam: share of x2.
            corrected: see above.

        Returns: [B, C, H, W].

        Raises:
            ValueError: images of two shapes.
        """
        return self._between(x1, x2, t, lam, corrected)

    def noise_assignment(self, x_start: Tensor, noise: Tensor) -> Tensor:
        """For each image the noise that it gets, int64 [B]: the sum of their distances is the least possible."""
        try:
            from scipy.optimize import linear_sum_assignment
        except ImportError as error:
            raise ImportError(
                "GaussianDiffusion: expected scipy for immiscible=True, got none; pip install scipy"
            ) from error
        distance = torch.cdist(x_start.flatten(1), noise.flatten(1))
        _, columns = linear_sum_assignment(distance.detach().cpu().numpy())
        return torch.from_numpy(columns).to(distance.device)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps (eq. 4), with the noises assigned first where ``immiscible``.

        Args:
            x_start: [B, C, H, W]. t: int64 [B]. noise: eps; None draws it.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        if self.immiscible:
            noise = noise[self.noise_assignment(x_start, noise)]
        return super().q_sample(x_start, t, noise)

    def p_losses(
        self,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        offset_noise_strength: float | None = None,
        loss_reduction: str = "mean",
    ) -> Tensor:
        """Weighted squared error of what the network predicts.

        Args:
            x_start: images [B, C, H, W] in [-1, 1]. t: int64 [B]. noise: eps; None draws it.
            offset_noise_strength: in place of that of the constructor.
            loss_reduction: "mean", or "none" for one loss an image.

        Returns: [], or [B].
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        strength = self.offset_noise_strength if offset_noise_strength is None else offset_noise_strength
        if strength > 0:
            noise = noise + strength * torch.randn(x_start.shape[:2], device=self.device)[:, :, None, None]
        if self.immiscible:
            noise = noise[self.noise_assignment(x_start, noise)]
        x, target = self._noised_with_target(x_start, t, noise)

        x_self_cond = None
        if self.self_condition and random.random() < 0.5:  # Chen et al. 2022, section 3.2
            with torch.no_grad():
                x_self_cond = self.model_predictions(x, t).pred_x_start
        return self._loss(self.model(x, t, x_self_cond), target, t, loss_reduction)

    def forward(
        self, img: Tensor, *args: Any, times: Tensor | None = None, loss_reduction: str = "mean", **kwargs: Any
    ) -> Tensor:
        """The training loss.

        Args:
            img: images [B, C, H, W], in [0, 1] with auto_normalize.
            times: int64 [B]; None draws them.
            loss_reduction: "mean", or "none" for one loss an image.
            *args, **kwargs: of `p_losses`, behind t.

        Returns: [], or [B].

        Raises:
            ValueError: images of another size.
        """
        if tuple(img.shape[2:]) != tuple(self.image_size):
            raise ValueError(
                f"{type(self).__name__}: expected images of size {tuple(self.image_size)}, got {tuple(img.shape[2:])}; "
                "resize them, or give image_size"
            )
        times = self.random_times(len(img)) if times is None else times
        return self.p_losses(self.normalize(img), times, *args, **{"loss_reduction": loss_reduction, **kwargs})

    def _network(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None) -> Tensor:
        out: Tensor = self.model(x, t, x_self_cond)
        return out

    def _finished(self, states: list[Tensor], all_states: bool) -> Tensor:
        return self.unnormalize(torch.stack(states, dim=1) if all_states else states[-1])


class LearnedPrediction(NamedTuple):
    """As `ModelPrediction`, with what the network says about the variance."""

    pred_noise: Tensor
    pred_x_start: Tensor
    pred_variance: Tensor


class LearnedGaussianDiffusion(GaussianDiffusion):
    """A diffusion that learns the variance, by the hybrid loss of Nichol and Dhariwal 2021, eq. 15-16.

        log sigma^2 = f log beta_t + (1 - f) log sigma_q,t^2,  f = (v + 1) / 2, v the second half of the output
        loss = mean((eps - out)^2) + vb_loss_weight T L_t,  L_t in bits for each element, its mean detached

    Args:
        model: a network with twice as many channels as it takes, such as Unet(learned_variance=True), without
            self-conditioning.
        vb_loss_weight: lambda, of the bound as a sum over its T terms.
        *args, **kwargs: those of `GaussianDiffusion`. The first half of the output is always the noise, and the loss is
            not weighted, whatever ``objective``, ``min_snr_loss_weight`` and ``offset_noise_strength`` say: so it is in
            the loss and the sampler of denoising-diffusion-pytorch, and in the networks that it trained.

    Raises:
        ValueError: a network that does not fit.

    Numerics: as denoising-diffusion-pytorch, but for these. Its loss leaves out the factor T, so that the variance is
        trained T times less than in the paper; vb_loss_weight=0.001 / timesteps gives its loss. Its DDIM raises a
        NameError; here it samples. The decoder at t = 0 has, as there, the normal distribution function by a tanh and
        probabilities of at least 1e-15.
    """

    def __init__(self, model: Any, vb_loss_weight: float = 0.001, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        ignored = [name for name in ("offset_noise_strength", "min_snr_loss_weight") if kwargs.get(name)]
        if kwargs.get("objective", "pred_noise") != "pred_noise":
            ignored.append("objective")
        if ignored:
            warnings.warn(
                f"LearnedGaussianDiffusion: expected no {' or '.join(ignored)}, which it leaves aside: the network "
                "predicts the noise, by an unweighted loss",
                stacklevel=2,
            )
        self.vb_loss_weight = vb_loss_weight

    def _check_model(self, model: Any) -> None:
        super()._check_model(model)
        if model.out_dim != 2 * model.channels:
            raise ValueError(
                f"LearnedGaussianDiffusion: expected a network with {2 * model.channels} output channels, got "
                f"{model.out_dim}; give it learned_variance=True"
            )
        if model.self_condition:
            raise ValueError(
                "LearnedGaussianDiffusion: expected a network without self-conditioning, got one with; "
                "give it self_condition=False"
            )

    @property
    def _predicts(self) -> str:
        return "pred_noise"

    def _network(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None) -> Tensor:
        out: Tensor = self.model(x, t)
        return out

    def model_predictions(
        self,
        x: Tensor,
        t: Tensor,
        x_self_cond: Tensor | None = None,
        clip_x_start: bool = False,
        rederive_pred_noise: bool = False,
    ) -> LearnedPrediction:
        """See `GaussianDiffusion.model_predictions`; pred_variance is v."""
        out, v = self._network(x, t, None).chunk(2, dim=1)
        eps, x_start = self._predictions(out, x, t, clip_x_start, rederive_pred_noise)
        return LearnedPrediction(eps, x_start, v)

    def p_mean_variance(  # type: ignore[override]  # by name alone, as there
        self, *, x: Tensor, t: Tensor, clip_denoised: bool, model_output: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean, variance, log-variance of p(x_{t-1} | x_t), and the x_0 behind them, each [B, C, H, W]."""
        out, v = (self._network(x, t, None) if model_output is None else model_output).chunk(2, dim=1)
        largest = extract(self.betas.log(), t, x.dim())
        smallest = self._at(self.posterior_log_variance_clipped, t, x)
        f = (v + 1) * 0.5
        log_variance = f * largest + (1 - f) * smallest
        x_start = self.predict_start_from_noise(x, t, out)
        if clip_denoised:
            x_start = x_start.clamp(-1, 1)
        mean, _, _ = self.q_posterior(x_start, x, t)
        return mean, log_variance.exp(), log_variance, x_start

    def p_losses(  # type: ignore[override]
        self,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        clip_denoised: bool = False,
        loss_reduction: str = "mean",
    ) -> Tensor:
        """The hybrid loss, see the class.

        Args:
            x_start: images [B, C, H, W] in [-1, 1]. t: int64 [B]. noise: eps; None draws it.
            clip_denoised: keep the predicted image in [-1, 1] in the mean of the bound.
            loss_reduction: "mean", or "none" for one loss an image.

        Returns: [], or [B].
        """
        if loss_reduction not in ("mean", "none"):
            raise ValueError(
                f"LearnedGaussianDiffusion: expected loss_reduction 'mean' or 'none', got {loss_reduction!r}; "
                "choose one"
            )
        noise = torch.randn_like(x_start) if noise is None else noise
        if self.immiscible:
            noise = noise[self.noise_assignment(x_start, noise)]
        x_t = self.q_sample(x_start=x_start, t=t, noise=noise)
        out = self._network(x_t, t, None).to(x_t.dtype)
        mean, _, log_variance, _ = self.p_mean_variance(x=x_t, t=t, clip_denoised=clip_denoised, model_output=out)
        mean = mean.detach()
        true_mean, _, true_log_variance = self.q_posterior(x_start=x_start, x_t=x_t, t=t)

        kl = _kl(true_mean, true_log_variance, mean, log_variance)
        decoder = -_log_likelihood(x_start, mean, 0.5 * log_variance)
        bound = torch.where(t == 0, decoder.flatten(1).mean(dim=1), kl.flatten(1).mean(dim=1)) / math.log(2)
        simple = (out.chunk(2, dim=1)[0] - noise).square().flatten(1).mean(dim=1)
        loss = simple + self.vb_loss_weight * self.num_timesteps * bound
        return loss if loss_reduction == "none" else loss.mean()

    def _ancestral_table(self) -> Tensor:
        """As for a fixed variance, with the bounds that the second half of the output goes between."""
        table = super()._ancestral_table()
        smallest, betas = self._float64("posterior_log_variance_clipped", "betas")
        bounds = torch.stack([smallest, betas.log()], dim=1)
        table[:, 7:] = bounds.to(table)
        return table


def _kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, var1) || N(mean2, var2)) of each element, in nats."""
    difference = log_variance1 - log_variance2
    return 0.5 * (difference.exp() - 1 - difference + (mean1 - mean2).square() * torch.exp(-log_variance2))


def _log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log P(x) of each element under a Gaussian cut into 256 grey levels (Ho et al. 2020, eq. 13), in nats."""
    inverse = torch.exp(-log_scale)
    upper, lower = ((x - mean + half) * inverse for half in (1 / 255, -1 / 255))
    above, below = _normal_cdf(upper), _normal_cdf(lower)
    probability = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return probability.clamp(min=LEAST_PROBABILITY).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The normal distribution function by a tanh (Hendrycks and Gimpel 2016, section 2)."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
