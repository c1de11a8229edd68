"""From the supernet to a plain network of the space with its weights, and from the heaviest network back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tightrope.methods.binas.space import Space
from tightrope.methods.binas.supernet import ElasticBlock, Norms, Supernet
from tightrope.models.mobilenet import BLOCKS, InvertedResidual, MobileNet, mobilenet
from tightrope.solve.staged import Choice

ENDS = ("conv_stem", "bn1", "conv_head", "classifier")


def extract(supernet: Supernet, choice: Choice) -> MobileNet:
    """The network of `choice` with the supernet's weights and batch-norm statistics: a plain module in
    evaluation mode, of the supernet's device and type, whose outputs are those of the supernet on this path.

    The statistics are those of the mixture of networks that the supernet was trained on (see `norms`);
    `evaluate.recalibrate` gives it its own. Raises InputError for a choice that is not of the space.
    """
    space = supernet.space
    net = mobilenet(space.architecture(choice), space.classes, space.input_shape[0])
    net.to(supernet.classifier.weight)
    for name in ENDS:
        net.get_submodule(name).load_state_dict(supernet.get_submodule(name).state_dict())
    for k in (0, -1):
        net.blocks[k].load_state_dict(supernet.blocks[k].state_dict())
    for s, options in enumerate(choice):
        for b, option in enumerate(options):
            net.get_submodule(f"blocks.{1 + s}.{b}").load_state_dict(sliced(block_at(supernet, s, b), option))
    return net.eval()


def plain_block(supernet: Supernet, stage: int, position: int, option: int) -> nn.Module:
    """The block of an option at one place, as it is in the network that `extract` gives."""
    space, elastic = supernet.space, block_at(supernet, stage, position)
    plain = BLOCKS["ir"](
        space.block(stage, position, option), elastic.conv_pw.in_channels, space.stages[stage].act
    )
    plain.to(elastic.conv_pw.weight).load_state_dict(sliced(elastic, option))
    return plain.eval()


def sliced(block: ElasticBlock, option: int) -> dict[str, Tensor]:
    """The tensors of the plain block of an option, by their names there: the first channels."""
    n, hidden, kernel = (int(t[option]) for t in (block.inner, block.hidden, block.kernel))
    parts = {
        "conv_pw.weight": block.conv_pw.weight[:n],
        "conv_dw.weight": block.conv_dw[kernel].get_parameter("weight")[:n],
        "conv_pwl.weight": block.conv_pwl.weight[:, :n],
    }
    bn3 = block.bn3[int(block.path[option])]
    norms = {"bn1": (block.bn1, n), "bn2": (block.bn2[kernel], n), "bn3": (bn3, block.conv_pwl.out_channels)}
    for name, (norm, channels) in norms.items():
        for key, tensor in norm.state_dict().items():
            parts[f"{name}.{key}"] = tensor[:channels] if tensor.dim() else tensor
    if hidden and block.se is not None:
        reduce, expand = block.se.conv_reduce, block.se.conv_expand
        assert reduce.bias is not None and expand.bias is not None
        parts |= {
            "se.conv_reduce.weight": reduce.weight[:hidden, :n],
            "se.conv_reduce.bias": reduce.bias[:hidden],
            "se.conv_expand.weight": expand.weight[:n, :hidden],
            "se.conv_expand.bias": expand.bias[:n],
        }
    return {name: tensor.detach() for name, tensor in parts.items()}


def inherit(heaviest: MobileNet, space: Space, norms: Norms = "path") -> Supernet:
    """A supernet whose largest network is `heaviest` (of `space.largest()`, `ranking.reorder`ed).

    Smaller depthwise kernels start as the middle of the largest one, all norms of a place alike.
    """
    supernet = Supernet(space, norms)
    for name in ENDS:
        supernet.get_submodule(name).load_state_dict(heaviest.get_submodule(name).state_dict())
    for k in (0, -1):
        supernet.blocks[k].load_state_dict(heaviest.blocks[k].state_dict())
    for s, stage in enumerate(space.stages):
        for b in range(stage.depths[-1]):
            plain = heaviest.get_submodule(f"blocks.{1 + s}.{b}")
            assert isinstance(plain, InvertedResidual)
            _widen(block_at(supernet, s, b), plain)
    return supernet


@torch.no_grad()
def _widen(block: ElasticBlock, plain: InvertedResidual) -> None:
    for name in ("conv_pw", "bn1", "conv_pwl", *(["se"] if block.se is not None else [])):
        block.get_submodule(name).load_state_dict(plain.get_submodule(name).state_dict())
    whole = plain.conv_dw.kernel_size[0]
    for conv_dw, bn2 in zip(block.conv_dw, block.bn2, strict=True):
        weight = conv_dw.get_parameter("weight")
        k = weight.shape[-1]
        middle = slice((whole - k) // 2, (whole + k) // 2)
        weight.copy_(plain.conv_dw.weight[:, :, middle, middle])
        bn2.load_state_dict(plain.bn2.state_dict())
    for bn3 in block.bn3:
        bn3.load_state_dict(plain.bn3.state_dict())


def block_at(supernet: Supernet, stage: int, position: int) -> ElasticBlock:
    found = supernet.get_submodule(f"blocks.{1 + stage}.{position}")
    assert isinstance(found, ElasticBlock)
    return found
