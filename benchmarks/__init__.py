"""Timings of the ops against PyTorch: ``pytest benchmarks --benchmark-only``.

Contestants of a case take turns, and the best of many turns counts: ratios are within one run. Records go to
benchmarks/results/, as lines of JSON; ``python -m benchmarks.report`` makes the table and the plot of them.
Against other libraries: `benchmarks.peers`.
"""
