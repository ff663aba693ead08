from .interface import q_sample

__all__ = ["q_sample"]
