"""One process's share of a measurement that several processes or machines make together."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


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


def launch(devices: int = 1, nodes: int = 1, accelerator: str = "cpu") -> Shard:
    """Start `devices` processes on each of `nodes` machines with Lightning Fabric and join them.

    With more than one process, Fabric runs the current command again for each of the others.
    """
    if devices * nodes == 1 and accelerator == "cpu":
        return Shard()
    from lightning_fabric import Fabric

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))
    strategy = "ddp" if devices * nodes > 1 else "auto"
    fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=nodes, strategy=strategy)
    fabric.launch()

    def total(x: Tensor) -> Tensor:
        summed = fabric.all_reduce(x.to(fabric.device), reduce_op="sum")
        assert isinstance(summed, Tensor)
        return summed.cpu()

    return Shard(fabric.global_rank, fabric.world_size, fabric.device, total, fabric.barrier)
