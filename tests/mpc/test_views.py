"""What each party receives, over many sessions with chosen secrets: uniform, new every time, and the same
distribution whatever the secrets are. The dealer receives what does not depend on them at all."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deployment import deployed
from numpy.typing import NDArray
from torch import nn

from tightrope.lower import lower
from tightrope.nn import BlockReLU
from tightrope.program import Program
from tightrope.runtimes.mpc import MPC, compile_program
from tightrope.runtimes.mpc.channel import Channel
from tightrope.runtimes.mpc.packing import packed
from tightrope.runtimes.mpc.party import Party
from tightrope.runtimes.mpc.steps import UNIT_BITS, Gate, RevealLabel
from tightrope.runtimes.mpc.team import LocalTeam
from tightrope.runtimes.plain import ranges

pytestmark = pytest.mark.slow
SHAPE = (1, 4, 4)
SESSIONS = 64
CONFIGS = {
    "logits": MPC(timeout_s=20, threads=1),
    "label": MPC(timeout_s=20, threads=1, reveal="label"),
    "small ring": MPC(
        timeout_s=20, threads=1, ring_bits=32, fraction_bits=9, weight_bits=9, margin=2.0, noise_bits=6
    ),
}
# Patches' sums as large as if they were far from their means: what they are compared in has more bits.
SUMS = {"sums in 40 bits": 2.0**13, "sums in 48 bits": 2.0**19}
CONFIGS |= dict.fromkeys(SUMS, CONFIGS["small ring"])
# Beyond it a normal variable is once in 10^10, the mean of SESSIONS coins once in 10^11; some 10^5 are tried.
SIGMAS = 6.5
# By name, (image, weights): the largest of each, and the pattern that it is multiplied with.
SECRETS = {"zero": (0.0, 0.0), "equal": (0.5, 0.25), "extreme": (1.25, -0.9)}


def tiny(sums: float = 1.0) -> Program:
    """`sums`: by how much the range of the patches' sums is larger than it was seen."""
    torch.manual_seed(3)
    patches = [(1, 1), (2, 2)]
    model = nn.Sequential(nn.Conv2d(1, 2, 3, 1, 1), BlockReLU(patches), nn.Flatten(), nn.Linear(32, 3)).eval()
    program = ranges(lower(model, SHAPE), [torch.randn(64, *SHAPE)])
    return replace(program, ranges=program.ranges | {"1:tiles": sums * program.ranges["1:tiles"]})


def chosen(program: Program, name: str) -> tuple[Program, NDArray[np.float64]]:
    """The program with weights, and an image, that are as unlike random ones as can be."""
    image, weight = SECRETS[name]

    def alternating(shape: tuple[int, ...], size: float) -> NDArray[np.float64]:
        signs = np.where(np.arange(int(np.prod(shape))) % 2, 1.0, -1.0).reshape(shape)
        return size * (signs if name == "extreme" else np.ones(shape))

    tensors = {k: alternating(v.shape, weight).astype(v.dtype) for k, v in program.tensors.items()}
    x = alternating((1, *SHAPE), image * program.ranges[Program.INPUT])
    return replace(program, tensors=tensors), x


def view(program: Program, config: MPC, x: NDArray[np.float64]) -> dict[str, tuple[bytes, bytes]]:
    """One session of one image: by role, the words and other bytes that it received, and the lone bits."""
    team = LocalTeam(program, config, secrets.token_bytes(16))
    seen: dict[str, tuple[list[bytes], list[bytes]]] = {role: ([], []) for role in team.workers}
    for role, worker in team.workers.items():

        def receive(
            step: Any, message: Any, batch: int, party: Party = worker.party, to: Any = seen[role]
        ) -> Any:
            arrays = Party.receive(party, step, message, batch)
            if isinstance(step, RevealLabel):  # only so many bits of it are sent
                low = arrays["label"][:, None] >> np.arange(step.bits, dtype=np.uint32)
                to[1].append((low & 1).astype(np.uint8).tobytes())
                assert (arrays["label"] < 1 << step.bits).all()
                return arrays
            for field in message.fields:
                bits, whole = UNIT_BITS[field.unit], arrays[field.name]
                sent = packed(whole, bits) if bits in (40, 48) else whole
                to[field.unit == "bit"].append(sent.tobytes())
            return arrays

        worker.party.receive = receive  # type: ignore[method-assign, assignment]
    team.call("setup", 0)
    team.call("offline", 1)
    team.call("online", 1, x)
    team.close()
    return {role: (b"".join(words), b"".join(bits)) for role, (words, bits) in seen.items()}


