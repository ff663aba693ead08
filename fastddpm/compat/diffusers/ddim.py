"""DDIMScheduler: the samplers of Song et al. 2021."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...sampling import ddim_table
from .configuration import configured
from .outputs import SampleAndPrediction
from .scheduler import BetaScheduler, Generators, as_image, as_sample, together
from .tables import PREDICTIONS, Transitions, eps_columns, rows, x0_columns

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


@dataclass(eq=False)
class DDIMSchedulerOutput(SampleAndPrediction):
    """prev_sample, x at the next timestep, and pred_original_sample, x_0 as predicted, clipped: [B, ...] each."""


class DDIMScheduler(BetaScheduler):
    """The non-Markovian chains of Song et al. 2021 (DDIM, eq. 12 and 16), with the interface of diffusers.

    x' = s' pred + sqrt(1 - abar' - std^2) eps + std z,  std = eta sqrt((1 - abar') / (1 - abar) (1 - abar / abar')).

    What diffusers does that is open to question is done here, too:
        The next timestep is t - T // N whatever timesteps are visited, so with "linspace", and with a number of steps
            that does not divide T, a step arrives elsewhere than the next one starts; below 0 it is the clean image, or
            abar_0 with set_alpha_to_one=False.
        timestep_spacing "leading", the default, starts below T - 1, though a sampling starts from pure noise.
        eps is the network's, although the prediction it implies is clipped, unless use_clipped_model_output.
        A prediction of noise where abar = 0 (rescale_betas_zero_snr) says nothing about the image; clipped, it is
            taken for its sign. Without clipping it is refused.
        `add_noise` in half precision, see there; tables are float32.
    corrected=True takes ours instead: `fastddpm.sampling.ddim_table`. There a step arrives where the next one starts,
    the last at the clean image (set_alpha_to_one has no effect), tables are float64, and the spacing is "trailing"
    unless one is given. Not reproduced: "trailing" with some numbers of steps visits t = -1 at last; with
    eta = 1 where abar = 0, rounding may leave a negative number under the root, and NaN.

    Args:
        set_alpha_to_one: see above. beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2". The others are
            those of `DDPMScheduler`.

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
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        *,
        corrected: bool = False,
    ) -> None:
        self._start(*SCHEDULES)
        self.final_alpha_cumprod = torch.tensor(1.0) if set_alpha_to_one else self.alphas_cumprod[0]

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose the timesteps to visit.

        Args:
            num_inference_steps: N in [1, T]. device: where ``timesteps`` shall be; the CPU when None.

        Raises:
            ValueError: N out of range, or a steps_offset that leads out of it.
        """
        self._space(num_inference_steps, device)

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """From x at one timestep to x at the next, in one kernel.

        Args:
            model_output: of the network [B, ...].
            timestep: t in [0, T), a number, or an element of ``timesteps`` or another tensor [], which is not read from
                a device.
            sample: x [B, ...], of any number of dimensions.
            eta: 0 is deterministic, 1 the variance of the posterior.
            use_clipped_model_output: take eps from the prediction after its clipping.
            generator: one, one for each sample, or None for torch's own; noise is drawn where eta > 0, in the dtype of
                model_output.
            variance_noise: z [B, ...], in place of a generator.
            return_dict: False returns a pair.

        Returns: prev_sample and pred_original_sample, [B, ...].

        Raises:
            ValueError: `set_timesteps` was not called; a generator and variance_noise both; t out of range; shapes that
                do not fit; what the class refuses.

        Numerics: float32 (float64 for float64), rounded once; no host sync. Differentiable.
        """
        if self.num_inference_steps is None:
            raise ValueError(
                "DDIMScheduler.step: expected set_timesteps to have been called, got no number of steps; "
                "call scheduler.set_timesteps(50) first"
            )
        if model_output.shape != sample.shape:
            raise ValueError(
                f"DDIMScheduler.step: expected model_output of shape {list(sample.shape)}, that of the sample, got "
                f"{list(model_output.shape)}; cut off a learned variance with model_output[:, :channels]"
            )
        t = self._host(timestep)
        rows_of = self._rows(float(eta), bool(use_clipped_model_output))
        table, row = rows_of.at(timestep if t is None else t, sample.device)
        noise: dict[str, Any] = {}
        if eta > 0 and variance_noise is not None:
            if generator is not None:
                raise ValueError("DDIMScheduler.step: expected generator or variance_noise, got both; pass one of them")
            noise = {"noise": as_image(variance_noise)}
        elif eta > 0:
            noise = self._noise(sample.shape, model_output.dtype, model_output, generator)
        x_next, pred = self._updated(*together(sample, model_output), table, row, noise)
        x_next, pred = as_sample(x_next, sample), as_sample(pred, sample)
        return DDIMSchedulerOutput(x_next, pred) if return_dict else (x_next, pred)

    def _make_rows(self, *options: Any) -> tuple[Tensor, Tensor]:
        """Of all timesteps, since where a step arrives depends on t alone; corrected, of those that are visited."""
        eta, use_clipped = options
        prediction = self.config.prediction_type
        if self._schedule is not None:
            steps = torch.tensor(self._visited)
            return ddim_table(self._schedule, steps, PREDICTIONS[prediction], eta, use_clipped=use_clipped), steps
        assert self.num_inference_steps is not None
        steps = torch.arange(len(self))
        following = steps - len(self) // self.num_inference_steps
        abar, final = self.alphas_cumprod.cpu(), self.final_alpha_cumprod.cpu()
        a = Transitions.between(abar, torch.where(following >= 0, abar[following.clamp(min=0)], final))
        self._refuse_division_by_zero(a.abar[self._visited], torch.tensor(self._visited))
        deviation = eta * a.variance.sqrt()
        rest = 1 - a.abar_next - deviation.square()
        of_eps = (rest.clamp(min=0) if eta <= 1 else rest).sqrt()  # above 1 it may not be real, and then it is NaN
        signal_next, zero = a.abar_next.sqrt(), torch.zeros_like(a.beta)
        k0, k1 = x0_columns(prediction, a.abar)
        if use_clipped:
            of_x = of_eps / (1 - a.abar).sqrt()
            return rows(k0, k1, signal_next - of_x * a.abar.sqrt(), of_x, zero, deviation, zero), steps
        c, d = eps_columns(prediction, a.abar)
        return rows(k0, k1, signal_next, of_eps * c, zero, deviation, of_eps * d), steps
