"""A second back end for checks: Microsoft SEAL, through TenSEAL (`pip install 'tightrope[crosscheck]'`).

Secret key and weights are in this one process, so it protects nothing: it shows that another library, with
keys and roundings of its own, comes to the same results. Quadratics alone, no bootstraps.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tightrope.errors import InputError, ProtocolError
from tightrope.program import Program
from tightrope.runtimes.ckks import memory
from tightrope.runtimes.ckks.books import Books
from tightrope.runtimes.ckks.circuit import Affine, Circuit, Composite, Refresh, Square
from tightrope.runtimes.ckks.cost import PROCESS_BYTES
from tightrope.runtimes.ckks.evaluate import evaluate
from tightrope.types import Json, Measurement

if TYPE_CHECKING:
    from tightrope.runtimes.ckks.config import CKKS

GENERATOR = 3  # of SEAL's rotations
INSTALL = "pip install 'tightrope[crosscheck]'"


class CrosscheckSession(Books):
    """One image at a time, on one core. Bytes of the measurement are those of `execute`, as nothing is sent
    here; its peak memory is an estimate.

    Raises InputError for a polynomial that is no quadratic, a bootstrap, and keys larger than allowed.
    """

    def __init__(self, program: Program, config: CKKS, circuit: Circuit) -> None:
        super().__init__(program, config, circuit)
        for step in circuit.steps:
            if isinstance(step, Composite | Refresh):
                what = "a bootstrap" if isinstance(step, Refresh) else "a polynomial that is no quadratic"
                raise InputError(
                    "crosscheck executes maps and quadratics alone", where=step.ops[-1], got=what,
                    fix="execute (without --mode)",
                )  # fmt: skip
        needed, free = memory_bytes(circuit), memory.allowed(config)
        print(
            f"ckks, crosscheck: {len(shifts(circuit)) + 1} keys, memory {needed / 1e9:.2g} GB",
            file=sys.stderr,
        )
        if needed > free:
            raise InputError(
                "SEAL's keys need more memory than allowed", where="ckks, crosscheck",
                got=f"{needed / 1e9:.3g} GB", allowed=f"{free / 1e9:.3g} GB", fix="a smaller network",
            )  # fmt: skip
        start = time.perf_counter()
        self._seal: Seal | None = Seal(circuit)
        self.setup_ms = (time.perf_counter() - start) * 1e3

    def run(self, x: NDArray[Any]) -> tuple[NDArray[np.float64], Measurement]:
        """(N, *input_shape) -> (N, *output shape), encrypted, evaluated and decrypted by SEAL.

        Raises InputError for an input of another shape or not finite; ProtocolError after `close`.
        """
        x = np.ascontiguousarray(x, np.float64)
        self.program.check_input(x)
        if self._seal is None:
            raise ProtocolError("the session is closed")
        start, outputs, spent = time.perf_counter(), [], []
        for sample in x:
            outcome = evaluate(self.circuit, self._seal, [*map(self._seal.encrypt, self.packed(sample))])
            outputs.append(self.unpacked([self._seal.decrypt(y) for y in outcome.outputs]))
            spent.append(outcome.spent)
        elapsed = (time.perf_counter() - start) * 1e3
        own: dict[str, Json] = {
            "setup_ms": self.setup_ms,
            "keys": len(shifts(self.circuit)) + 1,
            "threads": 1,
        }
        needed = memory_bytes(self.circuit)
        return np.stack(outputs), self.measured("crosscheck", spent, needed, elapsed, **own)

    def close(self) -> None:
        self._seal = None

    def __enter__(self) -> CrosscheckSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


class Seal:
    """A `Backend` on SEAL's ciphertexts, with the secret key."""

    def __init__(self, circuit: Circuit) -> None:
        self._lib = lib = library()
        ring = circuit.parameters
        asked = lib.EncryptionParameters(lib.SCHEME_TYPE.CKKS)
        asked.set_poly_modulus_degree(1 << ring.log_n)
        bits = [*ring.q_bits, max(ring.q_bits)]
        asked.set_coeff_modulus(lib.CoeffModulus.Create(1 << ring.log_n, bits))
        context = lib.SEALContext(asked, True, lib.SEC_LEVEL_TYPE.TC128)  # SEAL checks security too
        if not context.parameters_set():
            raise InputError("SEAL refuses these parameters", where="ckks, crosscheck", got=str(ring))
        keys = lib.KeyGenerator(context)
        public, self._relin, self._galois = lib.PublicKey(), lib.RelinKeys(), lib.GaloisKeys()
        keys.create_public_key(public)
        keys.create_relin_keys(self._relin)
        keys.create_galois_keys([pow(GENERATOR, k, 2 << ring.log_n) for k in shifts(circuit)], self._galois)
        self._scale, self._slots = 2.0**ring.scale_bits, ring.slots
        self._primes = [int(prime.value()) for prime in asked.coeff_modulus()]
        self._top = circuit.values[circuit.input].level
        self._encoder, self._evaluator = lib.CKKSEncoder(context), lib.Evaluator(context)
        self._encryptor = lib.Encryptor(context, public)
        self._decryptor = lib.Decryptor(context, keys.secret_key())

    def encrypt(self, slots: NDArray[np.float64]) -> Any:
        text, made = self._lib.Plaintext(), self._lib.Ciphertext()
        self._encoder.encode(slots.tolist(), self._scale, text)
        self._encryptor.encrypt(text, made)
        return self._at(made, self._top)

    def decrypt(self, ciphertext: Any) -> NDArray[np.float64]:
        text = self._lib.Plaintext()
        self._decryptor.decrypt(ciphertext, text)
        return np.array(self._encoder.decode_double(text))

    def level(self, ciphertext: Any) -> int:
        return int(ciphertext.coeff_modulus_size()) - 1

    def affine(self, step: Affine, inputs: Sequence[Any]) -> list[Any]:
        inputs = [self._at(x, step.level) for x in inputs]
        made = []
        for r in range(step.outputs):
            total = None
            for c, x in enumerate(inputs):
                if (block := step.blocks.get((r, c))) is None:
                    continue
                for shift, diagonal in zip(block.shifts, block.dense(self._slots), strict=True):
                    # So that what is left after the prime of this level is divided out has the scale itself.
                    wanted = self._scale * self._primes[step.level] / x.scale
                    text = self._encoded(diagonal, x, wanted)
                    if text.is_zero():  # SEAL makes no ciphertext that everybody can read
                        continue
                    term = self._lib.Ciphertext()
                    self._evaluator.multiply_plain(self._turned(x, shift), text, term)
                    if total is None:
                        total = term
                    else:
                        self._evaluator.add_inplace(total, term)
            rescaled = self._zero(step.level - 1) if total is None else self._rescaled(total)
            rescaled.scale = self._scale  # but for the rounding of a float
            bias = self._encoded(step.bias[r], rescaled, self._scale)
            self._evaluator.add_plain_inplace(rescaled, bias)
            for k in range(1, step.rotations + 1):
                self._evaluator.add_inplace(rescaled, self._turned(rescaled, self._slots >> k))
            made.append(rescaled)
        return made

    def square(self, step: Square, inputs: Sequence[Any]) -> list[Any]:
        """Its scale is off by what the prime is, and the map that follows makes up for it."""
        made = []
        for x in inputs:
            product, short = self._lib.Ciphertext(), self._lib.Ciphertext()
            self._evaluator.square(self._at(x, step.level), product)
            self._evaluator.relinearize(product, self._relin, short)
            made.append(self._rescaled(short))
        return made

    def composite(self, step: Composite, inputs: Sequence[Any]) -> list[Any]:
        raise NotImplementedError  # refused when the session was opened

    def refresh(self, step: Refresh, inputs: Sequence[Any]) -> list[Any]:
        raise NotImplementedError  # the same

    def _at(self, ciphertext: Any, level: int) -> Any:
        while self.level(ciphertext) > level:
            lower = self._lib.Ciphertext()
            self._evaluator.mod_switch_to_next(ciphertext, lower)
            ciphertext = lower
        return ciphertext

    def _turned(self, ciphertext: Any, shift: int) -> Any:
        if shift == 0:
            return ciphertext
        turned = self._lib.Ciphertext()
        self._evaluator.rotate_vector(ciphertext, shift, self._galois, turned)
        return turned

    def _zero(self, level: int) -> Any:
        made = self._lib.Ciphertext()
        self._encryptor.encrypt_zero(made)
        made.scale = self._scale
        return self._at(made, level)

    def _rescaled(self, ciphertext: Any) -> Any:
        made = self._lib.Ciphertext()
        self._evaluator.rescale_to_next(ciphertext, made)
        return made

    def _encoded(self, slots: NDArray[np.float64], like: Any, scale: float) -> Any:
        text = self._lib.Plaintext()
        self._encoder.encode(slots.tolist(), like.parms_id(), scale, text)
        return text


