"""A pipeline of diffusers, network and scheduler, as a diffusion that samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..diffusion import DiffusionConfig, GaussianDiffusion
from ..nn.pretrained.files import is_repository, local_copy, read_json
from ..nn.unet import UNet

WHO = "load_diffusion"
PLACES = ("scheduler_config.json", "scheduler/scheduler_config.json")
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler")

# What a key means that scheduler_config.json does not have.
DEFAULTS: dict[str, Any] = dict(
    num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", trained_betas=None,
    variance_type="fixed_small", clip_sample=True, clip_sample_range=1.0, prediction_type="epsilon", thresholding=False,
    rescale_betas_zero_snr=False,
)  # fmt: skip
SCHEDULES = {"linear": "linear", "scaled_linear": "quadratic", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
# "fixed_small_log" names the same variance, taken through its logarithm
VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "learned_range": "learned_range",
}


def is_pipeline(path: str | Path) -> bool:
    """Whether a path is a folder with a scheduler of diffusers, or may be the name of a repository on the hub."""
    return is_repository(path) or any((Path(path) / place).is_file() for place in PLACES)


def load_pipeline(path: str | Path) -> GaussianDiffusion:
    """The diffusion of a pipeline folder or repository, on the CPU, in eval mode.

    Raises:
        ValueError: see `UNet.from_pretrained` and `diffusion_config`. ImportError: a repository without
            huggingface_hub.
    """
    root = local_copy(path, list(PLACES), None, WHO)
    file = next((root / place for place in PLACES if (root / place).is_file()), None)
    if file is None:
        raise ValueError(
            f"{WHO}: expected {' or '.join(PLACES)} in {path}, got neither; for a network without a scheduler use "
            "GaussianDiffusion(UNet.from_pretrained(path), schedule=..., variance=...)"
        )
    config = diffusion_config(read_json(file, WHO), str(file))
    return GaussianDiffusion(UNet.from_pretrained(path), config=config).eval()


def diffusion_config(scheduler: Mapping[str, Any], source: str = "the scheduler") -> DiffusionConfig:
    """The diffusion that the configuration of a DDPMScheduler or DDIMScheduler of diffusers describes.

    How it spaces timesteps when fewer than all are visited is not part of it; `GaussianDiffusion.sample` takes that.

    Args:
        scheduler: contents of scheduler_config.json. source: named in messages.

    Raises:
        ValueError: a configuration that cannot be represented, with each key at fault.
    """
    c = {**DEFAULTS, **{key: value for key, value in scheduler.items() if key in DEFAULTS}}
    faults = []

    def expect(condition: bool, key: str, supported: str) -> None:
        if not condition:
            faults.append(f"{key} {c[key]!r} (supported: {supported})")

    c["_class_name"] = scheduler.get("_class_name", "DDPMScheduler")
    expect(c["_class_name"] in SCHEDULERS, "_class_name", " or ".join(SCHEDULERS))
    expect(c["beta_schedule"] in SCHEDULES, "beta_schedule", ", ".join(SCHEDULES))
    expect(c["trained_betas"] is None, "trained_betas", "null")
    expect(c["variance_type"] in VARIANCES, "variance_type", ", ".join(VARIANCES))
    expect(c["prediction_type"] in PREDICTIONS, "prediction_type", ", ".join(PREDICTIONS))
    expect(not c["thresholding"], "thresholding", "false; sample(dynamic_threshold_ratio=...) does it")
    expect(not c["clip_sample"] or c["clip_sample_range"] == 1, "clip_sample_range", "1, or clip_sample false")
    if faults:
        raise ValueError(
            f"{WHO}: expected a scheduler that a DiffusionConfig can describe, got from {source}: {'; '.join(faults)}; "
            "use GaussianDiffusion(UNet.from_pretrained(path), ...) with a configuration of your own"
        )
    schedule, variance = SCHEDULES[c["beta_schedule"]], VARIANCES[c["variance_type"]]
    ends = {} if schedule == "cosine" else {"beta_start": c["beta_start"], "beta_end": c["beta_end"]}
    return DiffusionConfig(
        schedule=schedule,
        num_timesteps=c["num_train_timesteps"],
        zero_terminal_snr=bool(c["rescale_betas_zero_snr"]),
        prediction=PREDICTIONS[c["prediction_type"]],
        variance=variance,
        loss="hybrid" if variance.startswith("learned") else "simple",
        clip_denoised=bool(c["clip_sample"]),
        **ends,
    )
