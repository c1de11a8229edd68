"""The evaluator's files: each step of a circuit as a graph of the library's few ops."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tightrope.runtimes.ckks.circuit import Affine, AnyStep, Composite, Refresh, Square
from tightrope.runtimes.ckks.diagonals import LOG_RATIO
from tightrope.runtimes.ckks.parameters import Parameters
from tightrope.types import Json

CONTAINER = b"ORION\0\2\0"
U32, U64 = struct.Struct("<I"), struct.Struct("<Q")
Node = dict[str, Json]


def parts(step: AnyStep) -> int:
    """How many ciphertexts of a step are treated differently from each other."""
    each = [s.coefficients.shape[1] for s in step.stages if s.each] if isinstance(step, Composite) else []
    return max(each, default=1)


def container(
    step: AnyStep, parameters: Parameters, part: int = 0, factors: Sequence[float] | None = None
) -> bytes:
    """The evaluator's file for one step: the whole of a map, one ciphertext of any other.

    factors: of a map's inputs, by which it multiplies them besides.
    """
    if isinstance(step, Affine):
        nodes, edges, blobs = _affine_nodes(step, parameters, factors or [1.0] * step.inputs)
    elif isinstance(step, Composite):
        nodes, edges, blobs = _composite_nodes(step, part)
    elif isinstance(step, Square):
        nodes, edges, blobs = [_node("square", "quad", step.level, 1)], [("in", "square")], []
    else:
        nodes, edges, blobs = _refresh_nodes(step)
    library = parameters.library()
    level = step.level
    start = {"name": "in", "op": "flatten", "level": level, "depth": 0, "config": {}}
    about = {
        "version": 2,
        "params": library,
        "config": {
            "margin": 2, "embedding_method": "hybrid", "fuse_modules": True, "reserve_output_levels": 0,
        },
        "manifest": {
            "galois_elements": [], "bootstrap_slots": [], "boot_logp": library["boot_logp"],
            "btp_logn": library["btp_logn"], "needs_rlk": True,
        },
        "input_level": level,
        "cost": {"bootstrap_count": 0, "galois_key_count": 0, "bootstrap_key_count": 0},
        "graph": {
            "input": "in",
            "output": nodes[-1]["name"],
            "nodes": [start, *nodes],
            "edges": [{"src": a, "dst": b} for a, b in edges],
        },
        "blob_count": len(blobs),
    }  # fmt: skip
    head = json.dumps(about).encode()
    parts = [CONTAINER, U32.pack(len(head)), head, U32.pack(len(blobs))]
    for blob in blobs:
        parts += [U64.pack(len(blob)), blob]
    return b"".join(parts)


Made = tuple[list[Node], list[tuple[str, str]], list[bytes]]


def _affine_nodes(step: Affine, parameters: Parameters, factors: Sequence[float]) -> Made:
    blobs: list[bytes] = []
    names: dict[str, int] = {}
    for r in range(step.outputs):
        for c in range(step.inputs):
            names[f"diag_{r}_{c}"] = len(blobs)
            block = step.blocks.get((r, c))
            if block is None:
                blobs.append(U32.pack(0))
                continue
            shifts = np.array(block.shifts, "<i4")
            dense = block.dense(parameters.slots) * factors[c]
            blobs.append(U32.pack(len(shifts)) + shifts.tobytes() + _doubles(dense))
        names[f"bias_{r}"] = len(blobs)
        blobs.append(_doubles(step.bias[r]))
    config = {
        "bsgs_ratio": float(1 << LOG_RATIO),
        "output_rotations": step.rotations,
        "num_input_cts": step.inputs,
        "num_output_cts": step.outputs,
    }
    return [_node("map", "linear_transform", step.level, 1, config, names)], [("in", "map")], blobs


def _refresh_nodes(step: Refresh) -> Made:
    """It masks the first slots, which takes a level, and fills the others with what comes out."""
    config = {"slots": step.slots, "prescale": 1, "postscale": 1, "constant": 0}
    return [_node("refresh", "bootstrap", step.level, 0, config)], [("in", "refresh")], []


def _node(
    name: str, op: str, level: int, depth: int, config: Json = None, blobs: dict[str, int] | None = None
) -> Node:
    return {
        "name": name, "op": op, "level": level, "depth": depth, "config": config or {}, "blob_refs": blobs,
    }  # fmt: skip


def _composite_nodes(step: Composite, part: int) -> Made:
    nodes: list[Node] = []
    edges: list[tuple[str, str]] = []
    blobs: list[bytes] = []
    level, before = step.level, "in"
    for k, stage in enumerate(step.stages):
        name = f"stage{k}"
        if stage.each:
            _add_powers(stage.of(part), name, before, level, (nodes, edges, blobs))
        else:
            config = {
                "coeffs": stage.coefficients.tolist(), "basis": "chebyshev",
                "prescale": 1, "postscale": 1, "constant": 0,
            }  # fmt: skip
            nodes.append(_node(name, "polynomial", level, stage.levels, config))
            edges.append((before, name))
        before, level = name, level - stage.levels
    if step.gated:
        nodes.append(_node("gate", "mult", level, 1))
        edges += [("in", "gate"), (before, "gate")]
    return nodes, edges, blobs


def _add_powers(c: NDArray[np.float64], name: str, x: str, level: int, made: Made) -> None:
    """A polynomial of degree 1 to 3 with coefficients (degree + 1, slots), in as many levels as any of it."""
    nodes, edges, blobs = made

    def times(result: str, operand: str, k: int, at: int, bias: NDArray[np.float64]) -> str:
        blobs.extend([U32.pack(1) + bytes(4) + _doubles(c[k]), _doubles(bias)])
        config = {
            "bsgs_ratio": float(1 << LOG_RATIO), "output_rotations": 0,
            "num_input_cts": 1, "num_output_cts": 1,
        }  # fmt: skip
        names = {"diag_0_0": len(blobs) - 2, "bias_0": len(blobs) - 1}
        nodes.append(_node(result, "linear_transform", at, 1, config, names))
        edges.append((operand, result))
        return result

    def join(result: str, op: str, a: str, b: str, at: int) -> str:
        nodes.append(_node(result, op, at, int(op == "mult")))
        edges.extend([(a, result), (b, result)])
        return result

    none = np.zeros_like(c[0])
    if len(c) == 2:
        times(name, x, 1, level, c[0])
        return
    first = times(f"{name}.1", x, 1, level, c[0])
    nodes.append(_node(f"{name}.square", "quad", level, 1))
    edges.append((x, f"{name}.square"))
    second = times(f"{name}.2", f"{name}.square", 2, level - 1, none)
    if len(c) == 3:
        join(name, "add", second, first, level - 2)
        return
    third = times(f"{name}.3", x, 3, level, none)
    cube = join(f"{name}.cube", "mult", third, f"{name}.square", level - 1)
    join(name, "add", cube, join(f"{name}.sum", "add", second, first, level - 2), level - 2)


def _doubles(values: NDArray[np.float64]) -> bytes:
    return np.ascontiguousarray(values, "<f8").tobytes()