def shifts(circuit: Circuit) -> set[int]:
    """Of all rotations, without the baby and giant steps that the default back end shares."""
    maps = [step for step in circuit.steps if isinstance(step, Affine)]
    found = {shift for step in maps for block in step.blocks.values() for shift in block.shifts}
    found |= {circuit.parameters.slots >> k for step in maps for k in range(1, step.rotations + 1)}
    return found - {0}


def memory_bytes(circuit: Circuit) -> int:
    """Of this process, all keys (SEAL decomposes into as many parts as there are primes) and the values."""
    primes, row = circuit.parameters.levels + 1, 8 << circuit.parameters.log_n
    keys = (len(shifts(circuit)) + 1) * primes * 2 * (primes + 1) * row
    most = max(value.layout.ciphertexts for value in circuit.values.values())
    encoded = max((s.encoded for s in circuit.steps if isinstance(s, Affine)), default=0)
    return PROCESS_BYTES + keys + (4 * most + 8) * 2 * primes * row + encoded * row // 2


def library() -> ModuleType:
    """Raises InputError where TenSEAL is not installed."""
    try:
        from tenseal import sealapi
    except ImportError as error:
        raise InputError("tenseal is not installed", got=str(error), fix=INSTALL) from error
    found: ModuleType = sealapi
    return found
