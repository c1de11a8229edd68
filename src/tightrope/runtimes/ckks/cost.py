"""What a circuit costs before it runs: levels and bytes exactly, memory and milliseconds as estimates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tightrope.program import Program, base_cost
from tightrope.runtimes.ckks import bootstrapping, lattigo
from tightrope.runtimes.ckks.circuit import Affine, AnyStep, Circuit, Composite, Refresh, Square, Value
from tightrope.runtimes.ckks.diagonals import steps
from tightrope.runtimes.ckks.format import boot_key_size, ciphertext_size, key_size
from tightrope.runtimes.ckks.parameters import Parameters
from tightrope.types import Cost

# Milliseconds on one core of the machine that `benchmarks/bench_ckks.py` names: of one number-theoretic
# transform per N log2(N), of a row of modular products per N, of carrying a ciphertext into the library and
# out of it per byte, and of making, sending and reading a byte of key. Other machines differ by a factor.
TRANSFORM_MS = 4.2e-7
PRODUCT_MS = 3.0e-6
COPY_MS = 8.0e-6
KEY_MS = 1.0e-5
# From a ResNet-20 with bootstraps on the same machine: of encoding a diagonal per N log2(N), beside its
# transforms; of a byte of bootstrapping's keys; and of a whole bootstrap over its rotations and products,
# with the garbage that it leaves to the next step.
ENCODE_MS = 8.1e-6
BOOT_KEY_MS = 2.9e-5
REFRESH = 2.15
MULTIPLICATIONS = {1: 0, 2: 1, 3: 2, 4: 3, 5: 4, 6: 5, 7: 5}  # ciphertext products by degree
KEY_COPIES = 3.2  # of the keys, while the server reads them: the mapped file, a copy, and the keys
WORKING_CIPHERTEXTS = 40  # per image in work: hoisted decompositions and results of the largest step
MAKER_COPIES = 3.2  # of bootstrapping's keys, in the process that makes them
GARBAGE = 1.4  # how far the server's heap grows beyond the keys
# With bootstraps, of all that the library has in use, what an image in work takes included: how far its heap
# may grow before it is collected eagerly, and what is estimated above that. The heap grows into whatever its
# limit leaves it, and the process takes 1.9 GB beside it: where the limit was the estimate of the whole, a
# larger estimate only made more be used.
BOOT_GARBAGE = 1.3
RESERVE = 1.15
PROCESS_BYTES = 350 << 20  # an interpreter with torch and a library, for each of client and server


@dataclass(frozen=True)
class Estimate:
    """Of one session. `key_bytes` are sent once; `boot_key_bytes` are those of bootstrapping, of the results
    of the ops `bootstrapped`.

    Peak memory: of the client, of the process that makes its bootstrapping keys and is gone before the server
    works, and of the server. `limit_bytes`: what the heap of the server's library is told to stay near.
    """

    parameters: Parameters
    keys: int
    key_bytes: int
    bootstraps: int
    bootstrapped: tuple[str, ...]
    boot_key_bytes: int
    client_bytes: int
    maker_bytes: int
    server_bytes: int
    limit_bytes: int
    setup_ms: float
    image_ms: float

    @property
    def memory_bytes(self) -> int:
        return self.client_bytes + max(self.server_bytes, self.maker_bytes + PROCESS_BYTES)

    def __str__(self) -> str:
        return (
            f"{self.parameters}; {self.keys} keys of {self.key_bytes / 1e9:.2g} GB, "
            + (
                f"{self.bootstraps} bootstraps (after {', '.join(self.bootstrapped)}) with keys of "
                f"{self.boot_key_bytes / 1e9:.2g} GB, "
                if self.bootstraps
                else "no bootstraps, "
            )
            + f"memory {self.memory_bytes / 1e9:.2g} GB, "
            f"about {self.setup_ms / 1e3:.2g} s for the keys and {self.image_ms / 1e3:.2g} s per image"
        )


def estimate(circuit: Circuit, threads: int) -> Estimate:
    parameters = circuit.parameters
    keys = len(circuit.galois_elements()) + 1
    key_bytes = keys * parameters.key_bytes
    diagonals = circuit.diagonal_bytes()
    kept = sum(diagonals) if sum(diagonals) <= lattigo.KEPT_BYTES else max(diagonals)
    top = parameters.ciphertext_bytes(parameters.levels)
    encoded = max((s.encoded for s in circuit.steps if isinstance(s, Affine)), default=0)
    rows = parameters.levels + 1 + len(parameters.p_bits)
    working = threads * int(WORKING_CIPHERTEXTS * top + encoded * rows * (8 << parameters.log_n))
    boot = boot_key_size(circuit)
    library, reserve = GARBAGE * key_bytes + working, 1.0
    if boot:
        reserve = RESERVE
        library = BOOT_GARBAGE * (key_bytes + boot + _boot_bytes(circuit, threads) + working)
    loading = max(KEY_COPIES * key_bytes, key_bytes + KEY_COPIES * boot)
    mapped = max(key_bytes, boot)  # the file itself is not in the library's heap
    serving = int(max(loading, reserve * library + 2 * kept))
    return Estimate(
        parameters=parameters,
        keys=keys,
        key_bytes=key_bytes,
        bootstraps=circuit.bootstraps,
        bootstrapped=tuple(step.ops[-1] for step in circuit.steps if isinstance(step, Refresh)),
        boot_key_bytes=boot,
        client_bytes=PROCESS_BYTES + 6 * parameters.key_bytes + 2 * threads * top,
        maker_bytes=PROCESS_BYTES + int(MAKER_COPIES * boot) if boot else 0,
        server_bytes=PROCESS_BYTES + serving,
        limit_bytes=int(max(loading - mapped, library + kept)),
        setup_ms=key_bytes * KEY_MS + boot * BOOT_KEY_MS,
        image_ms=sum(steps_ms(circuit).values()),
    )


def _boot_bytes(circuit: Circuit, threads: int) -> int:
    """What bootstrapping keeps in the server beside its keys, and what every image in work takes of it."""
    ring = circuit.parameters.during_bootstrap()
    ciphertext = 2 * (len(ring.q_bits) + len(ring.p_bits)) * (8 << ring.log_n)  # as hoisted
    return _dft_bytes(circuit.parameters, circuit.boot_slots) + threads * WORKING_CIPHERTEXTS * ciphertext


def _dft_bytes(parameters: Parameters, slots: int) -> int:
    """Of the encoded diagonals of both homomorphic DFTs, which the server keeps."""
    ring, log_slots = parameters.during_bootstrap(), slots.bit_length() - 1
    special = len(ring.p_bits)
    rows = (len(ring.q_bits) + special, parameters.levels + 1 + len(bootstrapping.SLOTS_TO_COEFFS) + special)
    counts = [
        sum(map(len, bootstrapping.dft_shifts(ring.log_n, log_slots, encode))) for encode in (True, False)
    ]
    return sum(count * row for count, row in zip(counts, rows, strict=True)) * (8 << ring.log_n)


def steps_ms(circuit: Circuit) -> dict[str, float]:
    """By step, for one image. Diagonals are encoded once where the server keeps them, else every time."""
    kept = sum(circuit.diagonal_bytes()) <= lattigo.KEPT_BYTES
    found = {s.name: step_ms(s, circuit.parameters, circuit.values) for s in circuit.steps}
    for step in circuit.steps:
        if isinstance(step, Affine) and not kept:
            found[step.name] += _encoding_ms(step, circuit.parameters)
    return found


def _encoding_ms(step: Affine, parameters: Parameters) -> float:
    rows = step.level + 1 + len(parameters.p_bits)
    one = ENCODE_MS * (parameters.log_n << parameters.log_n) + _ms(parameters, rows, 0)
    return step.diagonals * one


def step_ms(step: AnyStep, parameters: Parameters, values: Mapping[str, Value]) -> float:
    """Transforms and products of a step's key switches and rescalings, and copies."""
    held = [values[name] for name in (*step.sources, step.name)]
    copied = sum(parameters.ciphertext_bytes(v.level) * v.layout.ciphertexts for v in held)
    if isinstance(step, Affine):
        return copied * COPY_MS + _affine_ms(step, parameters)
    if isinstance(step, Composite):
        one = _composite_ms(step, parameters)
    elif isinstance(step, Square):
        one = multiplication_ms(parameters, step.level)
    else:
        one = refresh_ms(step, parameters)
    return copied * COPY_MS + one * held[0].layout.ciphertexts


