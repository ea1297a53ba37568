"""Benchmarks: one registry of cases, one timing harness, results as JSON and everything printed from them.

Run from the top of a source checkout: ``python -m benchmarks.run``; docs/benchmarks.md explains the rest.
"""

import os

# OpenBLAS' workers spin for 2^28 ticks, over 100 ms, after each product of NumPy's, and hold a core beside whatever is
# timed next. Read when NumPy is loaded, so this comes before everything else. 2^22 ticks are two milliseconds.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "22")
