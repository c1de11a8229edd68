"""Reproducible AES-CTR test material: the statistical tests must not depend on the day they are run."""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray


class Material:
    """A keystream under a fixed test key."""

    def __init__(self, seed: int) -> None:
        self._aes = Cipher(algorithms.AES(seed.to_bytes(16, "little")), modes.CTR(bytes(16))).encryptor()

    def raw(self, count: int) -> bytes:
        return self._aes.update(bytes(count))

    def words(self, *shape: int) -> NDArray[np.uint64]:
        return np.frombuffer(self.raw(8 * int(np.prod(shape))), np.uint64).reshape(shape).copy()

    def bits(self, count: int) -> NDArray[np.uint8]:
        return np.frombuffer(self.raw(count), np.uint8) & 1
