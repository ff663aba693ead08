from .interface import solver_step

__all__ = ["solver_step"]
