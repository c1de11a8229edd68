"""Secure inference by three parties that do not collude.

The client has the input, the server the weights, the dealer only makes correlated randomness. Semi-honest.
"""

from tightrope.runtimes.mpc.config import MPC
from tightrope.runtimes.mpc.cost import Costs, costs
from tightrope.runtimes.mpc.schedule import Schedule, compile_program
from tightrope.runtimes.mpc.session import MPCSession
from tightrope.runtimes.mpc.trimming import Flips, sign_flips
from tightrope.runtimes.mpc.widths import fit

__all__ = ["MPC", "Costs", "Flips", "MPCSession", "Schedule", "compile_program", "costs", "fit", "sign_flips"]
