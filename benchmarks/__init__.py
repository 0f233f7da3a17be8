"""Benchmarks of dropbp_fx: ``python -m benchmarks --help``."""
