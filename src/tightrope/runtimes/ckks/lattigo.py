"""The one place that knows the CKKS library: Lattigo v6 through orion-v2-lattigo and orion-v2-evaluator.

The client's part holds the secret key and never gives it out. The server's part is the evaluator, a machine
for graphs of a few ops: each step of a circuit becomes a graph of its own, so that times, levels and memory
are known per step. Both libraries are imported only when used; the two must not meet in one process.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tightrope.errors import InputError, ProtocolError
from tightrope.runtimes.ckks.circuit import Affine, Circuit, Composite
from tightrope.runtimes.ckks.diagonals import LOG_RATIO
from tightrope.runtimes.ckks.format import check_ciphertext, key_size
from tightrope.runtimes.ckks.parameters import Parameters
from tightrope.types import Json

CONTAINER = b"ORION\0\2\0"
U32, U64 = struct.Struct("<I"), struct.Struct("<Q")
HAS = b"\1"


class Client:
    """Keys, encryption, decryption. The secret key stays inside the library and leaves with the object."""

    def __init__(self, circuit: Circuit) -> None:
        ckks, rlwe = _library("lattigo.ckks"), _library("lattigo.rlwe")
        self._circuit = circuit
        self._rlwe = rlwe
        self._parameters = ckks.Parameters.from_dict(
            {k: v for k, v in circuit.parameters.library().items() if v is not None}
        )
        self._generator = rlwe.KeyGenerator(self._parameters)
        self._secret = self._generator.gen_secret_key()
        self._encoder = ckks.Encoder(self._parameters)
        public = self._generator.gen_public_key(self._secret)
        self._encryptor = rlwe.Encryptor(self._parameters, public)
        self._decryptor = rlwe.Decryptor(self._parameters, self._secret)

    def make_keys(self) -> Iterator[tuple[int | None, bytes]]:
        """The relinearisation key (None) and the Galois keys, ascending, one at a time: they are large."""
        yield None, self._generator.gen_relin_key(self._secret).marshal_binary()
        for element in self._circuit.galois_elements():
            yield element, self._generator.gen_galois_key(self._secret, element).marshal_binary()

    def encrypt(self, slots: NDArray[np.float64], level: int) -> bytes:
        """(slots,) numbers of about [-1, 1]."""
        scale = 1 << self._circuit.parameters.scale_bits
        with self._encoder.encode(slots.tolist(), level, scale) as plain:
            data: bytes = self._encryptor.encrypt_new(plain).marshal_binary()
        return data

    def decrypt(self, data: bytes) -> NDArray[np.float64]:
        """(slots,). The caller has checked the bytes."""
        with self._rlwe.Ciphertext.unmarshal_binary(data) as ciphertext:
            plain = self._decryptor.decrypt_new(ciphertext)
        with plain:
            return np.array(self._encoder.decode(plain, self._circuit.parameters.slots))

    def close(self) -> None:
        for part in (self._decryptor, self._encryptor, self._encoder, self._secret, self._generator):
            part.close()


def write_keys(path: Path, keys: Iterator[tuple[int | None, bytes]], count: int) -> None:
    """The library's key set, from keys as `Client.make_keys` gives them, `count` of them Galois keys."""
    with path.open("wb") as file:
        for element, data in keys:
            if element is None:
                file.write(HAS + data + HAS + U32.pack(count))
            else:
                file.write(U64.pack(element) + data)


def _check_file(path: Path, parameters: Parameters, count: int) -> None:
    """The library's reader does not return from a file that is too short."""
    found, keys = path.stat().st_size, (key_size(parameters, element=one) for one in (False, True))
    relinearisation, rotation = keys
    wanted = 2 * len(HAS) + relinearisation + U32.size + count * (U64.size + rotation)
    if found != wanted:
        raise ProtocolError(
            "the key file is truncated or of other parameters", where=str(path), got=f"{found} bytes",
            allowed=f"{wanted} bytes",
        )  # fmt: skip


