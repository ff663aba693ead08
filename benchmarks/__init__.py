"""Timings of the ops against eager PyTorch: ``pytest benchmarks --benchmark-only``."""
