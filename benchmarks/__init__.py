"""Benchmarks: one registry of cases, one timing harness, results as JSON and everything printed from them.

Run from the top of a source checkout: ``python -m benchmarks.run``; docs/benchmarks.md explains the rest.
"""
