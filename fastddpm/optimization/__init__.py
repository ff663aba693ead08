"""Existing networks of other libraries, made faster in place: `optimize`, and `restore`, which undoes it."""

from .network import optimize, restore
from .report import Kept, Replaced, Report

__all__ = ["Kept", "Replaced", "Report", "optimize", "restore"]
