from .interface import conv3x3
from .kept import is_kept, keep_transformed

__all__ = ["conv3x3", "is_kept", "keep_transformed"]
