"""ONNX Runtime: deployment in the clear."""

from tightrope.runtimes.onnx.session import Onnx

__all__ = ["Onnx"]
