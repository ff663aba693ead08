"""DPMSolverMultistepScheduler: DPM-Solver and DPM-Solver++ as multistep methods (Lu et al. 2022a and b)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .configuration import configured
from .outputs import SchedulerOutput
from .scheduler import Generators, Scheduler, as_image, as_sample, counted_noise, randn, thresholded, together, update
from .tables import rows, without_overrun

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")
ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")
SIGMAS = ("use_karras_sigmas", "use_lu_lambdas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas")
LEARNED = ("learned", "learned_range")
FEW = 15
"""Steps below which lower_order_final has an effect."""
LAST_ABAR = 2.0**-24
"""abar_T in place of 0, so that the first sigma is finite."""


class DPMSolverMultistepScheduler(Scheduler):
    """DPM-Solver (Lu et al. 2022a) and DPM-Solver++ (2022b) of orders 1 to 3, with the interface of diffusers.

    With lambda = ln(alpha / sigma), h = lambda' - lambda, m the data prediction (++) or eps, D its divided differences:

        ++        x' = sigma' / sigma x + alpha' (1 - e^-h) m + B D_1 + E D_2
        (others)  x' = alpha' / alpha x - sigma' (e^h - 1) m + B D_1 + E D_2

    and with "sde-" the same of twice the step, and noise of the variance that is missing. A step knows its place from
    a counter that begins at the first call.

    What diffusers does that is open to question is done here, too:
        `add_noise` before `set_timesteps` takes the noise levels in the wrong order, that of T - 1 - t for t; where a
            timestep is there more than once, it takes the second; where it is not there, the last.
        A sampling that begins at a timestep that is there more than once begins at the second.
        `add_noise` in half precision rounds sigma and its square, which in float16 leaves nothing of a sigma above 255.
        Third order takes half of the second derivative, which leaves it of second; and E of "sde-dpmsolver++" has the
            wrong sign before a half, so that it does not vanish with h.
        lambda is made of float32 sigmas; timesteps of "leading" start well below T - 1.
    corrected=True takes the noise levels in their order and in float64, the first of equal timesteps, and a third order
    that is one.
    Not reproduced: a step between equal noise levels, as Karras' with "sigma_min" end with, gives NaN there in third
    order and with "heun", and nothing happens here; "trailing" with some numbers of steps visits t = -1; a learned
    variance is cut off after as many channels as the sample has, there always after 3; third order of "sde-dpmsolver",
    which has none there, is refused.

    Args:
        solver_order: 1, 2 or 3. algorithm_type: "dpmsolver++", "sde-dpmsolver++", "dpmsolver" or "sde-dpmsolver".
        solver_type: B of second order: "midpoint" or "heun".
        lower_order_final: the last two of less than 15 steps are of first and second order. euler_at_final: the last is
            of first order, as it always is with final_sigmas_type "zero"; the other is "sigma_min".
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, use_lu_lambdas, use_flow_sigmas, flow_shift: in
            place of equal steps in t. use_beta_sigmas needs scipy.
        lambda_min_clipped: visit no timestep with a smaller lambda. variance_type: "learned" or "learned_range", where
            the network's output has a second half, which is not used; any other has no effect.
        use_dynamic_shifting, time_shift_type: allow mu in `set_timesteps`.
        prediction_type: "epsilon", "sample", "v_prediction", or "flow_prediction" with ++. timestep_spacing:
            "linspace", "leading" or "trailing". The others are those of `DDPMScheduler`.

    Raises:
        ValueError: an option that is none of those, or two that exclude each other.
    """

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        solver_order: int = 2,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        final_sigmas_type: str = "zero",
        lambda_min_clipped: float = -math.inf,
        variance_type: str | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        *,
        corrected: bool = False,
    ) -> None:
        if algorithm_type == "deis":  # names of other multistep schedulers, whose configurations are taken
            self.register_to_config(algorithm_type="dpmsolver++")
        if solver_type in ("logrho", "bh1", "bh2"):
            self.register_to_config(solver_type="midpoint")
        self._check()
        self._make_tables(*SCHEDULES)
        if rescale_betas_zero_snr:
            self.alphas_cumprod[-1] = LAST_ABAR
        self.alpha_t = self.alphas_cumprod.sqrt()
        self.sigma_t = (1 - self.alphas_cumprod).sqrt()
        self.lambda_t = self.alpha_t.log() - self.sigma_t.log()
        self.sigmas = self._sigmas_of_training(torch.float32)
        self.num_inference_steps = None
        self._flow_shift = flow_shift
        self._visit(torch.arange(len(self) - 1, -1, -1, dtype=torch.float32), None)

    def _check(self) -> None:
        """Refuse what is unknown, and what does not go together."""
        config = self.config
        self._expect("prediction_type", *PREDICTIONS)
        self._expect("algorithm_type", *ALGORITHMS)
        self._expect("solver_type", "midpoint", "heun")
        self._expect("solver_order", 1, 2, 3)
        self._expect("final_sigmas_type", "zero", "sigma_min")
        self._expect("time_shift_type", "exponential")
        of_data = config.algorithm_type.endswith("++")
        used = [name for name in SIGMAS if config[name]]
        conflicts = {
            f"final_sigmas_type='sigma_min' with algorithm_type={config.algorithm_type!r}, got 'zero'": (
                not of_data and config.final_sigmas_type == "zero"
            ),
            f"algorithm_type 'dpmsolver++' with prediction_type='flow_prediction', got {config.algorithm_type!r}": (
                not of_data and config.prediction_type == "flow_prediction"
            ),
            "solver_order <= 2 with algorithm_type='sde-dpmsolver', got 3": (
                config.algorithm_type == "sde-dpmsolver" and config.solver_order == 3
            ),
            f"at most one way to choose sigmas, got {' and '.join(used)}": len(used) > 1,
        }
        for what, there in conflicts.items():
            if there:
                raise ValueError(f"DPMSolverMultistepScheduler: expected {what}; change one of them")

    def _sigmas_of_training(self, dtype: torch.dtype) -> Tensor:
        """sigma / alpha of all T timesteps."""
        abar = self.alphas_cumprod.cpu()
        if self._schedule is not None:
            abar = self._schedule.alphas_cumprod.clamp(min=LAST_ABAR if self.config.rescale_betas_zero_snr else 0)
        return (((1 - abar) / abar) ** 0.5).to(dtype)

    # ---- timesteps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        mu: float | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Choose the timesteps to visit, and with them the noise levels `sigmas`.

        Args:
            num_inference_steps: N >= 1. device: where ``timesteps`` shall be; the CPU when None.
            mu: the shift of flow sigmas is e^mu from here on; needs use_dynamic_shifting.
            timesteps: in [0, T), in place of N; not where the configuration says how to choose sigmas.

        Raises:
            ValueError: both or neither, or what the configuration excludes. ImportError: beta sigmas without scipy.
        """
        op = "DPMSolverMultistepScheduler.set_timesteps"
        config = self.config
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(
                f"{op}: expected num_inference_steps or timesteps, got {'neither' if timesteps is None else 'both'}; "
                "pass one of them"
            )
        if mu is not None:
            if not config.use_dynamic_shifting:
                raise ValueError(f"{op}: expected use_dynamic_shifting with mu, got False; leave out mu")
            self._flow_shift = math.exp(mu)
        used = next((name for name in SIGMAS if config[name]), None)
        if timesteps is not None and used is not None:
            raise ValueError(f"{op}: expected no timesteps with {used}, got both; pass num_inference_steps")
        if num_inference_steps is not None and num_inference_steps < 1:
            raise ValueError(f"{op}: expected num_inference_steps >= 1, got {num_inference_steps}; 20 is usual")

        of_training = self._sigmas_of_training(torch.float64 if self._corrected else torch.float32).numpy()
        if used is not None:
            assert num_inference_steps is not None
            sigmas, places = self._chosen(used, of_training, num_inference_steps)
        else:
            places = np.array(timesteps) if num_inference_steps is None else self._spaced(num_inference_steps)
            if len(places) < 1 or places.min() < 0 or places.max() >= len(self):
                raise ValueError(
                    f"{op}: expected timesteps in [0, {len(self)}), got {places.tolist()}; "
                    "check steps_offset, or take fewer steps"
                )
            sigmas = of_training[places.astype(np.int64)].astype(np.float64)
        last = 0.0 if config.final_sigmas_type == "zero" else float(of_training[0])
        self._levels = torch.from_numpy(np.append(sigmas, last))
        self.sigmas = self._levels.float()
        if not self._corrected:
            self._levels = self.sigmas.double()
        self._visit(torch.from_numpy(places.astype(np.int64)), device)
        self.num_inference_steps = len(places)

    def _spaced(self, num_steps: int) -> Any:
        """Equal steps in t, down from the first whose lambda is not below lambda_min_clipped."""
        ascending = self.lambda_t.cpu().flip(0)
        end = len(self) - int(torch.searchsorted(ascending, float(self.config.lambda_min_clipped)))
        if self.config.timestep_spacing == "linspace":
            return np.linspace(0, end - 1, num_steps + 1).round()[:0:-1].astype(np.int64)
        if self.config.timestep_spacing == "leading":
            return np.arange(num_steps, 0, -1) * (end // (num_steps + 1)) + int(self.config.steps_offset)
        return without_overrun(np.arange(end, 0, -len(self) / num_steps))

    def _chosen(self, how: str, of_training: np.ndarray, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Sigmas, descending, by one of the ways to choose them, and the timesteps that have them."""
        if how == "use_flow_sigmas":
            share = 1 - np.linspace(1, 1 / len(self), num_steps + 1)
            sigmas = (self._flow_shift * share / (1 + (self._flow_shift - 1) * share))[:0:-1].copy()
            return sigmas, sigmas * len(self)
        log_sigmas = np.log(of_training)
        low, high = self.config.get("sigma_min"), self.config.get("sigma_max")
        low = float(of_training[0]) if low is None else low
        high = float(of_training[-1]) if high is None else high
        ramp = np.linspace(0, 1, num_steps)
        if how == "use_karras_sigmas":  # Karras et al. 2022, eq. 5
            sigmas = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
        elif how == "use_lu_lambdas":
            first, last = float(log_sigmas[-1]), float(log_sigmas[0])
            sigmas = np.exp(first + ramp * (last - first))
        elif how == "use_exponential_sigmas":
            sigmas = np.exp(np.linspace(math.log(high), math.log(low), num_steps))
        else:
            sigmas = low + _quantiles_of_beta(1 - ramp) * (high - low)
        places = _interpolated(np.log(np.maximum(sigmas, 1e-10)), log_sigmas)
        rounds = how in ("use_karras_sigmas", "use_lu_lambdas") and self.config.beta_schedule != "squaredcos_cap_v2"
        return sigmas, places.round() if rounds else places

    def _forget(self) -> None:
        self.model_outputs: list[Tensor | None] = [None] * int(self.config.solver_order)
        self.lower_order_nums = 0
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._tables: dict[torch.device, Tensor] = {}
        self._noising: dict[Any, Tensor] = {}

    @property
    def step_index(self) -> int | None:
        """The place of the next step, None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Where a sampling begins, None to ask the timestep of its first step."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say where a sampling begins: pipelines do, that start from an image."""
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: Tensor | float, schedule_timesteps: Tensor | None = None) -> int:
        """The place of a timestep: the second where there are two (the first when corrected), the last for none."""
        visited = self._visited if schedule_timesteps is None else schedule_timesteps.tolist()
        t = self._host(timestep)
        t = int(timestep) if t is None else t  # the one thing that is read from a device, and not an element of ours
        places = [i for i, value in enumerate(visited) if value == t]
        if not places:
            return len(visited) - 1
        return places[0] if self._corrected or len(places) == 1 else places[1]

    # ---- a step

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """From x at one timestep to x at the next, in one kernel.

        Args:
            model_output: of the network [B, C, ...], or [B, 2C, ...] with variance_type.
            timestep: t, looked at in the first step alone, and there not on a device where it is an element of
                ``timesteps``.
            sample: x [B, C, ...], of any number of dimensions.
            generator: one, one for each sample, or None for torch's own; noise is drawn by "sde-" alone, in float32.
            variance_noise: z [B, C, ...], in place of a generator.
            return_dict: False returns a tuple of one.

        Returns: prev_sample [B, C, ...].

        Raises:
            ValueError: `set_timesteps` was not called, or all its steps have been made; shapes that do not fit.

        Numerics: float32 (float64 for float64), rounded once; no host sync. Differentiable. Third order of "sde-" takes
        one op more.
        """
        op = "DPMSolverMultistepScheduler.step"
        if self.num_inference_steps is None:
            raise ValueError(f"{op}: expected set_timesteps to have been called, got no number of steps; call it first")
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        i = self._step_index
        if i >= self.num_inference_steps:
            raise ValueError(
                f"{op}: expected at most {self.num_inference_steps} steps, got another; call set_timesteps again"
            )
        if self.config.variance_type in LEARNED and self.config.prediction_type == "epsilon":
            model_output = model_output[:, : sample.shape[1]]
        if model_output.shape != sample.shape:
            raise ValueError(
                f"{op}: expected model_output of shape {list(sample.shape)}, that of the sample, got "
                f"{list(model_output.shape)}; set variance_type where the network learns the variance"
            )
        x, out = together(sample, model_output)
        table = self._table(x.device)
        if self.config.thresholding:
            out = self._thresholded(x, out, i)
        order = self._order(i)
        previous, earlier = (as_image_or_none(self._output(age)) for age in (1, 2))
        noise = self._noise_of_step(order, i, x, model_output, generator, variance_noise, earlier)
        row = (order - 1) * self.num_inference_steps + i
        x_next, m = update(x, out, table, row, pred_prev=previous if order > 1 else None, **noise)
        self.model_outputs = [*self.model_outputs[1:], as_sample(m, sample)]
        self.lower_order_nums = min(self.lower_order_nums + 1, int(self.config.solver_order))
        self._step_index += 1
        x_next = as_sample(x_next, sample)
        return SchedulerOutput(x_next) if return_dict else (x_next,)

    def _order(self, i: int) -> int:
        """Of step i: as many outputs as there are, fewer at the end."""
        config, count = self.config, len(self._visited)
        few = config.lower_order_final and count < FEW
        if i == count - 1 and (config.euler_at_final or few or config.final_sigmas_type == "zero"):
            return 1
        order = min(int(config.solver_order), self.lower_order_nums + 1)
        return min(order, 2) if i == count - 2 and few else order

    def _output(self, age: int) -> Tensor | None:
        """m of the step so many before this."""
        return self.model_outputs[-age] if age <= len(self.model_outputs) else None

    def _noise_of_step(
        self,
        order: int,
        i: int,
        x: Tensor,
        model_output: Tensor,
        generator: Generators,
        variance_noise: Tensor | None,
        earlier: Tensor | None,
    ) -> dict[str, Any]:
        """What the kernel adds by k5: the noise, the output before the previous one, or both, weighted."""
        random = self.config.algorithm_type.startswith("sde")
        if order < 3 and not random:
            return {}
        if order == 3 and not random:
            return {"noise": earlier}
        if variance_noise is not None:
            noise: dict[str, Any] = {"noise": as_image(variance_noise.to(x.device, torch.float32))}
        elif self.noise_seed is None:
            noise = {"noise": as_image(randn(model_output.shape, torch.float32, x.device, generator))}
        else:
            noise = {"seed": self.noise_seed, "sample": self._images(len(x), x.device)}
        if order < 3:
            return noise
        assert earlier is not None
        z = noise.get("noise")
        if z is None:
            z = counted_noise(x, noise["seed"], noise["sample"], 2 * len(self._visited) + i)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return {"noise": z.to(dtype).add(earlier.to(dtype), alpha=self._of_earlier[i])}

    def _thresholded(self, x: Tensor, out: Tensor, i: int) -> Tensor:
        """m, by way of the predicted image (or of the one that the predicted noise stands for), thresholded."""
        a, b, c, d = self._by_image[i]
        dtype = torch.promote_types(x.dtype, torch.float32)
        state = x.to(dtype)
        pred = thresholded(
            a * state + b * out.to(dtype), self.config.dynamic_thresholding_ratio, self.config.sample_max_value
        )
        return c * state + d * pred

    def _table(self, device: torch.device) -> Tensor:
        """The coefficients of all steps on a device: those of first order, of second, of third."""
        host = torch.device("cpu")
        if device not in self._tables:
            with torch.inference_mode(False):  # it lasts longer than the block it is first needed in
                if host not in self._tables:
                    self._tables[host] = self._make_table()
                self._tables[device] = self._tables[host].to(device, non_blocking=True)
        return self._tables[device]

    def _make_table(self) -> Tensor:
        """[3 N, 9], and what a step needs beside it."""
        config, sigmas = self.config, self._levels
        alpha = 1 - sigmas if config.use_flow_sigmas else 1 / (sigmas**2 + 1).sqrt()
        sigma = sigmas if config.use_flow_sigmas else sigmas * alpha
        k0, k1, self._by_image = self._predictions(alpha[:-1], sigma[:-1], sigmas[:-1])
        lam = alpha.log() - sigma.log()
        h = lam.diff()
        a, of_x, of_noise, b, e = _update_of(config.algorithm_type, alpha, sigma, h)
        if self._corrected:
            e = 2 * e  # the second difference times two is the second derivative
        elif config.algorithm_type == "sde-dpmsolver++":
            e = e - alpha[1:]  # minus a half, where it should be plus
        zero = torch.zeros_like(h)
        none = torch.full_like(h[:2], torch.nan)
        h1 = torch.cat([none[:1], h])[: len(h)]  # of the step before
        h2 = torch.cat([none, h])[: len(h)]
        # D_1 = h / h1 (m - m1) of second order; B is half of a at the midpoint
        second = (0.5 * a if config.solver_type == "midpoint" else b) * h / h1
        # D_1 = D + w (D - D'), D_2 = (D - D') h / (h1 + h2), D = h / h1 (m - m1), D' = h / h2 (m1 - m2)
        w, u = h1 / (h1 + h2), h / (h1 + h2)
        recent, older = (b * (1 + w) + e * u) * h / h1, -(b * w + e * u) * h / h2
        earlier = -older  # the weight of m2
        random = config.algorithm_type.startswith("sde")
        self._of_earlier = (earlier / of_noise).tolist()
        of_each = [
            rows(k0, k1, a, of_x, zero, of_noise, zero),
            rows(k0, k1, a + second, of_x, -second, of_noise, zero),
            rows(k0, k1, a + recent, of_x, older - recent, of_noise if random else earlier, zero),
        ]
        return torch.cat(of_each)

    def _predictions(self, alpha: Tensor, sigma: Tensor, raw: Tensor) -> tuple[Tensor, Tensor, list[list[float]]]:
        """k0 and k1 of m = k0 x + k1 out; for thresholds x_0 = a x + b out and m = c x + d x_0, [N, 4]."""
        prediction, one, zero = self.config.prediction_type, torch.ones_like(alpha), torch.zeros_like(alpha)
        image = {
            "epsilon": (1 / alpha, -sigma / alpha),
            "sample": (zero, one),
            "v_prediction": (alpha, -sigma),
            "flow_prediction": (one, -raw),
        }[prediction]
        if self.config.algorithm_type.endswith("++"):
            k0, k1 = image
            from_image = zero, one
        else:
            from_image = 1 / sigma, -alpha / sigma
            k0, k1 = {"epsilon": (zero, one), "sample": from_image, "v_prediction": (sigma, alpha)}[prediction]
            image = (1 - sigma * k0) / alpha, -sigma * k1 / alpha  # which flow sigmas make another than v's
        by_image = torch.stack([*image, *from_image], dim=1).tolist()
        return (zero, one, by_image) if self.config.thresholding else (k0, k1, by_image)

    # ---- noising

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x_0 + sigma eps at the noise levels of `sigmas`, in one kernel.

        Args:
            original_samples: x_0 [B, ...]. noise: eps [B, ...].
            timesteps: int [B], or one for all; where a sampling begins (`set_begin_index`) or has come, it is that
                place whatever they say.

        Returns: [B, ...] in the dtype of both.

        Raises:
            TypeError: timesteps that are no tensor.

        Numerics: float32, rounded once, from noise levels rounded to the dtype of original_samples unless corrected.
        """
        if not isinstance(timesteps, Tensor):
            raise TypeError(
                f"DPMSolverMultistepScheduler.add_noise: expected timesteps to be a tensor, got "
                f"{type(timesteps).__name__}; use torch.tensor([...])"
            )
        if self._begin_index is None:
            return self._noised(original_samples, noise, timesteps.clamp(0, len(self) - 1), self._by_timestep)
        place = self._begin_index if self._step_index is None else self._step_index
        places = torch.full((1,), place, device=original_samples.device)
        return self._noised(original_samples, noise, places, self._by_place)

    def _by_place(self, dtype: torch.dtype) -> Tensor:
        """alpha and sigma at each place of ``sigmas``."""
        sigma = self.sigmas.cpu().to(dtype)
        if self._corrected and self.num_inference_steps is None:
            sigma = self._sigmas_of_training(torch.float64).flip(0)
        elif self._corrected:
            sigma = self._levels
        if self.config.use_flow_sigmas:
            return torch.stack([1 - sigma, sigma], dim=1).to(torch.float64)
        alpha = 1 / ((sigma**2 + 1) ** 0.5)
        return torch.stack([alpha, sigma * alpha], dim=1).to(torch.float64)

    def _by_timestep(self, dtype: torch.dtype) -> Tensor:
        """The same for each of the T timesteps."""
        places: dict[int, list[int]] = {}
        for i, t in enumerate(self._visited):
            places.setdefault(int(t), []).append(i)
        at = 0 if self._corrected else 1
        found = [places.get(t, [len(self._visited) - 1]) for t in range(len(self))]
        return self._by_place(dtype)[[place[min(at, len(place) - 1)] for place in found]]


def as_image_or_none(x: Tensor | None) -> Tensor | None:
    """`as_image` of what may be missing."""
    return None if x is None else as_image(x)


def _update_of(
    algorithm: str, alpha: Tensor, sigma: Tensor, h: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weights of m, x and z, and B and E of D_1 and D_2, from each noise level to the next: float64 [N] each.

    They are the integrals of 1, u and u^2 / 2 against e^u over the step (Lu et al. 2022a, eq. 3.4; 2022b, eq. 9).
    """
    first, phi1, phi2 = torch.expm1, _phi1, _phi2
    alpha_next, sigma_next = alpha[1:], sigma[1:]
    zero = torch.zeros_like(h)
    if algorithm == "dpmsolver++":
        scale, step = -alpha_next, -h
        return scale * first(step), sigma_next / sigma[:-1], zero, -scale * phi1(step), scale * phi2(step)
    if algorithm == "sde-dpmsolver++":
        scale, step = -alpha_next, -2 * h
        of_x = sigma_next / sigma[:-1] * torch.exp(-h)
        noise = sigma_next * (-first(step)).sqrt()
        return scale * first(step), of_x, noise, -scale * phi1(step), scale * phi2(step)
    scale, twice = -sigma_next, 2.0 if algorithm == "sde-dpmsolver" else 1.0
    of_x = alpha_next / alpha[:-1]
    noise = sigma_next * first(2 * h).sqrt() if twice == 2 else zero
    return twice * scale * first(h), of_x, noise, twice * scale * -phi1(h), twice * scale * phi2(h)


def _phi1(u: Tensor) -> Tensor:
    """1 - (e^u - 1) / u, 0 at 0."""
    return torch.where(u == 0, 0, 1 - torch.expm1(u) / u)


def _phi2(u: Tensor) -> Tensor:
    """(e^u - 1 - u) / u^2 - 1/2, 0 at 0."""
    return torch.where(u == 0, 0, (torch.expm1(u) - u) / u**2 - 0.5)


def _interpolated(log_sigma: np.ndarray, log_sigmas: np.ndarray) -> np.ndarray:
    """Where in log_sigmas each log_sigma lies, as a fraction of an index.

    They ascend, but for the last one of a schedule with zero terminal SNR: below is the last that is not larger.
    """
    not_larger = log_sigmas[None] <= log_sigma[:, None]
    below = np.minimum((not_larger * np.arange(len(log_sigmas))).max(axis=1), len(log_sigmas) - 2)
    low, high = log_sigmas[below], log_sigmas[below + 1]
    share = np.clip((low - log_sigma) / (low - high), 0, 1)
    return np.asarray((1 - share) * below + share * (below + 1))


def _quantiles_of_beta(p: np.ndarray) -> np.ndarray:
    """Of the beta distribution with both parameters 0.6."""
    try:
        from scipy.stats import beta
    except ImportError as error:
        raise ImportError(
            "DPMSolverMultistepScheduler: expected scipy for use_beta_sigmas, got none; pip install scipy"
        ) from error
    return np.asarray(beta.ppf(p, 0.6, 0.6))
