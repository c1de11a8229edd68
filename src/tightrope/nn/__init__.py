"""The only layers Tightrope ever inserts into a network."""

from tightrope.nn.block_relu import BlockReLU

__all__ = ["BlockReLU"]
