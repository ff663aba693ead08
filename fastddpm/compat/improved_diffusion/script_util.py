"""What scripts make networks and diffusions with, from the flags of a command line."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from . import gaussian_diffusion as gd
from .respace import SpacedDiffusion, space_timesteps
from .unet import SuperResModel, UNetModel

NUM_CLASSES = 1000
CHANNEL_MULT = {256: (1, 1, 2, 2, 4, 4), 64: (1, 2, 3, 4), 32: (1, 2, 2, 2)}
"""Width of each level, by image size."""


def model_and_diffusion_defaults() -> dict[str, Any]:
    """The arguments of `create_model_and_diffusion` with the defaults of the original's scripts."""
    return dict(
        image_size=64,
        num_channels=128,
        num_res_blocks=2,
        num_heads=4,
        num_heads_upsample=-1,
        attention_resolutions="16,8",
        dropout=0.0,
        learn_sigma=False,
        sigma_small=False,
        class_cond=False,
        diffusion_steps=1000,
        noise_schedule="linear",
        timestep_respacing="",
        use_kl=False,
        predict_xstart=False,
        rescale_timesteps=True,
        rescale_learned_sigmas=True,
        use_checkpoint=False,
        use_scale_shift_norm=True,
    )


def create_model_and_diffusion(
    image_size: int,
    class_cond: bool,
    learn_sigma: bool,
    sigma_small: bool,
    num_channels: int,
    num_res_blocks: int,
    num_heads: int,
    num_heads_upsample: int,
    attention_resolutions: str,
    dropout: float,
    diffusion_steps: int,
    noise_schedule: str,
    timestep_respacing: str,
    use_kl: bool,
    predict_xstart: bool,
    rescale_timesteps: bool,
    rescale_learned_sigmas: bool,
    use_checkpoint: bool,
    use_scale_shift_norm: bool,
) -> tuple[UNetModel, SpacedDiffusion]:
    """A network and its diffusion. Args are those of `create_model` and `create_gaussian_diffusion`."""
    model = create_model(
        image_size,
        num_channels,
        num_res_blocks,
        learn_sigma=learn_sigma,
        class_cond=class_cond,
        use_checkpoint=use_checkpoint,
        attention_resolutions=attention_resolutions,
        num_heads=num_heads,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        dropout=dropout,
    )
    diffusion = create_gaussian_diffusion(
        steps=diffusion_steps,
        learn_sigma=learn_sigma,
        sigma_small=sigma_small,
        noise_schedule=noise_schedule,
        use_kl=use_kl,
        predict_xstart=predict_xstart,
        rescale_timesteps=rescale_timesteps,
        rescale_learned_sigmas=rescale_learned_sigmas,
        timestep_respacing=timestep_respacing,
    )
    return model, diffusion


def create_model(
    image_size: int,
    num_channels: int,
    num_res_blocks: int,
    learn_sigma: bool,
    class_cond: bool,
    use_checkpoint: bool,
    attention_resolutions: str,
    num_heads: int,
    num_heads_upsample: int,
    use_scale_shift_norm: bool,
    dropout: float,
) -> UNetModel:
    """The network of improved DDPM for an image size.

    Args:
        image_size: 32, 64 or 256. num_channels: width of the first level.
        learn_sigma: give twice the channels, for a learned variance. class_cond: 1000 classes.
        attention_resolutions: heights of feature maps with attention, as "16,8".
        Others: see `UNetModel`.

    Raises:
        ValueError: another image size, or what `UNetModel` refuses.
    """
    return UNetModel(
        **_options("create_model", image_size, num_channels, num_res_blocks, attention_resolutions, learn_sigma),
        num_classes=NUM_CLASSES if class_cond else None,
        use_checkpoint=use_checkpoint,
        num_heads=num_heads,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        dropout=dropout,
    )


def sr_model_and_diffusion_defaults() -> dict[str, Any]:
    """The arguments of `sr_create_model_and_diffusion` with the defaults of the original's scripts."""
    defaults = dict(model_and_diffusion_defaults(), large_size=256, small_size=64)
    return {name: defaults[name] for name in defaults if name in _SR_ARGUMENTS}


def sr_create_model_and_diffusion(
    large_size: int,
    small_size: int,
    class_cond: bool,
    learn_sigma: bool,
    num_channels: int,
    num_res_blocks: int,
    num_heads: int,
    num_heads_upsample: int,
    attention_resolutions: str,
    dropout: float,
    diffusion_steps: int,
    noise_schedule: str,
    timestep_respacing: str,
    use_kl: bool,
    predict_xstart: bool,
    rescale_timesteps: bool,
    rescale_learned_sigmas: bool,
    use_checkpoint: bool,
    use_scale_shift_norm: bool,
) -> tuple[SuperResModel, SpacedDiffusion]:
    """A network that enlarges images from small_size to large_size, and its diffusion."""
    model = sr_create_model(
        large_size,
        small_size,
        num_channels,
        num_res_blocks,
        learn_sigma=learn_sigma,
        class_cond=class_cond,
        use_checkpoint=use_checkpoint,
        attention_resolutions=attention_resolutions,
        num_heads=num_heads,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        dropout=dropout,
    )
    diffusion = create_gaussian_diffusion(
        steps=diffusion_steps,
        learn_sigma=learn_sigma,
        noise_schedule=noise_schedule,
        use_kl=use_kl,
        predict_xstart=predict_xstart,
        rescale_timesteps=rescale_timesteps,
        rescale_learned_sigmas=rescale_learned_sigmas,
        timestep_respacing=timestep_respacing,
    )
    return model, diffusion


