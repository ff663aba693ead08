"""Timings of the ops against PyTorch: ``pytest benchmarks --benchmark-only``.

Contestants of a case take turns of a few calls, and the best of many calls counts: ratios are within one run. Records
go to benchmarks/results/, as lines of JSON; ``python -m benchmarks.report`` makes the table and the plot of them.
"""
