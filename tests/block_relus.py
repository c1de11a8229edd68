"""A measurement of block_relu, small enough for tests."""

from __future__ import annotations

from torch import nn

from networks import Images
from tightrope.graph import trace
from tightrope.methods.block_relu import BlockReluMethod
from tightrope.runtimes.plain import Plain

SMALL = BlockReluMethod(samples=12, batch_size=8, verify=0)


def measure(net: nn.Module, data: Images, method: BlockReluMethod = SMALL, workdir=None):
    graph = trace(net, tuple(data.x.shape[1:]))
    return method.measure(graph, data, cost=Plain(), workdir=workdir, progress=lambda *_: None)
