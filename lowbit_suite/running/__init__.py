"""Runs notebooks, each in a process of its own, and writes down what it saw."""
