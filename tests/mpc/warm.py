"""Imported by the process from which `parties` are forked: all that a party would spend time on."""

import tightrope.runtimes.mpc.remote
import tightrope.runtimes.mpc.service  # noqa: F401
from tightrope.runtimes.mpc.warm import warm_gates, warm_linear

warm_linear(64)
warm_linear(32)
warm_gates(64, 64)
