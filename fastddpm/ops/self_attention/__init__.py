from .interface import self_attention

__all__ = ["self_attention"]
