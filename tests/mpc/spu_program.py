"""Run a Program of plain ReLUs under SPU's ABY3, three parties in one process; with the interpreter of SPU.

PYTHON spu_program.py STRUCTURE.json TENSORS.npz FRACTION_BITS: TENSORS has `x` and the weights, all secret;
the outputs are written to TENSORS.npz.out.npy.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import spu
from spu.utils.simulation import Simulator, sim_jax


def conv2d(op: dict[str, Any], tensors: dict[str, Any], x: Any) -> Any:
    left, right, top, bottom = op["padding"]
    y = jax.lax.conv_general_dilated(
        x,
        tensors[op["name"] + ".weight"],
        window_strides=op["stride"],
        padding=((top, bottom), (left, right)),
        rhs_dilation=op["dilation"],
        feature_group_count=op["groups"],
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
    )
    return y + tensors[op["name"] + ".bias"][:, None, None]


OPS = {
    "conv2d": conv2d,
    "linear": lambda op, t, x: x @ t[op["name"] + ".weight"].T + t[op["name"] + ".bias"],
    "relu": lambda op, t, x: jnp.maximum(x, 0),
    "add": lambda op, t, x, y: x + y,
    "global_avg_pool": lambda op, t, x: x.mean((2, 3), keepdims=True),
    "flatten": lambda op, t, x: x.reshape(len(x), -1),
}


def main() -> None:
    body = json.loads(Path(sys.argv[1]).read_text())
    tensors = {name: array.astype(np.float32) for name, array in np.load(sys.argv[2]).items()}

    def network(tensors: dict[str, Any]) -> Any:
        values = {"input": tensors["x"]}
        for op in body["ops"]:
            values[op["name"]] = OPS[op["kind"]](op, tensors, *(values[name] for name in op["inputs"]))
        return values[body["output"]]

    config = spu.RuntimeConfig(protocol=spu.ProtocolKind.ABY3, field=spu.FieldType.FM64)
    config.fxp_fraction_bits = int(sys.argv[3])
    np.save(sys.argv[2] + ".out.npy", sim_jax(Simulator(3, config), network)(tensors))


if __name__ == "__main__":
    main()