def refresh_ms(step: Refresh, parameters: Parameters) -> float:
    """Rotations and products, all as dear as at the top level: what hoisting saves, matrices take."""
    ring = parameters.during_bootstrap()
    transforms, products = _switch(ring, ring.levels)
    turns = len(bootstrapping.rotations(ring.log_n, step.slots.bit_length() - 1))
    count = turns + bootstrapping.PRODUCTS
    return REFRESH * _ms(ring, transforms * count, products * count)


def _affine_ms(step: Affine, parameters: Parameters) -> float:
    transforms, products = 0.0, 0.0
    full, hoisted = _switch(parameters, step.level), _inner(parameters, step.level)
    rows = step.level + 1 + len(parameters.p_bits)
    for block in step.blocks.values():
        baby, giant = steps(block.shifts, parameters.slots)
        transforms += full[0] * len(giant)
        products += full[1] * len(giant) + hoisted * len(baby) + 2 * rows * len(block.shifts)
    transforms += (full[0] + 2 * step.level) * step.outputs + full[0] * step.rotations * step.outputs
    products += full[1] * step.rotations * step.outputs
    return _ms(parameters, transforms, products)


def _composite_ms(step: Composite, parameters: Parameters) -> float:
    total, level = 0.0, step.level
    for stage in step.stages:
        degree = stage.degree
        count = MULTIPLICATIONS.get(degree, 2 * (degree.bit_length() + (degree // 8)))
        total += count * multiplication_ms(parameters, level)
        level -= degree.bit_length()
    return total + step.gated * multiplication_ms(parameters, level)


def multiplication_ms(parameters: Parameters, level: int) -> float:
    """Of two ciphertexts, relinearised and rescaled."""
    transforms, products = _switch(parameters, level)
    return _ms(parameters, transforms + 4 * level, products + 4 * level)


def _digits(parameters: Parameters, level: int) -> int:
    return -(-(level + 1) // len(parameters.p_bits))


def _inner(parameters: Parameters, level: int) -> float:
    """Products of a decomposed ciphertext with a key."""
    return _digits(parameters, level) * 2.0 * (level + 1 + len(parameters.p_bits))


def _switch(parameters: Parameters, level: int) -> tuple[float, float]:
    """Transforms and products of one key switch that shares nothing."""
    rows = level + 1 + len(parameters.p_bits)
    return float((_digits(parameters, level) + 2) * rows), _inner(parameters, level) + 2 * rows


def _ms(parameters: Parameters, transforms: float, products: float) -> float:
    n = 1 << parameters.log_n
    return transforms * TRANSFORM_MS * n * parameters.log_n + products * PRODUCT_MS * n


def links(circuit: Circuit, batch: int) -> dict[str, int]:
    """Bytes of a batch's ciphertexts in each direction; frames and TLS records are not counted."""
    up, down = (circuit.values[name] for name in (circuit.input, circuit.output))
    sizes = [ciphertext_size(circuit.parameters, v.level) for v in (up, down)]
    counts = [v.layout.ciphertexts for v in (up, down)]
    directions = ("client->server", "server->client")
    return {d: s * n * batch for d, s, n in zip(directions, sizes, counts, strict=True)}


def setup_links(circuit: Circuit) -> dict[str, int]:
    """Bytes of the keys: one for relinearisation, others for rotations, and those of bootstrapping."""
    relinearisation, rotation = (key_size(circuit.parameters, element=one) for one in (False, True))
    rotations = len(circuit.galois_elements()) * rotation
    return {"client->server": relinearisation + rotations + boot_key_size(circuit)}


def op_costs(program: Program, circuit: Circuit, batch: int = 1) -> dict[str, Cost]:
    """Levels, bytes and the structural part, exactly as a run counts them; steps pay at their last op.

    The bytes of the input count for the first op, those of the result for the last one.
    """
    costs = {
        op.name: replace(base_cost(op).scaled(batch), weights=base_cost(op).weights, ckks_levels=0)
        for op in program.ops
    }
    for name, levels in circuit.op_levels({step.name: step.depth for step in circuit.steps}).items():
        costs[name] += Cost(ckks_levels=levels)
    sizes: Mapping[str, int] = links(circuit, batch)
    for name, direction in (
        (program.ops[0].name, "client->server"),
        (program.ops[-1].name, "server->client"),
    ):
        costs[name] += Cost(online_bytes=sizes[direction])
    return costs
