"""Block ReLU: one sign per patch, patch sizes chosen by a knapsack."""

from tightrope.methods.block_relu.method import BlockReluMethod

__all__ = ["BlockReluMethod"]
