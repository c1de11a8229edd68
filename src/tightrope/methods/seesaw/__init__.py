"""More linear work for less nonlinear work (Li, Zhai, Cai, Gao, Seesaw, ICML 2024)."""

from tightrope.methods.seesaw.method import SeesawMethod

__all__ = ["SeesawMethod"]
