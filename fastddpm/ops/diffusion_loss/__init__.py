from .interface import diffusion_loss

__all__ = ["diffusion_loss"]
