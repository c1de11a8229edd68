"""Long measurements row by row: one row of hits per key, kept in a file as they come."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from tightrope import checkpoint as disk
from tightrope.data import Data, Split
from tightrope.errors import BundleError
from tightrope.methods.binas.supernet import Supernet
from tightrope.place import tensors_sha256
from tightrope.types import Json

SAVE_EVERY_S = 10.0
ANEW = "delete it, or another --work"
Hits = NDArray[np.bool_]


class Rows:
    """found: (images,) per key. As a context it reads `file`, if there is one, and at the end, interrupted or
    not, writes what was added.

    Raises BundleError for a damaged file, and for one of another `run`.
    """

    def __init__(self, file: Path | None, run: Mapping[str, Json], images: int) -> None:
        self.file, self.run, self.images = file, run, images
        self.found: dict[str, Hits] = {}
        self.saved, self.when = 0, time.monotonic()

    def __enter__(self) -> Rows:
        kept = None if self.file is None else disk.load(self.file, self.run, ANEW)
        if kept is not None:
            keys, packed = kept.progress["keys"], kept.tensors["hits"].numpy()
            if packed.shape != (len(keys), -(-self.images // 8)):
                raise BundleError("the table of hits has another shape than it says", where=str(self.file))
            self.found = dict(zip(keys, np.unpackbits(packed, 1, self.images).astype(bool), strict=True))
            self.saved = len(keys)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._save()

    def add(self, key: str, hits: Hits) -> None:
        self.found[key] = hits
        if time.monotonic() - self.when > SAVE_EVERY_S:
            self._save()

    def _save(self) -> None:
        self.when = time.monotonic()
        if self.file is None or len(self.found) == self.saved:
            return
        packed = torch.from_numpy(np.packbits(np.stack(list(self.found.values())), 1))
        disk.save(self.file, self.run, disk.Checkpoint({"hits": packed}, {"keys": list(self.found)}))
        self.saved = len(self.found)


def identity(supernet: Supernet, data: Data, split: Split, images: int) -> dict[str, Json]:
    """What the rows of a file have in common."""
    return {
        "space": supernet.space.sha256(),
        "supernet": tensors_sha256(supernet.state_dict()),
        "data": {"name": data.name, "train": data.size("train"), "split": split, "images": images},
    }
