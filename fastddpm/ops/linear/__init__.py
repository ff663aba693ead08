from .interface import linear

__all__ = ["linear"]
