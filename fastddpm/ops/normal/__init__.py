from .interface import normal

__all__ = ["normal"]
