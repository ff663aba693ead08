from .interface import adam_ema

__all__ = ["adam_ema"]
