"""Samplers: the timesteps to visit, their coefficients as a table, and the loop over it."""

from .coefficients import VARIANCES, blend_table, ddim_table, ddpm_table, dpmpp_2m_table
from .guidance import Network, dynamic_threshold, guided_output, thresholded_output
from .interpolation import lerp, slerp
from .loop import (
    Callback,
    initial_noise,
    sample_ddim,
    sample_ddpm,
    sample_dpmpp_2m,
    sample_in_chunks,
    sample_loop,
)
from .timesteps import SPACINGS, timesteps

__all__ = [
    "SPACINGS",
    "VARIANCES",
    "Callback",
    "Network",
    "blend_table",
    "ddim_table",
    "ddpm_table",
    "dpmpp_2m_table",
    "dynamic_threshold",
    "guided_output",
    "initial_noise",
    "lerp",
    "sample_ddim",
    "sample_ddpm",
    "sample_dpmpp_2m",
    "sample_in_chunks",
    "sample_loop",
    "slerp",
    "thresholded_output",
    "timesteps",
]
