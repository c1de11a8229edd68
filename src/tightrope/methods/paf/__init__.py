"""Polynomials in place of activations (SmartPAF, 2024): library, tuned coefficients, choice."""

from tightrope.methods.paf.method import PafMethod

__all__ = ["PafMethod"]
