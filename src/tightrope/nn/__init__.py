"""The only layers Tightrope ever inserts into a network."""

from tightrope.nn.block_relu import BlockReLU
from tightrope.nn.polynomial import PolynomialActivation

__all__ = ["BlockReLU", "PolynomialActivation"]
