"""Polynomials in place of activations (SmartPAF, 2024): the library and the tuning of coefficients."""