@dataclass(frozen=True)
class Server:
    """A `Backend` on real ciphertexts, as bytes. Several threads may use it at a time."""

    circuit: Circuit
    evaluator: Any
    models: dict[tuple[str, int], Any]

    @classmethod
    def load(cls, circuit: Circuit, keys: Path) -> Server:
        """From a file of `write_keys`, mapped and not read: its pages need no memory of their own.

        Raises ProtocolError for a file of another size, or that the library refuses.
        """
        _check_file(keys, circuit.parameters, len(circuit.galois_elements()))
        ffi, gohandle = _library("orion_evaluator.ffi"), _library("orion_evaluator.gohandle")
        evaluator = _library("orion_evaluator.evaluator").Evaluator
        made = evaluator.__new__(evaluator)
        with keys.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
            first = ctypes.c_char.from_buffer(mapped)
            error = ctypes.c_char_p(None)
            library, size = ffi._lib_call(), ctypes.c_ulong(len(mapped))
            about = json.dumps(circuit.parameters.library()).encode()
            handle = library.EvalNewEvaluator(
                about, ctypes.addressof(first), size, None, ctypes.c_ulong(0), ctypes.byref(error)
            )
            del first
        try:
            ffi._check_err(error)
        except Exception as failure:
            raise ProtocolError("the keys cannot be read", got=str(failure)) from failure
        made._handle = gohandle.GoHandle(int(handle), tag="Evaluator", delete_fn=ffi._delete_handle)
        load = _library("orion_evaluator.model").Model.load
        return cls(
            circuit,
            made,
            {
                (step.name, part): load(container(step, circuit.parameters, part))
                for step in circuit.steps
                for part in range(_parts(step))
            },
        )

    def affine(self, step: Affine, inputs: Sequence[bytes]) -> list[bytes]:
        return self._run(step.name, 0, inputs)

    def composite(self, step: Composite, inputs: Sequence[bytes]) -> list[bytes]:
        last = _parts(step) - 1
        return [y for k, x in enumerate(inputs) for y in self._run(step.name, min(k, last), [x])]

    def level(self, ciphertext: bytes) -> int:
        return check_ciphertext(ciphertext, self.circuit.parameters, "the evaluator's result")

    def _run(self, step: str, part: int, inputs: Sequence[bytes]) -> list[bytes]:
        try:
            made: list[bytes] = self.evaluator.forward(self.models[step, part], list(inputs))
        except Exception as error:  # the library's own class, known only once it is imported
            missing = "GaloisKey" in str(error)
            what = "a Galois key is missing" if missing else "the evaluator refused a step"
            raise ProtocolError(what, where=step, got=str(error)[-300:]) from error
        return made

    def close(self) -> None:
        for model in self.models.values():
            model.close()
        self.evaluator.close()


Node = dict[str, Json]


def _parts(step: Affine | Composite) -> int:
    """How many ciphertexts of a step are treated differently from each other."""
    each = [s.coefficients.shape[1] for s in step.stages if s.each] if isinstance(step, Composite) else []
    return max(each, default=1)


def container(step: Affine | Composite, parameters: Parameters, part: int = 0) -> bytes:
    """The evaluator's file for one step: the whole of a map, one ciphertext of a polynomial."""
    made = _affine_nodes(step, parameters) if isinstance(step, Affine) else _composite_nodes(step, part)
    nodes, edges, blobs = made
    level = step.level
    start = {"name": "in", "op": "flatten", "level": level, "depth": 0, "config": {}}
    about = {
        "version": 2,
        "params": parameters.library(),
        "config": {
            "margin": 2, "embedding_method": "hybrid", "fuse_modules": True, "reserve_output_levels": 0,
        },
        "manifest": {
            "galois_elements": [], "bootstrap_slots": [], "boot_logp": None, "btp_logn": None,
            "needs_rlk": True,
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


def _affine_nodes(step: Affine, parameters: Parameters) -> Made:
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
            blobs.append(U32.pack(len(shifts)) + shifts.tobytes() + _doubles(block.dense(parameters.slots)))
        names[f"bias_{r}"] = len(blobs)
        blobs.append(_doubles(step.bias[r]))
    config = {
        "bsgs_ratio": float(1 << LOG_RATIO),
        "output_rotations": step.rotations,
        "num_input_cts": step.inputs,
        "num_output_cts": step.outputs,
    }
    return [_node("map", "linear_transform", step.level, 1, config, names)], [("in", "map")], blobs


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


def _library(name: str) -> ModuleType:
    """Raises InputError where it is not installed, or not for this platform."""
    from importlib import import_module

    try:
        return import_module(name)
    except (ImportError, OSError) as error:
        raise InputError(
            "the ckks runtime needs its libraries",
            where=name,
            got=str(error),
            fix="pip install 'tightrope[ckks]'",
        ) from error
