"""The reference: a Program in float64 on the CPU, in the clear."""

from tightrope.runtimes.plain.session import Plain, PlainSession, evaluate, ranges

__all__ = ["Plain", "PlainSession", "evaluate", "ranges"]
