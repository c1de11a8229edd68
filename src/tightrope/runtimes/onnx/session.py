"""Run a Program with ONNX Runtime in float32, on a fixed number of threads."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from tightrope.engine import Engine, Infer
from tightrope.errors import InputError
from tightrope.program import Program


@dataclass(frozen=True, kw_only=True)
class Onnx(Engine):
    """ONNX Runtime's execution on the CPU."""

    name: ClassVar[str] = "onnx"

    def load(self, model: bytes) -> Infer:
        try:
            engine = import_module("onnxruntime")
        except ImportError as error:
            raise InputError(
                "onnxruntime is not installed", got=str(error), fix="pip install 'tightrope[onnx]'"
            ) from error
        options = engine.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        session = engine.InferenceSession(model, options, providers=["CPUExecutionProvider"])

        def infer(x: NDArray[np.float32]) -> NDArray[Any]:
            y: NDArray[Any] = session.run(None, {Program.INPUT: x})[0]
            return y

        return infer
