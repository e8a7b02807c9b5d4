"""Benchmarks: ratios measured in one run, medians over rounds; never part of the tests."""
