"""A second back end for checks: Microsoft SEAL, through TenSEAL (`pip install 'tightrope[crosscheck]'`).

Secret key and weights are in this one process, so it protects nothing: it shows that another library, with
keys and roundings of its own, comes to the same results. Quadratics alone, no bootstraps.
"""

from __future__ import annotations

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
from tightrope.runtimes.ckks.evaluate import evaluate
from tightrope.types import Measurement

if TYPE_CHECKING:
    from tightrope.runtimes.ckks.config import CKKS

GENERATOR = 3  # of SEAL's rotations
INSTALL = "pip install 'tightrope[crosscheck]'"


class CrosscheckSession(Books):
    """One image at a time, on one core; the client's `setup_links` are those that two parties would have."""

    def __init__(self, program: Program, config: CKKS, circuit: Circuit) -> None:
        super().__init__(program, config, circuit)
        needed, free = key_bytes(circuit), memory.allowed(config)
        if needed > free:
            raise InputError(
                "the keys need more memory than allowed", where="ckks, crosscheck",
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
        needed = key_bytes(self.circuit)
        return np.stack(outputs), self.measured("crosscheck", spent, needed, elapsed, setup_ms=self.setup_ms)

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
        for step in circuit.steps:
            if isinstance(step, Composite | Refresh):
                what = "a bootstrap" if isinstance(step, Refresh) else "a polynomial that is no quadratic"
                raise InputError(
                    "crosscheck executes maps and quadratics alone", where=step.ops[-1], got=what,
                    fix="execute (without --mode)",
                )  # fmt: skip
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
            terms = [
                self._times(self._turned(x, shift), diagonal)
                for c, x in enumerate(inputs)
                if (block := step.blocks.get((r, c))) is not None
                for shift, diagonal in zip(block.shifts, block.dense(self._slots), strict=True)
                if diagonal.any()
            ]
            if not terms:
                raise InputError("a map of zeros: nothing is encrypted in its result", where=step.ops[-1])
            total = terms[0]
            for term in terms[1:]:
                self._evaluator.add_inplace(total, term)
            total = self._rescaled(total)
            self._evaluator.add_plain_inplace(total, self._encoded(step.bias[r], total))
            for k in range(1, step.rotations + 1):
                self._evaluator.add_inplace(total, self._turned(total, self._slots >> k))
            made.append(total)
        return made

    def square(self, step: Square, inputs: Sequence[Any]) -> list[Any]:
        made = []
        for x in inputs:
            product, short = self._lib.Ciphertext(), self._lib.Ciphertext()
            self._evaluator.square(self._at(x, step.level), product)
            self._evaluator.relinearize(product, self._relin, short)
            made.append(self._rescaled(short))
        return made

    def composite(self, step: Composite, inputs: Sequence[Any]) -> list[Any]:
        raise NotImplementedError

    def refresh(self, step: Refresh, inputs: Sequence[Any]) -> list[Any]:
        raise NotImplementedError

    def _at(self, ciphertext: Any, level: int) -> Any:
        while self.level(ciphertext) > level:
            lower = self._lib.Ciphertext()
            self._evaluator.mod_switch_to_next(ciphertext, lower)
            ciphertext = lower
        return ciphertext

    def _turned(self, ciphertext: Any, shift: int) -> Any:
        turned = self._lib.Ciphertext()
        self._evaluator.rotate_vector(ciphertext, shift, self._galois, turned)
        return turned

    def _times(self, ciphertext: Any, slots: NDArray[np.float64]) -> Any:
        product = self._lib.Ciphertext()
        self._evaluator.multiply_plain(ciphertext, self._encoded(slots, ciphertext), product)
        return product

    def _rescaled(self, ciphertext: Any) -> Any:
        made = self._lib.Ciphertext()
        self._evaluator.rescale_to_next(ciphertext, made)
        made.scale = self._scale  # off by what the prime is: far below what is compared
        return made

    def _encoded(self, slots: NDArray[np.float64], like: Any) -> Any:
        text = self._lib.Plaintext()
        self._encoder.encode(slots.tolist(), like.parms_id(), self._scale, text)
        return text


def shifts(circuit: Circuit) -> set[int]:
    """Of all rotations, without the baby and giant steps that the default back end shares."""
    maps = [step for step in circuit.steps if isinstance(step, Affine)]
    found = {shift for step in maps for block in step.blocks.values() for shift in block.shifts}
    found |= {circuit.parameters.slots >> k for step in maps for k in range(1, step.rotations + 1)}
    return found - {0}


def key_bytes(circuit: Circuit) -> int:
    """Of all keys: SEAL decomposes into as many parts as there are primes."""
    primes = circuit.parameters.levels + 1
    return (len(shifts(circuit)) + 1) * primes * 2 * (primes + 1) * (8 << circuit.parameters.log_n)


def library() -> ModuleType:
    """Raises InputError where TenSEAL is not installed."""
    try:
        from tenseal import sealapi
    except ImportError as error:
        raise InputError("tenseal is not installed", got=str(error), fix=INSTALL) from error
    found: ModuleType = sealapi
    return found
