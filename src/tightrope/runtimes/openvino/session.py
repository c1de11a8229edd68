"""Run a Program with OpenVINO in float32, on a fixed number of threads."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from tightrope.engine import Engine, Infer
from tightrope.errors import InputError


@dataclass(frozen=True, kw_only=True)
class OpenVino(Engine):
    """OpenVINO's execution on the CPU."""

    name: ClassVar[str] = "openvino"

    def load(self, model: bytes) -> Infer:
        try:
            engine = import_module("openvino")
        except ImportError as error:
            raise InputError(
                "openvino is not installed", got=str(error), fix="pip install 'tightrope[openvino]'"
            ) from error
        core = engine.Core()
        settings = {
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = core.compile_model(core.read_model(model), "CPU", settings)

        def infer(x: NDArray[np.float32]) -> NDArray[Any]:
            y: NDArray[Any] = compiled(x)[0].copy()
            return y

        return infer
