"""Microsoft SEAL, through TenSEAL, as an oracle of the whole encrypted path on a shallow network.

Opt-in: `pip install 'tightrope[crosscheck]'`. The second `Backend` there is: secret key and weights in one
process, so for checks alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import nn

from ckks_toys import ToyCKKS
from tightrope.nn import PolynomialActivation
from tightrope.program import Program
from tightrope.runtimes.ckks import CKKS
from tightrope.runtimes.ckks.circuit import Affine, Circuit, Composite, Refresh, Square
from tightrope.runtimes.ckks.compiler import compile_program
from tightrope.runtimes.ckks.evaluate import evaluate
from tightrope.runtimes.plain import evaluate as plain

from test_packing import calibrated  # isort: skip

seal = pytest.importorskip("tenseal.sealapi")
pytest.importorskip("lattigo")
pytest.importorskip("orion_evaluator")

GENERATOR = 3  # of SEAL's rotations


class Seal:
    def __init__(self, circuit: Circuit) -> None:
        ring = circuit.parameters
        asked = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
        asked.set_poly_modulus_degree(1 << ring.log_n)
        bits = [*ring.q_bits, max(ring.q_bits)]
        asked.set_coeff_modulus(seal.CoeffModulus.Create(1 << ring.log_n, bits))
        context = seal.SEALContext(asked, True, seal.SEC_LEVEL_TYPE.TC128)  # SEAL checks security too
        assert context.parameters_set()
        keys = seal.KeyGenerator(context)
        public, self.relin, self.galois = seal.PublicKey(), seal.RelinKeys(), seal.GaloisKeys()
        keys.create_public_key(public)
        keys.create_relin_keys(self.relin)
        keys.create_galois_keys([pow(GENERATOR, k, 2 << ring.log_n) for k in shifts(circuit)], self.galois)
        self.scale = 2.0**ring.scale_bits
        self.encoder, self.evaluator = seal.CKKSEncoder(context), seal.Evaluator(context)
        self.encryptor = seal.Encryptor(context, public)
        self.decryptor = seal.Decryptor(context, keys.secret_key())
        self.slots = ring.slots

    def encrypt(self, slots: NDArray[np.float64]) -> Any:
        text, made = seal.Plaintext(), seal.Ciphertext()
        self.encoder.encode(slots.tolist(), self.scale, text)
        self.encryptor.encrypt(text, made)
        return made

    def decrypt(self, ciphertext: Any) -> NDArray[np.float64]:
        text = seal.Plaintext()
        self.decryptor.decrypt(ciphertext, text)
        return np.array(self.encoder.decode_double(text))

    def level(self, ciphertext: Any) -> int:
        return int(ciphertext.coeff_modulus_size()) - 1

    def _rescaled(self, ciphertext: Any) -> Any:
        made = seal.Ciphertext()
        self.evaluator.rescale_to_next(ciphertext, made)
        made.scale = self.scale  # off by what the prime is: far below what is compared
        return made

    def _encoded(self, slots: NDArray[np.float64], like: Any) -> Any:
        text = seal.Plaintext()
        self.encoder.encode(slots.tolist(), like.parms_id(), self.scale, text)
        return text

    def affine(self, step: Affine, inputs: Sequence[Any]) -> list[Any]:
        made = []
        for r in range(step.outputs):
            terms = []
            for c, x in enumerate(inputs):
                block = step.blocks[r, c]
                for shift, diagonal in zip(block.shifts, block.dense(self.slots), strict=True):
                    turned, term = seal.Ciphertext(), seal.Ciphertext()
                    self.evaluator.rotate_vector(x, shift, self.galois, turned)
                    self.evaluator.multiply_plain(turned, self._encoded(diagonal, turned), term)
                    terms.append(term)
            total = terms[0]
            for term in terms[1:]:
                self.evaluator.add_inplace(total, term)
            total = self._rescaled(total)
            self.evaluator.add_plain_inplace(total, self._encoded(step.bias[r], total))
            for k in range(1, step.rotations + 1):
                turned = seal.Ciphertext()
                self.evaluator.rotate_vector(total, self.slots >> k, self.galois, turned)
                self.evaluator.add_inplace(total, turned)
            made.append(total)
        return made

    def square(self, step: Square, inputs: Sequence[Any]) -> list[Any]:
        made = []
        for x in inputs:
            product, short = seal.Ciphertext(), seal.Ciphertext()
            self.evaluator.square(x, product)
            self.evaluator.relinearize(product, self.relin, short)
            made.append(self._rescaled(short))
        return made

    def composite(self, step: Composite, inputs: Sequence[Any]) -> list[Any]:
        raise NotImplementedError

    def refresh(self, step: Refresh, inputs: Sequence[Any]) -> list[Any]:
        raise NotImplementedError


def shifts(circuit: Circuit) -> set[int]:
    maps = [step for step in circuit.steps if isinstance(step, Affine)]
    found = {shift for step in maps for block in step.blocks.values() for shift in block.shifts}
    found |= {circuit.parameters.slots >> k for step in maps for k in range(1, step.rotations + 1)}
    return found - {0}


def shallow() -> tuple[Program, Any]:
    act = PolynomialActivation([[0.2, 0.5, 0.25]], gated=False)
    net = nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), act, nn.Flatten(), nn.Linear(32, 3))
    return calibrated(net, (1, 8, 8))


@pytest.mark.slow
def test_seal_and_lattigo_agree_on_a_shallow_network() -> None:
    program, x = shallow()
    circuit = compile_program(program, CKKS().parameters)
    backend, want = Seal(circuit), plain(program, x[:1]).numpy()[0]
    value = circuit.values[circuit.input]
    packed = value.layout.pack(x[0].numpy().astype(np.float64) / value.scale)
    inputs = [backend.encrypt(row) for row in packed]
    top = backend.level(inputs[0])
    assert top == circuit.parameters.levels
    outcome = evaluate(circuit, backend, inputs)
    result = circuit.values[circuit.output]
    ours = result.layout.unpack(np.stack([backend.decrypt(y) for y in outcome.outputs])) * result.scale
    with ToyCKKS().open(program) as session:
        theirs, _ = session.run(x[:1].numpy())
    assert np.abs(ours.reshape(-1) - theirs[0]).max() < 1e-3
    assert np.abs(ours.reshape(-1) - want).max() < 1e-3 and np.abs(want).max() > 0.1
