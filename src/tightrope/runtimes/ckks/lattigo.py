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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from tightrope.errors import InputError, ProtocolError
from tightrope.runtimes.ckks.circuit import Affine, AnyStep, Circuit, Composite, Refresh, Square
from tightrope.runtimes.ckks.container import container, parts
from tightrope.runtimes.ckks.format import (
    HAS,
    check_boot_keys,
    check_ciphertext,
    key_size,
    scale_of,
    with_scale,
)
from tightrope.runtimes.ckks.parameters import Parameters

U32, U64 = struct.Struct("<I"), struct.Struct("<Q")
NO_KEYS = b"\0\0"
KEPT_BYTES = 1 << 30  # of diagonals: more are handed to the library anew for every image


class Client:
    """Keys, encryption, decryption. The secret key stays inside the library and leaves with the object."""

    def __init__(self, circuit: Circuit) -> None:
        rlwe = _library("lattigo.rlwe")
        self._circuit = circuit
        self._rlwe = rlwe
        self._parameters = _parameters(circuit.parameters)
        self._generator = rlwe.KeyGenerator(self._parameters)
        self._secret = self._generator.gen_secret_key()
        self._encoder = _library("lattigo.ckks").Encoder(self._parameters)
        public = self._generator.gen_public_key(self._secret)
        self._encryptor = rlwe.Encryptor(self._parameters, public)
        self._decryptor = rlwe.Decryptor(self._parameters, self._secret)

    def make_keys(self) -> Iterator[tuple[int | None, bytes]]:
        """The relinearisation key (None) and the Galois keys, ascending, one at a time: they are large."""
        yield None, self._generator.gen_relin_key(self._secret).marshal_binary()
        for element in self._circuit.galois_elements():
            yield element, self._generator.gen_galois_key(self._secret, element).marshal_binary()

    def secret(self) -> bytes:
        """For `keymaker`, another process of the client."""
        data: bytes = self._secret.marshal_binary()
        return data

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


def _parameters(parameters: Parameters) -> Any:
    known = {k: v for k, v in parameters.library().items() if v is not None}
    return _library("lattigo.ckks").Parameters.from_dict(known)


