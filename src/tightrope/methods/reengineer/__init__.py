"""Keep only what a task needs of a trained network (Qi et al., SeaM, ICSE 2023, arXiv 2304.00245)."""

from tightrope.methods.reengineer.method import ReengineerMethod

__all__ = ["ReengineerMethod"]
