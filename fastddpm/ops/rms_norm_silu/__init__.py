from .interface import rms_norm_silu

__all__ = ["rms_norm_silu"]