_SR_ARGUMENTS = inspect.signature(sr_create_model_and_diffusion).parameters


def sr_create_model(
    large_size: int,
    small_size: int,
    num_channels: int,
    num_res_blocks: int,
    learn_sigma: bool,
    class_cond: bool,
    use_checkpoint: bool,
    attention_resolutions: str,
    num_heads: int,
    num_heads_upsample: int,
    use_scale_shift_norm: bool,
    dropout: float,
) -> SuperResModel:
    """The network that enlarges images to large_size, 64 or 256; small_size is that of what it is given later."""
    if large_size == 32:
        raise ValueError("sr_create_model: expected large_size 64 or 256, got 32; use create_model for small images")
    return SuperResModel(
        **_options("sr_create_model", large_size, num_channels, num_res_blocks, attention_resolutions, learn_sigma),
        num_classes=NUM_CLASSES if class_cond else None,
        use_checkpoint=use_checkpoint,
        num_heads=num_heads,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        dropout=dropout,
    )


def create_gaussian_diffusion(
    *,
    steps: int = 1000,
    learn_sigma: bool = False,
    sigma_small: bool = False,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False,
    timestep_respacing: str | list[int] = "",
    corrected: bool = False,
) -> SpacedDiffusion:
    """The diffusion of improved DDPM.

    Args:
        steps: T. noise_schedule: "linear" or "cosine".
        learn_sigma: the variance is learned, between its bounds; sigma_small: else that of the posterior, not beta.
        use_kl: train with the bound, times T. predict_xstart: predict x_0, not eps.
        rescale_timesteps: give the network t 1000 / T.
        rescale_learned_sigmas: the bound's term beside the squared error counts T / 1000.
        timestep_respacing: which timesteps to visit, see `space_timesteps`; "" is all.
        corrected: see `GaussianDiffusion`; only here.
    """
    if use_kl:
        loss_type = gd.LossType.RESCALED_KL
    else:
        loss_type = gd.LossType.RESCALED_MSE if rescale_learned_sigmas else gd.LossType.MSE
    fixed = gd.ModelVarType.FIXED_SMALL if sigma_small else gd.ModelVarType.FIXED_LARGE
    return SpacedDiffusion(
        use_timesteps=space_timesteps(steps, timestep_respacing or [steps]),
        betas=gd.get_named_beta_schedule(noise_schedule, steps),
        model_mean_type=gd.ModelMeanType.START_X if predict_xstart else gd.ModelMeanType.EPSILON,
        model_var_type=gd.ModelVarType.LEARNED_RANGE if learn_sigma else fixed,
        loss_type=loss_type,
        rescale_timesteps=rescale_timesteps,
        corrected=corrected,
    )


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: Mapping[str, Any]) -> None:
    """A flag for each name, of the type of its default; text where that is None."""
    for name, value in default_dict.items():
        kind = str2bool if isinstance(value, bool) else str if value is None else type(value)
        parser.add_argument(f"--{name}", default=value, type=kind)


def args_to_dict(args: argparse.Namespace, keys: Iterable[str]) -> dict[str, Any]:
    """Some of the flags that were given."""
    return {key: getattr(args, key) for key in keys}


def str2bool(v: bool | str) -> bool:
    """True for yes, true, t, y and 1, False for no, false, f, n and 0, in any case.

    Raises:
        argparse.ArgumentTypeError: another word.
    """
    if isinstance(v, bool):
        return v
    words = {
        **dict.fromkeys(("yes", "true", "t", "y", "1"), True),
        **dict.fromkeys(("no", "false", "f", "n", "0"), False),
    }
    if v.lower() not in words:
        raise argparse.ArgumentTypeError(f"str2bool: expected True or False, got {v!r}; yes and no, 1 and 0 do too")
    return words[v.lower()]


def _options(
    op: str, size: int, num_channels: int, num_res_blocks: int, attention_resolutions: str, learn_sigma: bool
) -> dict[str, Any]:
    """What an image size decides."""
    if size not in CHANNEL_MULT:
        raise ValueError(
            f"{op}: expected an image size among {', '.join(map(str, sorted(CHANNEL_MULT)))}, got {size}; resize the "
            "images, or make a UNetModel with a channel_mult of your own"
        )
    return dict(
        in_channels=3,
        model_channels=num_channels,
        out_channels=6 if learn_sigma else 3,
        num_res_blocks=num_res_blocks,
        attention_resolutions=tuple(size // int(height) for height in attention_resolutions.split(",")),
        channel_mult=CHANNEL_MULT[size],
    )
