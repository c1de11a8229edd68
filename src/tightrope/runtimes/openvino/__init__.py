"""OpenVINO: deployment in the clear."""

from tightrope.runtimes.openvino.session import OpenVino

__all__ = ["OpenVino"]
