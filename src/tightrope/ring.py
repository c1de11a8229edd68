"""Which ring the mpc runtime uses for a bundle's network: checked on training images, kept in ring.json."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tightrope.bundle import Bundle, read_json, write_json
from tightrope.errors import InputError
from tightrope.forms import Amount
from tightrope.runtimes.mpc import MPC, fit
from tightrope.types import Json

RINGS = ("64", "32", "auto")
FILE = "ring.json"
IMAGES = 32  # training images behind the choice
TOLERATED = 2.0**-6  # largest error of an output for which `auto` takes the small ring
FORM = {"program": str, "fits": bool, "fraction_bits": int, "weight_bits": int, "max_abs_error": Amount}


def settings(bundle: Bundle, ring: str) -> dict[str, Json]:
    """The settings of `MPC` for `ring`: 64, 32, or auto, the small ring where it is precise enough.

    What fits the small ring is found in the clear on training images the first time (`widths.fit`), and read
    from the bundle after that, as long as its program is the same.
    Raises InputError for another ring, and for 32 where the network's ranges leave no room.
    """
    if ring not in RINGS:
        raise InputError("no such ring", got=ring, allowed=", ".join(RINGS))
    if ring == "64":
        return {"ring_bits": 64}
    found = _fitted(bundle)
    if not found["fits"]:
        if ring == "auto":
            return {"ring_bits": 64}
        raise InputError(
            "the network's ranges leave no room in the small ring", where=str(bundle.path), fix="--ring 64"
        )
    if ring == "auto" and found["max_abs_error"] > TOLERATED:
        return {"ring_bits": 64}
    return {"ring_bits": 32, "fraction_bits": found["fraction_bits"], "weight_bits": found["weight_bits"]}


def _fitted(bundle: Bundle) -> Mapping[str, Json]:
    program, path = bundle.program(), bundle.path / FILE
    if path.exists():
        kept: Mapping[str, Json] = read_json(path, FORM)
        if kept["program"] == program.sha256():
            return kept
    batches = bundle.data().batches("train", IMAGES, shuffle=True, limit=IMAGES)
    x = torch.cat([images for images, _ in batches]).double().numpy()
    found: dict[str, Json] = {"program": program.sha256()}
    try:
        config, error = fit(program, MPC(ring_bits=32), x)
    except InputError:
        found |= {"fits": False, "fraction_bits": 0, "weight_bits": 0, "max_abs_error": 0.0}
    else:
        widths = {"fraction_bits": config.fraction_bits, "weight_bits": config.weight_bits}
        found |= {"fits": True, **widths, "max_abs_error": error}
    write_json(path, found)
    return found
