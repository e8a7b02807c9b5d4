"""Runs notebooks, each in its own process, and records the results."""
