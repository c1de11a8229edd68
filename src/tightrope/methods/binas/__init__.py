"""binas: which depths, expansions, kernels and SE a network has, within a limit (Nayman et al. 2021)."""

from tightrope.methods.binas.space import Option, Space, Stage, resolve

__all__ = ["Option", "Space", "Stage", "resolve"]
