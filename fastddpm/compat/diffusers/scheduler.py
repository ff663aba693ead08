"""What the three schedulers share: tensors as the kernels take them, noise in diffusers' order, timesteps without a
sync, and the noising of training."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..._checks import is_nhwc
from ...ops import normal, philox, q_sample, solver_step
from ...ops.q_sample import reference as q_sample_reference
from ...ops.solver_step import reference as solver_step_reference
from ...sampling.guidance import quantile_of_magnitude
from .configuration import NOT_GIVEN, Configured
from .tables import PREDICTIONS, Rows, make_betas, schedule_of, spaced

if TYPE_CHECKING:
    from typing_extensions import Self

# by whose names diffusers finds the classes that can take a scheduler's place
COMPATIBLES = [
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
    "DEISMultistepScheduler", "UniPCMultistepScheduler", "DPMSolverSDEScheduler", "EDMEulerScheduler",
]  # fmt: skip
_JOINED: dict[type[Any], type[Any]] = {}
Generators = torch.Generator | list[torch.Generator] | None


class Scheduler(Configured):
    """Base of the schedulers.

    Where diffusers has been imported, what a constructor makes is an instance of its SchedulerMixin as well: its
    pipelines then save it, and take it as an argument of from_pretrained.
    """

    order = 1
    _compatibles = COMPATIBLES
    init_noise_sigma = 1.0
    num_inference_steps: int | None
    noise_seed: int | None = None
    first_image: int = 0
    _numbers: Tensor | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        made: Self = object.__new__(_of_diffusers(cls))
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, (getattr(type(self), "_ours", type(self)),), self.__dict__

    def __len__(self) -> int:
        """T, the timesteps of training."""
        return int(self.config.num_train_timesteps)

    def set_noise_seed(self, seed: int | None, first_image: int = 0) -> Self:
        """Draw the noise of the steps from its counter, inside the kernel, in place of a generator: see `solver_step`.

        The noise then belongs to the image: number n of a seed has the same in any batch and on any device. The noise
        that a sampling starts from is the pipeline's own, or `fastddpm.sampling.initial_noise`.

        Args:
            seed: in [0, 2^64); None returns to generators.
            first_image: the number of the first image of a batch.

        Returns: self.
        """
        self.noise_seed, self.first_image, self._numbers = seed, first_image, None
        return self

    def scale_model_input(self, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The sample as it is: these schedulers keep its variance."""
        return sample

    # ---- configuration

    def _expect(self, name: str, *values: Any) -> None:
        """Refuse a value of the configuration that is none of these."""
        given = self.config[name]
        if given not in values:
            raise ValueError(
                f"{type(self).__name__}: expected {name} to be one of {', '.join(map(repr, values))}, got {given!r}; "
                "choose one of these"
            )

    def _make_tables(self, *schedules: str) -> None:
        """betas, alphas and alphas_cumprod, float32 [T]."""
        trained = self.config.trained_betas
        if trained is None:
            self._expect("beta_schedule", *schedules)
        elif len(trained) != len(self):
            raise ValueError(
                f"{type(self).__name__}: expected as many trained_betas as num_train_timesteps, {len(self)}, got "
                f"{len(trained)}; pass num_train_timesteps={len(trained)}"
            )
        self._expect("timestep_spacing", "linspace", "leading", "trailing")
        self._schedule = schedule_of(self.config) if self._corrected else None
        if self._schedule is None:
            self.betas = make_betas(self.config, torch.float32)
            self.alphas = 1 - self.betas
            self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        else:
            self.betas, self.alphas = self._schedule.betas.float(), self._schedule.alphas.float()
            self.alphas_cumprod = self._schedule.alphas_cumprod.float()
        self._noising: dict[Any, Tensor] = {}

    @property
    def _corrected(self) -> bool:
        return bool(self.config.get("corrected", False))

    # ---- timesteps

    @property
    def timesteps(self) -> Tensor:
        """Those that a sampling visits, descending, int64 [N]."""
        return self._timesteps

    @timesteps.setter
    def timesteps(self, timesteps: Tensor) -> None:
        self._visit(timesteps.cpu(), timesteps.device)

    def _visit(self, timesteps: Tensor, device: torch.device | str | None) -> None:
        """Take these timesteps, on the CPU, as those of the sampling, and keep a copy that needs no device."""
        self._visited: list[Any] = timesteps.tolist()
        self._timesteps = timesteps.to(device)
        self._forget()

    def _forget(self) -> None:
        """Drop what was made for other timesteps."""

    def _host(self, timestep: Tensor | float) -> int | None:
        """The value of a timestep, where it is known without waiting for a device; else None.

        An element of ``timesteps`` is: its place in that tensor's memory says which it is.
        """
        if not isinstance(timestep, Tensor):
            return int(timestep)
        if timestep.numel() != 1:
            raise ValueError(
                f"{type(self).__name__}.step: expected one timestep for the batch, got a tensor of shape "
                f"{list(timestep.shape)}; pass an element of scheduler.timesteps"
            )
        if timestep.device.type == "cpu":
            return int(timestep)
        own = self._timesteps
        if timestep.dtype == own.dtype and timestep.untyped_storage()._cdata == own.untyped_storage()._cdata:
            return int(self._visited[(timestep.storage_offset() - own.storage_offset()) // own.stride(0)])
        return None

    # ---- a step

    def _noise(self, shape: Any, dtype: torch.dtype, like: Tensor, generator: Generators) -> dict[str, Any]:
        """The noise of a step, as `solver_step` takes it."""
        if self.noise_seed is None:
            return {"noise": as_image(randn(shape, dtype, like.device, generator))}
        return {"seed": self.noise_seed, "sample": self._images(shape[0], like.device)}

    def _images(self, batch: int, device: torch.device) -> Tensor:
        """The numbers of the images of a batch."""
        if self._numbers is None or len(self._numbers) != batch or self._numbers.device != device:
            with torch.inference_mode(False):
                self._numbers = torch.arange(self.first_image, self.first_image + batch, device=device)
        return self._numbers

    # ---- noising

    def _noised(self, a: Tensor, b: Tensor, t: Tensor, table: Callable[[torch.dtype], Tensor]) -> Tensor:
        """table[t, 0] a + table[t, 1] b, with the table that belongs to a dtype."""
        dtype = torch.promote_types(a.dtype, b.dtype)
        key = table.__name__, a.dtype, a.device
        if key not in self._noising:
            with torch.inference_mode(False):
                self._noising[key] = table(a.dtype).to(a.device)
        x, z = as_image(a), as_image(b.expand_as(a))
        t = t.to(a.device, torch.int64).flatten().expand(len(x))
        options: dict[str, Any] = dict(pixel_scale=1.0, pixel_shift=0.0, noise=z, dtype=dtype)
        if wants_gradient(a, b):
            options.update(index=None, flip=None, seed=None, sample=None, step=None, returns="x_t")
            noised = q_sample_reference.forward(x, t, self._noising[key], **options)
        else:
            noised = q_sample(x, t, self._noising[key], **options)
        assert isinstance(noised, Tensor)
        return noised.reshape(a.shape)


class BetaScheduler(Scheduler):
    """What DDPMScheduler and DDIMScheduler share beyond that: timesteps, thresholds and training."""

    def _start(self, *schedules: str) -> None:
        """Check the configuration, and make tables and timesteps."""
        if self._corrected and "timestep_spacing" in self.config[NOT_GIVEN]:
            self.register_to_config(timestep_spacing="trailing")
        self._expect("prediction_type", *PREDICTIONS)
        self._make_tables(*schedules)
        self.num_inference_steps = None
        self._visit(torch.arange(len(self)).flip(0), None)

    def _space(self, num_inference_steps: int, device: torch.device | str | None) -> None:
        """Visit so many timesteps."""
        op = f"{type(self).__name__}.set_timesteps"
        if not 1 <= num_inference_steps <= len(self):
            raise ValueError(
                f"{op}: expected num_inference_steps in [1, {len(self)}], got {num_inference_steps}; "
                "the network was trained with that many timesteps"
            )
        steps = spaced(self.config.timestep_spacing, len(self), num_inference_steps, self.config.steps_offset)
        if steps[0] >= len(self) or steps[-1] < 0:
            raise ValueError(
                f"{op}: expected steps_offset to keep timesteps in [0, {len(self)}), got {self.config.steps_offset} "
                f"for {num_inference_steps} steps, from {steps[0]} to {steps[-1]}; take fewer steps or another offset"
            )
        self.num_inference_steps = num_inference_steps
        self._visit(torch.from_numpy(steps.copy()), device)

    def _forget(self) -> None:
        self._cached: tuple[Any, Rows] | None = None

    def _rows(self, *options: Any) -> Rows:
        """The coefficients for these options of a step; made anew where they or the timesteps change."""
        if self._cached is None or self._cached[0] != options:
            with torch.inference_mode(False):  # a table lasts longer than the block it is first needed in
                table, steps = self._make_rows(*options)
                if self.config.thresholding:  # the prediction then comes from outside, in the place of an earlier one
                    table = torch.cat([table[:, :2], table[:, 4:5], table[:, 3:4], table[:, 2:3], table[:, 5:]], dim=1)
                self._cached = options, Rows(table, steps, len(self))
        return self._cached[1]

    def _make_rows(self, *options: Any) -> tuple[Tensor, Tensor]:
        """The table [N, 9], and the timesteps [N] that its rows are for."""
        raise NotImplementedError

    def _refuse_division_by_zero(self, abar: Tensor, steps: Tensor) -> None:
        """A prediction of noise where there is nothing else: clipping takes its sign, without it there is no bound."""
        clips = self.config.clip_sample or self.config.thresholding
        if self.config.prediction_type == "epsilon" and not clips and (abar == 0).any():
            raise ValueError(
                f"{type(self).__name__}: expected rescale_betas_zero_snr with a prediction_type other than 'epsilon', "
                f"or clip_sample, got neither, and abar = 0 at timestep {int(steps[abar == 0][0])}: "
                "x_0 = (x - eps) / 0; use prediction_type='v_prediction'"
            )

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (Ho et al. 2020, eq. 4), in one kernel.

        Args:
            original_samples: x_0 [B, ...]. noise: eps [B, ...]. timesteps: int [B], or one for all, in [0, T).

        Returns: [B, ...] in the dtype of both.

        Raises:
            ValueError: timesteps on the CPU out of range. TypeError: timesteps that are no integers.

        Numerics: float32, rounded once. In half precision diffusers rounds abar to that dtype first, which leaves no
        noise at all at t = 0..9 in bfloat16, and that is reproduced unless ``corrected``.
        """
        return self._noised(original_samples, noise, self._checked("add_noise", timesteps), self._signal_sigma)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 (Salimans and Ho 2022). The rest is that of `add_noise`."""
        return self._noised(noise, sample, self._checked("get_velocity", timesteps), self._signal_minus_sigma)

    def _signal_sigma(self, dtype: torch.dtype) -> Tensor:
        if self._schedule is not None:
            return self._schedule.signal_sigma
        abar = self.alphas_cumprod.cpu().to(dtype).double()
        return torch.stack([abar.sqrt(), (1 - abar).sqrt()], dim=1)

    def _signal_minus_sigma(self, dtype: torch.dtype) -> Tensor:
        return self._signal_sigma(dtype) * torch.tensor([1.0, -1.0], dtype=torch.float64)

    def _checked(self, name: str, timesteps: Tensor) -> Tensor:
        op = f"{type(self).__name__}.{name}"
        if not isinstance(timesteps, Tensor) or timesteps.is_floating_point():
            kind = timesteps.dtype if isinstance(timesteps, Tensor) else type(timesteps).__name__
            raise TypeError(f"{op}: expected timesteps to be a tensor of integers, got {kind}; use torch.randint")
        if timesteps.device.type == "cpu" and timesteps.numel():
            low, high = (int(t) for t in timesteps.aminmax())
            if low < 0 or high >= len(self):
                raise ValueError(
                    f"{op}: expected timesteps in [0, {len(self)}), got {low} to {high}; "
                    "draw them with torch.randint(0, scheduler.config.num_train_timesteps, ...)"
                )
        return timesteps

    def _clamp(self) -> float | None:
        """Bound of the predicted image, where it is clipped."""
        return float(self.config.clip_sample_range) if self.config.clip_sample else None

    def _updated(
        self, x: Tensor, out: Tensor, table: Tensor, row: Tensor | int, noise: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """x' and the predicted x_0 by one row of the table, in the dtype of x; images in and out."""
        if not self.config.thresholding:
            x_next, pred = update(x, out, table, row, clamp=self._clamp(), **noise)
        else:
            _, pred = update(x.float() if x.dtype.itemsize < 4 else x, out, table, row)
            pred = thresholded(pred, self.config.dynamic_thresholding_ratio, self.config.sample_max_value)
            x_next, _ = update(x, out, table, row, pred_prev=pred, **noise)
            pred = pred.to(x.dtype)
        return x_next, pred


def thresholded(pred: Tensor, ratio: float, most: float) -> Tensor:
    """clamp(pred, -s, s) / s, s that quantile of each |pred|, in [1, most] (Saharia et al. 2022, section 2.3)."""
    s = quantile_of_magnitude(pred, ratio).clamp(min=1).clamp(max=most).reshape(-1, 1, 1, 1)
    return pred.clamp(-s, s) / s


def update(x: Tensor, out: Tensor, table: Tensor, row: Tensor | int, **options: Any) -> tuple[Tensor, Tensor]:
    """`solver_step`, or its reference, which torch differentiates, where a gradient is wanted."""
    if not wants_gradient(x, out, options.get("pred_prev"), options.get("noise")):
        return solver_step(x, out, table, row, **options)
    default: dict[str, Any] = dict.fromkeys(
        ("pred_prev", "out_uncond", "clamp", "noise", "seed", "sample", "mask", "known", "known_table", "known_noise")
    )
    return solver_step_reference.forward(
        x, out, table, row, **{**default, "guidance_scale": 1.0, "inplace": False, **options}
    )


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether what is computed of these shall be differentiated."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def as_image(x: Tensor) -> Tensor:
    """[B, ...] of any number of dimensions as [B, C, H, W], dense; a copy only where it is not dense."""
    if x.dim() == 4:
        return x if x.is_contiguous() or is_nhwc(x) else x.contiguous()
    shape = (*x.shape, *[1] * (4 - x.dim())) if x.dim() < 4 else (*x.shape[:2], -1, 1)
    return x.reshape(shape).contiguous()


def as_sample(x: Tensor, sample: Tensor) -> Tensor:
    """An image in the shape of the sample that it came of."""
    return x if x.shape == sample.shape else x.reshape(sample.shape)


def together(sample: Tensor, model_output: Tensor) -> tuple[Tensor, Tensor]:
    """Both as images; the sample, and so what comes of it, in the dtype that torch gives to their sum."""
    dtype = torch.promote_types(sample.dtype, model_output.dtype)
    return as_image(sample.to(dtype)), as_image(model_output)


def randn(shape: Any, dtype: torch.dtype, device: torch.device, generator: Generators) -> Tensor:
    """Normal numbers in the order of diffusers: a generator for the batch, or one for each sample of it.

    Generators of the CPU draw there whatever the device, so that a seed gives the same numbers on each.

    Raises:
        ValueError: fewer generators than samples, or one of another device.
    """
    if isinstance(generator, list | tuple) and len(generator) == 1:
        generator = generator[0]
    each = list(generator) if isinstance(generator, list | tuple) else None
    one = each[0] if each else generator if isinstance(generator, torch.Generator) else None
    source = device if one is None else one.device
    if source.type not in (device.type, "cpu"):
        raise ValueError(
            f"step: expected a generator on the CPU or on {device}, got one on {source}; "
            f"make it with torch.Generator({device.type!r})"
        )
    if source.type == device.type:
        source = device
    pinned = source != device and device.type == "cuda"  # or the copy would wait for all that was launched before
    if each is None:
        drawn = torch.randn(tuple(shape), generator=one, dtype=dtype, device=source, pin_memory=pinned)
        return drawn.to(device, non_blocking=True)
    if len(each) < shape[0]:
        raise ValueError(
            f"step: expected a generator for each of {shape[0]} samples, got {len(each)}; pass as many, or one for all"
        )
    drawn = torch.empty(tuple(shape), dtype=dtype, device=source, pin_memory=pinned)
    for g, row in zip(each, drawn.split(1), strict=False):
        row.copy_(torch.randn(row.shape, generator=g, dtype=dtype, device=source))
    return drawn.to(device, non_blocking=True)


def counted_noise(like: Tensor, seed: int, sample: Tensor, step: int) -> Tensor:
    """The noise that `solver_step` would draw, as a tensor [B, C, H, W] in float32."""
    return normal(tuple(like.shape), seed=seed, sample=sample, step=step, stream=philox.SAMPLER_NOISE)


def _of_diffusers(cls: type[Any]) -> type[Any]:
    """cls, or cls as a scheduler of diffusers too, where that has been imported."""
    if "diffusers" not in sys.modules:
        return cls
    try:
        from diffusers.schedulers.scheduling_utils import SchedulerMixin
    except ImportError:  # something else of that name, or another version
        return cls
    if issubclass(cls, SchedulerMixin):
        return cls
    if cls not in _JOINED:
        # by __module__ pipelines write into model_index.json who can load the scheduler: diffusers can
        names = {"__module__": "diffusers", "__qualname__": f"{cls.__name__} (fastddpm)", "_ours": cls}
        _JOINED[cls] = type(cls.__name__, (cls, SchedulerMixin), names)
    return _JOINED[cls]


def _empty(cls: type[Any]) -> Any:
    """An instance whose attributes are still to be set, when it is copied or read from a pickle."""
    return object.__new__(_of_diffusers(cls))
