"""Our scheduler in a pipeline of diffusers."""

from __future__ import annotations

from typing import Any, TypeVar

from .ddim import DDIMScheduler
from .ddpm import DDPMScheduler
from .dpm_solver import DPMSolverMultistepScheduler

Pipeline = TypeVar("Pipeline")
SCHEDULERS = {cls.__name__: cls for cls in (DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler)}


def install(pipe: Pipeline, *, corrected: bool | None = None, noise_seed: int | None = None) -> Pipeline:
    """Put our scheduler in the place of a pipeline's own, with the same configuration.

    Args:
        pipe: any pipeline of diffusers whose ``scheduler`` is a DDPMScheduler, a DDIMScheduler or a
            DPMSolverMultistepScheduler: theirs or ours.
        corrected: see the scheduler; None keeps what its configuration says.
        noise_seed: draw the noise of the steps from its counter, see `Scheduler.set_noise_seed`.

    Returns: pipe.

    Raises:
        TypeError: no scheduler, or one of another class. ValueError: what the scheduler does not support, by name.
    """
    scheduler: Any = getattr(pipe, "scheduler", None)
    name = type(scheduler).__name__
    if name not in SCHEDULERS:
        raise TypeError(
            f"install: expected pipe.scheduler to be one of {', '.join(SCHEDULERS)}, got {name}; "
            "make one of them first, with pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)"
        )
    options = {} if corrected is None else {"corrected": corrected}
    pipe.scheduler = SCHEDULERS[name].from_config(scheduler.config, **options).set_noise_seed(noise_seed)  # type: ignore[attr-defined]
    return pipe
