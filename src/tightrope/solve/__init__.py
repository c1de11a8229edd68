"""Solvers of selection problems: numpy, scipy and numba only, no torch."""
