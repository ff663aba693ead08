"""GaussianDiffusion1D of denoising-diffusion-pytorch, for sequences and other data with a batch dimension."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .chain import NOTHING, Chain, ModelPrediction, cosine_betas, scaled_linear_betas

SCHEDULES = {"linear": scaled_linear_betas, "cosine": cosine_betas}


class GaussianDiffusion1D(Chain):
    """A network of sequences with the diffusion that trains and samples it: signature, defaults, state dict of 2.3.4.

    Args:
        model: the network, called as model(x, t), with x_self_cond=, and whatever ``model_forward_kwargs`` holds.
        seq_length: N.
        timesteps, sampling_timesteps, objective, ddim_sampling_eta, auto_normalize: as in `GaussianDiffusion`.
        beta_schedule: "linear" or "cosine".
        channels, self_condition: None takes what the network says.
        channel_first: data are [B, C, N]; else [B, N, C], for a network that takes them so.

    Raises:
        ValueError: an option that is unknown or out of range.

    Numerics: what denoising-diffusion-pytorch computes, up to rounding, but for this: ``return_noise`` of its DDIM
        returns the noise that was drawn last; here it is the one that the sampling started from. As there, DDIM with
        "pred_noise" takes the network's eps and not that of the clipped sequence, and `interpolate` has a switch.
    """

    def __init__(
        self,
        model: Any,
        *,
        seq_length: int,
        timesteps: int = 1000,
        sampling_timesteps: int | None = None,
        objective: str = "pred_noise",
        beta_schedule: str = "cosine",
        ddim_sampling_eta: float = 0.0,
        auto_normalize: bool = True,
        channels: int | None = None,
        self_condition: bool | None = None,
        channel_first: bool = True,
    ) -> None:
        if beta_schedule not in SCHEDULES:
            raise ValueError(
                f"{type(self).__name__}: expected beta_schedule to be one of {', '.join(SCHEDULES)}, got "
                f"{beta_schedule!r}; choose one"
            )
        betas = SCHEDULES[beta_schedule](timesteps)
        super().__init__(model, betas, objective, sampling_timesteps, ddim_sampling_eta, auto_normalize)
        self.channels = model.channels if channels is None else channels
        self.self_condition = model.self_condition if self_condition is None else self_condition
        self.channel_first, self.seq_index = channel_first, -1 if channel_first else -2
        self.seq_length = seq_length

    def model_predictions(
        self,
        x: Tensor,
        t: Tensor,
        x_self_cond: Tensor | None = None,
        clip_x_start: bool = False,
        rederive_pred_noise: bool = False,
        model_forward_kwargs: Mapping[str, Any] = NOTHING,
    ) -> ModelPrediction:
        """What the network says about the noise and the sequence, see `GaussianDiffusion.model_predictions`."""
        out = self._network(x, t, x_self_cond, model_forward_kwargs)
        return self._predictions(out, x, t, clip_x_start, rederive_pred_noise)

    def p_mean_variance(
        self,
        x: Tensor,
        t: Tensor,
        x_self_cond: Tensor | None = None,
        clip_denoised: bool = True,
        model_forward_kwargs: Mapping[str, Any] = NOTHING,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean, variance, log-variance of p(x_{t-1} | x_t), and the x_0 behind them (Ho et al. 2020, eq. 11)."""
        x_start = self.model_predictions(
            x, t, x_self_cond=x_self_cond, model_forward_kwargs=model_forward_kwargs
        ).pred_x_start
        if clip_denoised:
            x_start = x_start.clamp(-1, 1)
        return (*self.q_posterior(x_start=x_start, x_t=x, t=t), x_start)

    @torch.no_grad()
    def p_sample(
        self,
        x: Tensor,
        t: int,
        x_self_cond: Tensor | None = None,
        clip_denoised: bool = True,
        model_forward_kwargs: Mapping[str, Any] = NOTHING,
    ) -> tuple[Tensor, Tensor]:
        """x_{t-1} and the predicted x_0; no noise is drawn at t = 0."""
        times = torch.full((len(x),), t, device=x.device, dtype=torch.long)
        mean, _, log_variance, x_start = self.p_mean_variance(
            x=x, t=times, x_self_cond=x_self_cond, clip_denoised=clip_denoised,
            model_forward_kwargs=model_forward_kwargs,
        )  # fmt: skip
        if t == 0:
            return mean, x_start
        return mean + (0.5 * log_variance).exp() * torch.randn_like(x), x_start

    @torch.no_grad()
    def p_sample_loop(
        self,
        shape: Sequence[int],
        return_noise: bool = False,
        model_forward_kwargs: Mapping[str, Any] = NOTHING,
    ) -> Any:
        """Sequences by all T steps (Ho et al. 2020, algorithm 2).

        Args:
            shape: of the data. return_noise: return x_T, too. model_forward_kwargs: passed to the network.

        Returns: data of that shape, or the pair of it and x_T.
        """
        noise = torch.randn(tuple(shape), device=self.device)
        options = {"model_forward_kwargs": model_forward_kwargs}
        x = self.unnormalize(self._ancestral(noise, self.num_timesteps, options)[-1])
        return (x, noise) if return_noise else x

    @torch.no_grad()
    def ddim_sample(
        self,
        shape: Sequence[int],
        clip_denoised: bool = True,
        model_forward_kwargs: Mapping[str, Any] = NOTHING,
        return_noise: bool = False,
    ) -> Any:
        """Sequences by ``sampling_timesteps`` steps of DDIM (Song et al. 2021, eq. 12).

        Args:
            clip_denoised: keep the predicted sequence in [-1, 1].
            shape, model_forward_kwargs, return_noise: see `p_sample_loop`.

        Returns: see `p_sample_loop`.
        """
        noise = torch.randn(tuple(shape), device=self.device)
        options = {"model_forward_kwargs": model_forward_kwargs}
        x = self.unnormalize(self._ddim(noise, clip_denoised, False, options)[-1])
        return (x, noise) if return_noise else x

    @torch.no_grad()
    def sample(
        self, batch_size: int = 16, return_noise: bool = False, model_forward_kwargs: Mapping[str, Any] = NOTHING
    ) -> Any:
        """Sequences in [0, 1], by DDIM where sampling_timesteps < T, else by all T steps.

        Args, returns: see `p_sample_loop`; the shape is [batch_size, C, N], or [batch_size, N, C].
        """
        rest = (self.channels, self.seq_length) if self.channel_first else (self.seq_length, self.channels)
        loop = self.ddim_sample if self.is_ddim_sampling else self.p_sample_loop
        return loop((batch_size, *rest), return_noise=return_noise, model_forward_kwargs=model_forward_kwargs)

    @torch.no_grad()
    def interpolate(
        self, x1: Tensor, x2: Tensor, t: int | None = None, lam: float = 0.5, *, corrected: bool = False
    ) -> Tensor:
        """Sequences between two sequences, see `GaussianDiffusion.interpolate`."""
        return self._between(x1, x2, t, lam, corrected)

    def p_losses(
        self,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        model_forward_kwargs: Mapping[str, Any] = NOTHING,
        return_reduced_loss: bool = True,
        loss_reduction: str = "mean",
    ) -> Tensor:
        """Weighted squared error of what the network predicts.

        Args:
            x_start: data [B, ...] in [-1, 1]. t: int64 [B]. noise: eps; None draws it.
            model_forward_kwargs: passed to the network.
            return_reduced_loss: False returns the error of each element.
            loss_reduction: "mean", or "none" for one loss a sequence.

        Returns: [], [B], or as x_start.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        x, target = self._noised_with_target(x_start, t, noise)
        x_self_cond = None
        if self.self_condition and random.random() < 0.5:  # Chen et al. 2022, section 3.2
            with torch.no_grad():
                x_self_cond = self.model_predictions(x, t, model_forward_kwargs=model_forward_kwargs).pred_x_start
        out = self._network(x, t, x_self_cond, model_forward_kwargs)
        if not return_reduced_loss:
            return (out - target).square() * self._at(self.loss_weight, t, target)
        return self._loss(out, target, t, loss_reduction)

    def forward(
        self, img: Tensor, *args: Any, times: Tensor | None = None, loss_reduction: str = "mean", **kwargs: Any
    ) -> Tensor:
        """The training loss.

        Args:
            img: data [B, C, N], or [B, N, C] unless channel_first; in [0, 1] with auto_normalize.
            times: int64 [B]; None draws them.
            loss_reduction, *args, **kwargs: of `p_losses`.

        Returns: see `p_losses`.

        Raises:
            ValueError: data of another length.
        """
        if img.shape[self.seq_index] != self.seq_length:
            raise ValueError(
                f"{type(self).__name__}: expected data of length {self.seq_length}, got {img.shape[self.seq_index]}; "
                "pad or cut them, or give seq_length"
            )
        times = self.random_times(len(img)) if times is None else times
        return self.p_losses(self.normalize(img), times, *args, **{"loss_reduction": loss_reduction, **kwargs})

    def _network(
        self, x: Tensor, t: Tensor, x_self_cond: Tensor | None, model_forward_kwargs: Mapping[str, Any] = NOTHING
    ) -> Tensor:
        condition = {} if x_self_cond is None else {"x_self_cond": x_self_cond}
        out: Tensor = self.model(x, t, **{**model_forward_kwargs, **condition})
        return out
