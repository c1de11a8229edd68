"""ReLU's Hermite expansion of order two, channel by channel (HerPN of AESPA 2022)."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import ndtr

from tightrope.methods.paf.library import Array

STEEPEST = (
    3.0  # |mean| / deviation: beyond, ReLU is a line there, and CKKS cannot square what is hardly curved
)
NARROWEST = 0.01  # deviation / scale: a channel that was constant may not be so on other images


def quadratics(mean: Array, deviation: Array) -> Array:
    """(C, 3): sum_{i<=2} f_i h_i((x - mean) / deviation) as ascending coefficients of x.

    h_i are the orthonormal Hermite polynomials, and f_i = E[relu(x) h_i] for x ~ N(mean, deviation^2), so
    that no other quadratic has a smaller mean squared error there. For N(0, 1) f is (1 / sqrt(2 pi), 1/2,
    1 / sqrt(4 pi)), the constants of AESPA, which trains a network with them after normalisation; here mean
    and deviation say where in a trained network ReLU has its kink.
    """
    m = mean / deviation
    curvature = _density(m) / (2 * deviation)
    constant = curvature * (mean**2 + deviation**2)
    return np.stack([constant, ndtr(m) - 2 * curvature * mean, curvature], 1)


def residual(mean: Array, deviation: Array) -> float:
    """Root mean squared error of `quadratics` over channels that are Gaussian."""
    m = mean / deviation
    below, density = ndtr(m), _density(m)
    whole = (mean**2 + deviation**2) * below + mean * deviation * density
    expanded = (
        (mean * below + deviation * density) ** 2 + (deviation * below) ** 2 + (deviation * density) ** 2 / 2
    )
    return float(np.sqrt(np.maximum(whole - expanded, 0).mean()))


def widened(mean: Array, deviation: Array, scale: float) -> Array:
    """Deviations for which every quadratic is curved, and none so steep that it explodes within the scale."""
    return np.maximum(deviation, np.maximum(np.abs(mean) / STEEPEST, NARROWEST * scale))


def _density(x: Array) -> Array:
    return np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
