"""One process's share of a measurement that several processes or machines make together."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tightrope.errors import InputError


def _same(x: Tensor) -> Tensor:
    return x


def _nothing() -> None:
    return None


CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shard:
    """`rank` of `world` processes; `total` sums a tensor over all of them."""

    rank: int = 0
    world: int = 1
    device: torch.device = CPU
    total: Callable[[Tensor], Tensor] = _same
    barrier: Callable[[], object] = _nothing

    @property
    def first(self) -> bool:
        return self.rank == 0

    def agreed(self, x: Tensor) -> Tensor:
        """The first process's `x`, for all of them; of one shape everywhere."""
        return self.total(x if self.first else torch.zeros_like(x))


def launch(devices: int = 1, nodes: int = 1, accelerator: str = "cpu") -> Shard:
    """Start `devices` processes on each of `nodes` machines with Lightning Fabric and join them.

    With more than one process, Fabric runs the current command again for each of the others. Raises
    InputError for a number below 1, and for an accelerator or devices that this machine does not have.
    """
    for name, value in (("devices", devices), ("nodes", nodes)):
        if value < 1:
            raise InputError(f"{name} must be positive", got=value, allowed="1 or more")
    if devices * nodes == 1 and accelerator == "cpu":
        return Shard()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))
    with quiet_fabric():
        fabric = start_fabric(devices, nodes, accelerator)

    def total(x: Tensor) -> Tensor:
        summed = fabric.all_reduce(x.to(fabric.device), reduce_op="sum")
        assert isinstance(summed, Tensor)
        return summed.cpu()

    return Shard(fabric.global_rank, fabric.world_size, fabric.device, total, fabric.barrier)


def start_fabric(devices: int, nodes: int, accelerator: str, precision: Any = "32-true") -> Any:
    """A launched Fabric. Raises InputError for what this machine does not have."""
    from lightning_fabric import Fabric  # slow to import, and one process on the CPU does without

    try:
        fabric = Fabric(
            accelerator=accelerator,
            devices=devices,
            num_nodes=nodes,
            strategy="ddp" if devices * nodes > 1 else "auto",
            precision=precision,
        )
    except Exception as error:  # Fabric raises many kinds
        raise InputError(
            "this machine does not have these devices",
            got=f"accelerator {accelerator}, {devices} devices, {precision}: {error}",
            allowed=("auto", *_present()),
            fix="--accelerator cpu, or fewer --devices",
        ) from error
    fabric.launch()
    atexit.unregister(_leave)  # once, however many trainings a process runs
    atexit.register(_leave)
    return fabric


def _present() -> list[str]:
    found = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return [name for name, there in found.items() if there]


def _leave() -> None:
    """Leave the process group while Python still runs.

    Gloo's threads hold tensors; one that lets go of its last tensor after the interpreter is gone aborts
    the process (https://github.com/pytorch/pytorch/pull/179291).
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # wrapped networks, which refer to the group, too
        torch.distributed.destroy_process_group()


@contextmanager
def quiet_fabric() -> Iterator[None]:
    """Fabric reports what it starts; the caller asked for a result."""
    import_module("lightning_fabric")  # which sets the level of its logger
    logger = logging.getLogger("lightning_fabric")
    level = logger.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning_fabric")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