def boot_keys(parameters: Parameters, slots: int, secret: bytes, out: IO[bytes]) -> None:
    """Make and write the keys of bootstrapping so many slots; from the library's memory, without a copy."""
    rlwe, ffi = _library("lattigo.rlwe"), _library("lattigo.ffi")
    known = _parameters(parameters)
    with (
        rlwe.SecretKey.unmarshal_binary(secret) as key,
        rlwe.BootstrapParams(
            known, logn=parameters.log_n, logp=list(parameters.boot_p_bits), h=parameters.slots,
            log_slots=slots.bit_length() - 1,
        ) as bootstrap,
    ):  # fmt: skip
        rest, made = bootstrap.gen_eval_keys(key)
    rest.close()
    error, size = ctypes.c_char_p(None), ctypes.c_ulong(0)
    library = ffi._lib_call()
    start = library.BootstrapEvalKeysMarshal(
        ctypes.c_size_t(made._handle.raw), ctypes.byref(size), ctypes.byref(error)
    )
    ffi._check_err(error)
    made.close()
    out.write((ctypes.c_ubyte * size.value).from_address(start))


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
    """A `Backend` on real ciphertexts, as bytes. Several threads may use it at a time.

    An evaluator of its own bootstraps: then the library does not hold two copies of all keys at a time.
    """

    circuit: Circuit
    evaluator: Any
    refresher: Any
    models: dict[tuple[str, int], Any] | None

    @classmethod
    def load(cls, circuit: Circuit, keys: Path, boot: Path | None = None) -> Server:
        """From a file of `write_keys` and one of `boot_keys`, mapped and not read into memory of their own.

        Raises ProtocolError for files of another size or contents, or that the library refuses.
        """
        _check_file(keys, circuit.parameters, len(circuit.galois_elements()))
        with _mapped(keys) as data:
            evaluator = _evaluator(circuit.parameters, data, None)
        refresher = None
        if boot is not None:
            with _mapped(boot) as data:
                check_boot_keys(data, circuit, str(boot))
                refresher = _evaluator(circuit.parameters, NO_KEYS, data)
        return cls(circuit, evaluator, refresher, {} if sum(circuit.diagonal_bytes()) <= KEPT_BYTES else None)

    @contextmanager
    def _model(self, step: AnyStep, part: int, factors: Sequence[float] | None) -> Iterator[Any]:
        """A step's graph, made when it is needed first, and kept where all of them are small."""
        load = _library("orion_evaluator.model").Model.load
        made = None if self.models is None else self.models.get((step.name, part))
        if made is None:
            made = load(container(step, self.circuit.parameters, part, factors))
        if self.models is not None:
            yield self.models.setdefault((step.name, part), made)
            return
        try:
            yield made
        finally:
            made.close()

    def affine(self, step: Affine, inputs: Sequence[bytes]) -> list[bytes]:
        """Products leave ciphertexts at s^2 / q, not at the scale s: factors in the map make it so again.

        Otherwise the bias, and sums of ciphertexts of different scales, would be wrong by that much, and
        squares would double it every time. The scales depend on the primes alone, so a graph can be kept.
        """
        scale = 2.0**self.circuit.parameters.scale_bits
        made = self._run(step, 0, inputs, factors=[scale / scale_of(x) for x in inputs])
        return [with_scale(y, scale) for y in made]

    def square(self, step: Square, inputs: Sequence[bytes]) -> list[bytes]:
        return self._run(step, 0, inputs)

    def composite(self, step: Composite, inputs: Sequence[bytes]) -> list[bytes]:
        last = parts(step) - 1
        return [y for k, x in enumerate(inputs) for y in self._run(step, min(k, last), [x])]

    def refresh(self, step: Refresh, inputs: Sequence[bytes]) -> list[bytes]:
        """The library refreshes ciphertexts of the scale s alone: a scale off by a part of N / s is garbage
        after it. So it is given the numbers as ones of that scale, and what they were off by is put back.
        """
        scale = 2.0**self.circuit.parameters.scale_bits
        return [
            with_scale(y, scale_of(y) * scale_of(x) / scale)
            for x in inputs
            for y in self._run(step, 0, [with_scale(x, scale)], self.refresher)
        ]

    def level(self, ciphertext: bytes) -> int:
        return check_ciphertext(ciphertext, self.circuit.parameters, "the evaluator's result")

    def _run(
        self,
        step: AnyStep,
        part: int,
        inputs: Sequence[bytes],
        evaluator: Any = None,
        factors: Sequence[float] | None = None,
    ) -> list[bytes]:
        try:
            with self._model(step, part, factors) as model:
                made: list[bytes] = (evaluator or self.evaluator).forward(model, list(inputs))
        except Exception as error:  # the library's own class, known only once it is imported
            missing = "GaloisKey" in str(error)
            what = "a Galois key is missing" if missing else "the evaluator refused a step"
            raise ProtocolError(what, where=step.name, got=str(error)[-300:]) from error
        return made

    def close(self) -> None:
        for model in (self.models or {}).values():
            model.close()
        self.evaluator.close()
        if self.refresher is not None:
            self.refresher.close()


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _evaluator(parameters: Parameters, keys: bytes | mmap.mmap, boot: mmap.mmap | None) -> Any:
    """The library's evaluator; its own constructor would copy the keys twice more."""
    ffi, gohandle = _library("orion_evaluator.ffi"), _library("orion_evaluator.gohandle")
    evaluator = _library("orion_evaluator.evaluator").Evaluator
    library, error = ffi._lib_call(), ctypes.c_char_p(None)
    held = [None if part is None else _first(part) for part in (keys, boot)]
    places = [None if first is None else ctypes.addressof(first) for first in held]
    sizes = [ctypes.c_ulong(0 if part is None else len(part)) for part in (keys, boot)]
    handle = library.EvalNewEvaluator(
        json.dumps(parameters.library()).encode(),
        places[0],
        sizes[0],
        places[1],
        sizes[1],
        ctypes.byref(error),
    )
    del held
    try:
        ffi._check_err(error)
    except Exception as failure:
        raise ProtocolError("the keys cannot be read", got=str(failure)) from failure
    made = evaluator.__new__(evaluator)
    made._handle = gohandle.GoHandle(int(handle), tag="Evaluator", delete_fn=ffi._delete_handle)
    return made


def _first(data: bytes | mmap.mmap) -> Any:
    """Its first byte, to take the address of; it must not outlive the data."""
    return ctypes.create_string_buffer(data) if isinstance(data, bytes) else ctypes.c_char.from_buffer(data)


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
