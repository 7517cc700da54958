"""Measures, significance tests, and runs of other systems."""
