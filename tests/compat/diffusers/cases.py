"""Configurations drawn from all options of the schedulers, and walks of ours and theirs side by side."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fastddpm.compat.diffusers as ours

NAMES = ("DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler")
SHAPES = ((2, 3, 4, 4), (2, 3, 4, 4), (1, 3, 5, 3), (3, 4, 7), (2, 4, 2, 3, 3), (3, 6))
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Walk:
    """One scheduler, its configuration, and a sampling with it."""

    name: str
    config: dict[str, Any]
    num_steps: int
    shape: tuple[int, ...] = SHAPES[0]
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    generators: str = "one"
    timesteps: tuple[int, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)  # of each step

    @property
    def learned(self) -> bool:
        """Whether the network's output has a second half."""
        return (self.config.get("variance_type") or "").startswith("learned")

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of the network's output."""
        return (self.shape[0], self.shape[1] * (2 if self.learned else 1), *self.shape[2:])


def walks(name: str, count: int, seed: int = 0) -> list[Walk]:
    """So many, the same for the same seed."""
    rng = random.Random(f"{name} {seed}")
    draw = {"DDPMScheduler": _ddpm, "DDIMScheduler": _ddim, "DPMSolverMultistepScheduler": _dpm_solver}[name]
    return [draw(rng) for _ in range(count)]


def _common(rng: random.Random, spacing: str, schedules: tuple[str, ...]) -> tuple[dict[str, Any], int]:
    """What all have, and the number of steps."""
    total = rng.choice((1000, 1000, 250, 60))
    config: dict[str, Any] = dict(num_train_timesteps=total, prediction_type=rng.choice(PREDICTIONS))
    config["timestep_spacing"] = rng.choice(("leading", "trailing", "linspace", spacing))
    if rng.random() < 0.15:
        config["trained_betas"] = [1e-3 + 0.03 * (i / total) ** 2 for i in range(total)]
    else:
        config["beta_schedule"] = rng.choice(schedules)
    if rng.random() < 0.3:
        config.update(beta_start=0.00085, beta_end=0.012)
    if rng.random() < 0.25:
        config.update(thresholding=True, sample_max_value=rng.choice((1.0, 2.5)), dynamic_thresholding_ratio=0.9)
    steps = rng.choice((1, 2, 3, 5, 7, 10, 14, 15, 16, 25))
    if config["timestep_spacing"] == "leading" and rng.random() < 0.4 and steps > 1:
        config["steps_offset"] = 1
    return config, steps


PREDICTIONS = ("epsilon", "sample", "v_prediction")


def _tensors(rng: random.Random, config: dict[str, Any]) -> dict[str, Any]:
    # the thresholds of the original need three dimensions at least
    shape = rng.choice(SHAPES[:-1] if config.get("thresholding") else SHAPES)
    dtype = rng.choice(DTYPES)
    if config.get("beta_schedule") == "squaredcos_cap_v2" and config["prediction_type"] == "epsilon":
        dtype = torch.float32  # at the last timestep x_0 = (x - eps) 20000, of which half precision knows nothing
    return dict(
        shape=shape, dtype=dtype, channels_last=len(shape) == 4 and rng.random() < 0.4,
        generators=rng.choice(("one", "list", "global")),
    )  # fmt: skip


def _clips(rng: random.Random, config: dict[str, Any]) -> None:
    clip = rng.random() < 0.6
    config.update(clip_sample=clip, clip_sample_range=rng.choice((1.0, 1.7)))
    # without clipping x_0 = (x - eps) / 0 is refused
    if rng.random() < 0.25 and (clip or config.get("thresholding") or config["prediction_type"] != "epsilon"):
        config["rescale_betas_zero_snr"] = True