def coins(views: list[tuple[bytes, bytes]]) -> NDArray[np.uint8]:
    """(sessions, bits): every bit received, in the order in which they came."""
    words = np.array([np.frombuffer(words, np.uint8) for words, _ in views])
    bits = np.array([np.frombuffer(bits, np.uint8) for _, bits in views])
    return np.concatenate([np.unpackbits(words, axis=1), bits], axis=1)


@pytest.mark.parametrize("name", CONFIGS)
def test_views_are_uniform_new_and_independent_of_the_secrets(name: str) -> None:
    program, config = tiny(SUMS.get(name, 1.0)), CONFIGS[name]
    steps = compile_program(program, config).steps
    rings = {step.input.ring_bits for step in steps if isinstance(step, Gate)}
    assert rings == {int(name.split()[2]) if name in SUMS else config.ring_bits}
    views: Mapping[str, dict[str, list[tuple[bytes, bytes]]]] = {
        role: {secret: [] for secret in SECRETS} for role in ("client", "server", "dealer")
    }
    for secret in SECRETS:
        known, x = chosen(program, secret)
        for _ in range(SESSIONS):
            for role, received in view(known, config, x).items():
                views[role][secret].append(received)
    assert all(received == (b"", b"") for secret in SECRETS for received in views["dealer"][secret])
    for role in ("client", "server"):
        found = {secret: coins(views[role][secret]) for secret in SECRETS}
        ones = {secret: bits.sum(0, dtype=np.int64) for secret, bits in found.items()}
        for secret, count in ones.items():
            sigmas = (count - SESSIONS / 2) / np.sqrt(SESSIONS / 4)
            assert sigmas.size > 3000 and np.abs(sigmas).max() < SIGMAS, (role, secret)
            spread = (sigmas**2).sum()  # over positions: chi-square
            assert abs(spread - sigmas.size) < SIGMAS * np.sqrt(2 * sigmas.size), (role, secret)
        for one, other in (("zero", "equal"), ("zero", "extreme"), ("equal", "extreme")):
            sigmas = (ones[one] - ones[other]) / np.sqrt(SESSIONS / 2)
            assert np.abs(sigmas).max() < SIGMAS, (role, one, other)
        every = b"".join(words for secret in SECRETS for words, _ in views[role][secret])
        blocks = np.frombuffer(every[: len(every) // 16 * 16], "V16")
        assert len(set(blocks.tolist())) == len(blocks) > 1000  # no mask, no share and no key came twice


def test_the_dealer_of_a_deployment_receives_nothing_that_depends_on_the_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frame by frame, but for session ids, public keys of the exchange and times."""
    received: list[tuple[str, Any]] = []
    bounded, exact = Channel.recv_bounded, Channel.recv_into

    def recv_bounded(self: Channel, *args: Any, **options: Any) -> bytes:
        data = bounded(self, *args, **options)
        if self.own == "dealer":
            body = json.loads(data)
            for changing in ("key", "session"):
                body.pop(changing, None)
            body.get("agreed", {}).pop("session", None)
            received.append((self.peer, body))
        return data

    def recv_into(self: Channel, *args: Any, **options: Any) -> None:
        assert self.own != "dealer"
        exact(self, *args, **options)

    monkeypatch.setattr(Channel, "recv_bounded", recv_bounded)
    monkeypatch.setattr(Channel, "recv_into", recv_into)
    d = deployed(tmp_path, mpc='reveal = "label"')
    told = []
    for secret in SECRETS:
        known, x = chosen(tiny(), secret)
        known.save(tmp_path / "server")
        known.public().save(tmp_path / "public")
        with d.service("server"), d.service("dealer"):
            d.infer(np.repeat(np.clip(x, -1, 1), 2, 0))
            deadline = time.monotonic() + 20  # the client does not wait for the dealer's last frame: we do
            while ("client", {"command": "close"}) not in received and time.monotonic() < deadline:
                time.sleep(0.01)
        told.append(sorted(json.dumps(frame) for frame in received))
        received.clear()
    assert told[0] == told[1] == told[2] and len(told[0]) >= 7  # 2 questions, 2 hellos, 3 commands
