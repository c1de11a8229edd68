"""Imported by the process from which `parties` are forked: all that a party would spend time on."""

import tightrope.runtimes.mpc.remote
import tightrope.runtimes.mpc.service  # noqa: F401
from tightrope.runtimes.mpc import gates

gates.warm_kernels(64, 64)
