"""DDPMScheduler: ancestral sampling (Ho et al. 2020), and the noising of training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...sampling import ddpm_table
from .configuration import configured
from .outputs import SampleAndPrediction
from .scheduler import BetaScheduler, Generators, as_image, as_sample, together
from .tables import BETAS, LEAST_VARIANCE, PREDICTIONS, Transitions, rows, x0_columns

VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")
DEFAULT = "fixed_small"
LEARNED = ("learned", "learned_range")


@dataclass(eq=False)
class DDPMSchedulerOutput(SampleAndPrediction):
    """prev_sample, x at the next timestep visited, and pred_original_sample, x_0 as predicted, clipped: [B, ...]."""


class DDPMScheduler(BetaScheduler):
    """Ancestral sampling (Ho et al. 2020, algorithm 2), with the interface of diffusers.

    x' = s' beta / (1 - abar) pred + sqrt(alpha) (1 - abar') / (1 - abar) x + std z, with alpha = abar / abar'. After
    timestep t comes the one that follows it in the list; after the last, the clean image. Before `set_timesteps` it is
    t - 1.

    What diffusers does that is open to question is done here, too:
        variance_type "learned" takes the network's output for a variance, where Nichol and Dhariwal 2021 have its
            logarithm; "fixed_large_log" would take the root of a logarithm, which is NaN, and is refused.
        timestep_spacing "leading", the default, starts below T - 1, though a sampling starts from pure noise.
        With "trailing" and "fixed_large" noise is added in the last step.
        A prediction of noise where abar = 0 (rescale_betas_zero_snr) says nothing about the image; clipped, it is
            taken for its sign. Without clipping it is refused.
        `add_noise` in half precision, see there; tables are float32.
    corrected=True takes ours instead: `fastddpm.sampling.ddpm_table`. There "learned" is a log-variance,
    "fixed_large_log" and "fixed_small_log" are what they are called after, the last step adds no noise, tables are
    float64, and the spacing is "trailing" unless one is given. Not reproduced: "trailing" with some numbers of steps
    visits t = -1 at last.

    Args:
        num_train_timesteps: T. beta_start, beta_end, beta_schedule: "linear", "scaled_linear", "squaredcos_cap_v2",
            "sigmoid" or "laplace". trained_betas: [T], in place of these.
        variance_type: std^2: "fixed_small" (also "fixed_small_log" and None), "fixed_large", "learned" or
            "learned_range".
        clip_sample, clip_sample_range: clamp the predicted image. prediction_type: "epsilon", "sample" or
            "v_prediction".
        thresholding, dynamic_thresholding_ratio, sample_max_value: in place of clipping, see
            `fastddpm.sampling.dynamic_threshold`.
        timestep_spacing: "leading", "trailing" or "linspace"; steps_offset: added to the timesteps of "leading".
        rescale_betas_zero_snr: make abar_T = 0 (Lin et al. 2023).
        corrected: see above; in the configuration only where it is True.

    Raises:
        ValueError: an option that is none of those.
    """

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        *,
        corrected: bool = False,
    ) -> None:
        self._start(*BETAS)
        self._expect("variance_type", *VARIANCES, None)
        self.one = torch.tensor(1.0)
        self.custom_timesteps = False
        self.variance_type = variance_type

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Choose the timesteps to visit: so many, or these.

        Args:
            num_inference_steps: N in [1, T]. device: where ``timesteps`` shall be; the CPU when None.
            timesteps: strictly descending, in [0, T), in place of N.

        Raises:
            ValueError: both or neither, or what is out of range or order.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(
                "DDPMScheduler.set_timesteps: expected num_inference_steps or timesteps, got "
                f"{'neither' if timesteps is None else 'both'}; pass one of them"
            )
        if timesteps is None:
            assert num_inference_steps is not None
            self._space(num_inference_steps, device)
        else:
            steps = np.asarray(timesteps, dtype=np.int64)
            if len(steps) < 1 or (np.diff(steps) >= 0).any() or steps[0] >= len(self) or steps[-1] < 0:
                raise ValueError(
                    f"DDPMScheduler.set_timesteps: expected timesteps to descend strictly in [0, {len(self)}), "
                    f"got {list(timesteps)}; sort them"
                )
            self._visit(torch.from_numpy(steps), device)
        self.custom_timesteps = timesteps is not None

    def previous_timestep(self, timestep: Tensor | int) -> Tensor | int:
        """The timestep that follows in the list, -1 after the last; t - 1 before `set_timesteps`.

        Raises:
            ValueError: timestep is not in the list.
        """
        if not (self.custom_timesteps or self.num_inference_steps):
            return timestep - 1
        t = self._host(timestep)
        t = int(timestep) if t is None else t
        if t not in self._visited:
            raise ValueError(
                f"DDPMScheduler.previous_timestep: expected one of the timesteps that set_timesteps chose, got {t}; "
                "iterate over scheduler.timesteps"
            )
        following = self._visited.index(t) + 1
        return self.timesteps[following] if following < len(self._visited) else torch.tensor(-1)

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """From x at one timestep to x at the next, in one kernel.

        Args:
            model_output: of the network [B, C, ...], or [B, 2C, ...] with a learned variance.
            timestep: t, a number, or an element of ``timesteps``, wherever that is: it is not read from a device.
            sample: x [B, C, ...], of any number of dimensions.
            generator: one, one for each sample, or None for torch's own. Noise is drawn where t > 0, in the dtype of
                model_output; where t is a tensor on a device and no element of ``timesteps``, for t = 0 too.
            return_dict: False returns a pair.

        Returns: prev_sample and pred_original_sample, [B, C, ...].

        Raises:
            ValueError: t is not in the list; shapes that do not fit; what the class refuses.

        Numerics: float32 (float64 for float64), rounded once; no host sync. Differentiable.
        """
        t = self._host(timestep)
        table, row = self._rows().at(timestep if t is None else t, sample.device)
        self._check_channels(model_output, sample)
        noise = {}
        if t is None or t > 0:
            noise = self._noise(sample.shape, model_output.dtype, model_output, generator)
        x, out = together(sample, model_output)
        if self.config.variance_type == "learned" and not self._corrected:
            # the bounds of the log-variance are -1 and 1, so what the kernel takes is its logarithm
            mean, variance = out.to(torch.promote_types(out.dtype, torch.float32)).chunk(2, dim=1)
            out = as_image(torch.cat([mean, variance.log()], dim=1))
        x_next, pred = self._updated(x, out, table, row, noise)
        x_next, pred = as_sample(x_next, sample), as_sample(pred, sample)
        return DDPMSchedulerOutput(x_next, pred) if return_dict else (x_next, pred)

    def _check_channels(self, model_output: Tensor, sample: Tensor) -> None:
        """Expect as many channels as the sample has, twice that where the network learns the variance."""
        factor = 2 if self.config.variance_type in LEARNED else 1
        expected = (*sample.shape[:1], *(factor * c for c in sample.shape[1:2]), *sample.shape[2:])
        if model_output.shape != expected:
            raise ValueError(
                f"DDPMScheduler.step: expected model_output of shape {list(expected)} for a sample of shape "
                f"{list(sample.shape)} and variance_type {self.config.variance_type!r}, got "
                f"{list(model_output.shape)}; use a network with as many output channels, or another variance_type"
            )

    def _make_rows(self, *options: Any) -> tuple[Tensor, Tensor]:
        """Of the timesteps that are visited: all T of them before `set_timesteps`."""
        variance, prediction = self.config.variance_type or DEFAULT, self.config.prediction_type
        steps = torch.tensor(self._visited)
        if self._schedule is not None:
            return ddpm_table(self._schedule, steps, PREDICTIONS[prediction], variance.removesuffix("_log")), steps
        if variance == "fixed_large_log":
            raise ValueError(
                "DDPMScheduler: expected variance_type not to be 'fixed_large_log', of which diffusers makes NaN; "
                "use 'fixed_large', or corrected=True"
            )
        abar = self.alphas_cumprod.cpu()
        a = Transitions.between(abar[steps], torch.cat([abar[steps[1:]], torch.ones(1)]))
        self._refuse_division_by_zero(a.abar, steps)
        adds = (steps > 0).double()  # by t, not by place: the last step of "trailing" adds noise
        small, large, zero = a.variance.clamp(min=LEAST_VARIANCE), a.beta, torch.zeros_like(a.beta)
        bounds = {"learned": (-adds, adds), "learned_range": (small.log(), large.log())}.get(variance, ())
        deviation = adds if bounds else adds * (large if variance == "fixed_large" else small).sqrt()
        of_pred = a.abar_next.sqrt() * a.beta / (1 - a.abar)
        of_x = a.alpha.sqrt() * (1 - a.abar_next) / (1 - a.abar)
        k0, k1 = x0_columns(prediction, a.abar)
        return rows(k0, k1, of_pred, of_x, zero, deviation, zero, *bounds), steps
