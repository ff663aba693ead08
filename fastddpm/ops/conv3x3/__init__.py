from .interface import conv3x3
from .kept import Transformed, is_kept, keep_transformed, kept

__all__ = ["Transformed", "conv3x3", "is_kept", "keep_transformed", "kept"]
