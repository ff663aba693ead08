from .interface import conv3x3

__all__ = ["conv3x3"]
