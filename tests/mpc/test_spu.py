"""Another group's three-party protocol on the same network: SPU's ABY3, where its environment is.

python -m venv SPU && SPU/bin/pip install spu==0.9.5
TIGHTROPE_SPU=SPU python -m pytest -m spu
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from networks import Images, TinyResNet
from tightrope.lower import lower
from tightrope.runtimes.mpc import MPC
from tightrope.runtimes.plain import evaluate, ranges

SCRIPT = Path(__file__).with_name("spu_program.py")
FRACTION_BITS = 18  # SPU's default in this ring
# Each of the 5 layers on the longest path adds at most 4 units of 2^-18 an element (weights rounded, ABY3's
# truncation off by one, ours by one), and the next layers multiply that by less than 2^5 in all.
BOUND = 5 * 4 * 2.0 ** (5 - FRACTION_BITS)


@pytest.mark.spu
def test_logits_are_those_of_aby3(trained: tuple[TinyResNet, Images], tmp_path: Path) -> None:
    home = os.environ.get("TIGHTROPE_SPU")
    if home is None or not (Path(home) / "bin" / "python").exists():
        pytest.skip("TIGHTROPE_SPU does not name a virtual environment with spu")
    net, images = trained
    x = images.x[:8]
    program = ranges(lower(net, tuple(x.shape[1:])), [images.x[:64]])
    (tmp_path / "structure.json").write_text(program.structure())
    np.savez(tmp_path / "tensors.npz", x=x.numpy(), **program.tensors)
    command = [Path(home) / "bin" / "python", SCRIPT, "structure.json", "tensors.npz", str(FRACTION_BITS)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = np.load(tmp_path / "tensors.npz.out.npy")
    config = MPC(fraction_bits=FRACTION_BITS, weight_bits=FRACTION_BITS, noise_bits=0)
    with config.open(program, "simulate") as session:
        ours, _ = session.run(x.double().numpy())
    assert np.abs(ours - theirs).max() < BOUND
    assert np.abs(theirs - evaluate(program, x).numpy()).max() < BOUND
    top = np.sort(ours, 1)
    clear = top[:, -1] - top[:, -2] > 2 * BOUND
    assert clear.any()
    assert (ours.argmax(1) == theirs.argmax(1))[clear].all()