def _ddpm(rng: random.Random) -> Walk:
    config, steps = _common(rng, "leading", ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"))
    _clips(rng, config)
    config["variance_type"] = rng.choice(
        (None, "fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range")
    )
    timesteps = None
    if rng.random() < 0.2:
        chosen = rng.sample(range(config["num_train_timesteps"]), 6)
        timesteps = tuple(sorted(chosen, reverse=True))
    return Walk("DDPMScheduler", config, steps, timesteps=timesteps, **_tensors(rng, config))


def _ddim(rng: random.Random) -> Walk:
    config, steps = _common(rng, "leading", ("linear", "scaled_linear", "squaredcos_cap_v2"))
    _clips(rng, config)
    config["set_alpha_to_one"] = rng.random() < 0.7
    options = dict(eta=rng.choice((0.0, 0.0, 0.4, 1.0)), use_clipped_model_output=rng.choice((True, False, None)))
    return Walk("DDIMScheduler", config, steps, options=options, **_tensors(rng, config))


def _dpm_solver(rng: random.Random) -> Walk:
    config, steps = _common(rng, "linspace", ("linear", "scaled_linear", "squaredcos_cap_v2"))
    algorithm = rng.choice(("dpmsolver++", "dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"))
    config.update(
        algorithm_type=algorithm, solver_type=rng.choice(("midpoint", "heun")), euler_at_final=rng.random() < 0.3,
        solver_order=rng.choice((1, 2) if algorithm == "sde-dpmsolver" else (1, 2, 3)),
        lower_order_final=rng.random() < 0.7, rescale_betas_zero_snr=rng.random() < 0.2,
        final_sigmas_type=rng.choice(("zero", "sigma_min")) if algorithm.endswith("++") else "sigma_min",
        variance_type=rng.choice((None, "fixed_large", "learned_range")),
    )  # fmt: skip
    tensors = _tensors(rng, config)
    if tensors["dtype"] == torch.float64:  # which the original computes in float32
        tensors["dtype"] = torch.float32
    if config["variance_type"] == "learned_range":  # of which the original knows with 3 channels, and epsilon
        tensors["shape"], config["prediction_type"] = SHAPES[0], "epsilon"
    how = rng.choice((None, None, "karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas", "flow_sigmas"))
    timesteps = None
    if how is not None:
        config[f"use_{how}"] = True
        if how == "flow_sigmas":
            config["flow_shift"] = rng.choice((1.0, 3.0))
            if algorithm.endswith("++"):
                config["prediction_type"], config["variance_type"] = "flow_prediction", None
        else:
            steps = max(steps, 2)
    elif rng.random() < 0.2:
        timesteps = tuple(sorted(rng.sample(range(config["num_train_timesteps"]), 6), reverse=True))
    elif rng.random() < 0.3:
        config["lambda_min_clipped"] = -2.5
    return Walk("DPMSolverMultistepScheduler", config, steps, timesteps=timesteps, **tensors)


class Party:
    """One scheduler on its walk, with generators of its own."""

    def __init__(self, walk: Walk, scheduler: Any, dtype: torch.dtype) -> None:
        self.walk, self.scheduler, self.dtype = walk, scheduler, dtype
        if walk.timesteps is None:
            scheduler.set_timesteps(walk.num_steps)
        else:
            scheduler.set_timesteps(timesteps=list(walk.timesteps))
        if walk.name.startswith(
            "DPM"
        ):  # else the original begins at the second of equal timesteps, and runs out of them
            scheduler.set_begin_index(0)
        self.generator: Any = torch.Generator().manual_seed(5)
        if walk.generators == "list":
            self.generator = [torch.Generator().manual_seed(5 + i) for i in range(walk.shape[0])]
        if walk.generators == "global":
            self.generator, self.state = None, torch.Generator().manual_seed(5).get_state()

    def step(self, out: Tensor, i: int, x: Tensor) -> Any:
        """Its result of step i."""
        t, options = self.scheduler.timesteps[i], dict(self.walk.options, generator=self.generator)
        if self.generator is not None:
            return self.scheduler.step(out.to(self.dtype), t, x.to(self.dtype), **options)
        with torch.random.fork_rng([]):
            torch.set_rng_state(self.state)
            result = self.scheduler.step(out.to(self.dtype), t, x.to(self.dtype), **options)
            self.state = torch.get_rng_state()
        return result


def peer(walk: Walk) -> Any:
    """The original."""
    import diffusers

    return getattr(diffusers, walk.name)(**walk.config)


def mine(walk: Walk, **options: Any) -> Any:
    """Ours."""
    return getattr(ours, walk.name)(**walk.config, **options)


def exact(scheduler: Any) -> Any:
    """The original, computing with its own tables in float64."""
    for name in ("alphas_cumprod", "final_alpha_cumprod", "one", "sigmas"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler


@contextmanager
def noise_of(dtype: torch.dtype) -> Iterator[None]:
    """Let the originals draw as they do for samples of this dtype, whatever they compute in."""
    from diffusers.schedulers import scheduling_ddim, scheduling_ddpm, scheduling_dpmsolver_multistep
    from diffusers.utils.torch_utils import randn_tensor

    def drawn(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None) -> Tensor:
        return randn_tensor(shape, generator=generator, device=device, dtype=native).to(dtype)

    native = dtype
    with (
        mock.patch.object(scheduling_ddpm, "randn_tensor", drawn),
        mock.patch.object(scheduling_ddim, "randn_tensor", drawn),
    ):
        del scheduling_dpmsolver_multistep  # draws in float32 always
        yield


def outputs(walk: Walk, count: int) -> list[Tensor]:
    """What the network adds to half of its input, for each step, in the dtype of the walk."""
    generator = torch.Generator().manual_seed(11)
    made = [torch.randn(walk.output_shape, generator=generator) for _ in range(count)]
    if walk.learned:  # a variance for "learned", a fraction in [-1, 1] for "learned_range"
        for out in made:
            half = out[:, walk.shape[1] :]
            half.copy_(half.abs() if walk.config["variance_type"] == "learned" else half.tanh())
    return [laid_out(out.to(walk.dtype), walk) for out in made]


def laid_out(x: Tensor, walk: Walk) -> Tensor:
    """In the memory order of the walk."""
    return x.contiguous(memory_format=torch.channels_last) if walk.channels_last else x


def network(walk: Walk, drawn: Tensor, x: Tensor) -> Tensor:
    """An output that depends on the state, so that errors may grow."""
    out = drawn.to(x.dtype).clone()
    out[:, : walk.shape[1]] += 0.5 * x
    return out
