"""Keep only the weights or channels that a task needs (Qi et al., SeaM, ICSE 2023, arXiv 2304.00245)."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn

from tightrope.data import Data, Task
from tightrope.errors import BudgetError, BundleError, InputError
from tightrope.graph import Graph, trace
from tightrope.lower import lower
from tightrope.methods import CostModel, Learned, Progress, Shown
from tightrope.methods.reengineer.channels import find_channels
from tightrope.methods.reengineer.compact import compact
from tightrope.methods.reengineer.controls import controls, donor_accuracy
from tightrope.methods.reengineer.counting import layers, positions, weights
from tightrope.methods.reengineer.heads import HEADS, Headed, HeadKind, attach
from tightrope.methods.reengineer.limits import limits_of, missed, refuse_below
from tightrope.methods.reengineer.projection import METRICS
from tightrope.methods.reengineer.resume import Journal
from tightrope.methods.reengineer.search import Clock, Search, Settings, State
from tightrope.methods.reengineer.selection import Floor, front
from tightrope.nn.group_max import GroupMax
from tightrope.nn.masked import CHANNELS, GRANULARITIES, Bits, Channels, Granularity, Masked
from tightrope.nn.strided import repair, restore
from tightrope.place import model_sha256
from tightrope.program import Program, base_cost
from tightrope.shard import Shard
from tightrope.types import Budget, Cost, Json, total

Mode = Literal["dual", "reference"]
SINGLE = Shard()


@dataclass(frozen=True, kw_only=True)
class ReengineerMethod:
    """Configuration and method in one.

    `mode`: `dual` takes the most accurate epoch within the budget; `reference` is SeaM as published: the
    fewest weights at no less accuracy than the donor restricted to the task (where no epoch is so accurate,
    the largest accuracy minus share kept, and a note), under a penalty `alpha` on the share kept, among the
    epochs within the budget (a time is checked at the end). SeaM's own settings:
    `mode="reference"`, `granularity="weight"`, `head="relu_linear"`, `lr_mask=0.05`, `lr_head=0.1`,
    `epochs=300`. Two of ours: with `decay` its learning rates fall to zero like a cosine, as those of `dual`
    always do; with `margin` an epoch should be so many standard errors of the donor's validation accuracy
    above it (where none is, the donor's accuracy itself is asked for).
    `granularity`: mask single `weight`s, whole `channel`s, or both (`hybrid`).
    `head`: see `heads.attach`. `floor`: accuracy in [0, 1] that the result may lose at most against the
    restricted donor, on validation images; None for no floor. `distill`: weight of the donor's restricted
    outputs. `patience`: epochs, of the reference mode. `controls`: measure what a user could do instead.
    `multiple`: tensors keep a multiple of so many channels, or all, as fast kernels want them (of a grouped
    convolution, groups); not of the reference mode.
    """

    mode: Mode = "dual"
    granularity: Granularity = "weight"
    head: HeadKind = "linear"
    epochs: int = 20
    batch_size: int = 64
    lr_mask: float = 0.01
    lr_head: float = 0.01
    alpha: float = 1.0
    floor: float | None = None
    distill: float = 0.0
    patience: int | None = None
    decay: bool = False
    margin: float = 0.0
    augment: bool = False
    multiple: int = 1
    controls: bool = True
    seed: int = 0

    name: ClassVar[str] = "reengineer"
    runtime: ClassVar[str] = "plain"

    @property
    def tunable(self) -> bool:
        """Removed channels stay removed; single weights that are masked would grow again."""
        return self.granularity == "channel"

    def __post_init__(self) -> None:
        words = (("mode", ("dual", "reference")), ("granularity", GRANULARITIES), ("head", HEADS))
        for key, allowed in words:
            if getattr(self, key) not in allowed:
                raise InputError(f"unknown choice for {key}", got=getattr(self, key), allowed=allowed)
        for key in ("epochs", "batch_size", "patience", "multiple"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise InputError(f"{key} must be positive", got=getattr(self, key))
        if self.multiple > 1 and (self.granularity == "weight" or self.mode == "reference"):
            raise InputError(
                "multiples are of channels, in the dual mode",
                got=f"multiple={self.multiple}, granularity={self.granularity}, mode={self.mode}",
                fix="--set granularity=channel",
            )
        for key in ("lr_mask", "lr_head"):
            if not 0 < getattr(self, key) < math.inf:
                raise InputError(f"{key} must be positive", got=getattr(self, key))
        if self.margin and self.mode == "dual":
            raise InputError(
                "a margin above the donor is of the reference mode; dual takes the most accurate epoch",
                got=f"margin={self.margin:g}, mode=dual",
                fix="--set mode=reference, or --set floor=0",
            )
        for key in ("alpha", "distill", "margin", "seed"):
            if not 0 <= getattr(self, key) < math.inf:
                raise InputError(f"{key} must not be negative", got=getattr(self, key))
        if self.floor is not None and not 0 <= self.floor <= 1:
            raise InputError("floor is a share of the images", got=self.floor, allowed="0 to 1")

    def learn(
        self,
        graph: Graph,
        data: Data,
        *,
        task: Task | None,
        budget: Budget,
        cost: CostModel,
        workdir: Path | None = None,
        progress: Progress = lambda *_: None,
        shard: Shard = SINGLE,
    ) -> Learned:
        """Search masks and a head. Raises BudgetError for a budget in another quantity, below the head alone,
        or missed; InputError for a task that the settings do not fit, and for a device without float64.
        """
        groups = tuple((k,) for k in range(len(data.classes))) if task is None else task.groups
        if (self.distill or self.floor is not None or self.mode == "reference") and not groups:
            raise InputError(
                "new images have no donor to be compared with",
                got=f"mode={self.mode}, distill={self.distill:g}, floor={self.floor}",
                fix="mode=dual without distill and floor",
            )
        if shard.device.type not in ("cpu", "cuda"):
            raise InputError(
                "masks are counted in float64, which this device does not have",
                got=shard.device.type,
                allowed="cpu, cuda",
                fix="--accelerator cpu",
            )
        start = self.searches(graph, len(data.classes), groups, data, progress, shard.device)
        search = start()
        if workdir is not None:
            search.journal = Journal.at(workdir, self._key(graph, data, task, budget, cost))
        masked, head = search.masked, search.head
        baseline = self._baseline(graph, budget, cost)
        own = {"weights": sum(p.numel() for p in head.parameters()), "macs": head.weight.numel()}
        limits = limits_of(budget, baseline, own, self.granularity)

        def frozen(state: State) -> Program:
            net = _plain(search.headed, masked, state.bits, state.head, graph.input_shape)
            return lower(net, graph.input_shape)

        times: dict[int, float] = {}  # of an epoch, measured once a call

        def ms(state: State) -> float:
            if state.epoch not in times:
                times[state.epoch] = cost.exact(frozen(state)).online_ms
            return times[state.epoch]

        if self.granularity != "weight":
            least = search.least()
            macs = max(least.macs + own["macs"], _cost(frozen(least)).macs)
            time = ms(least) if "online_ms" in limits else 0.0
            smallest = Cost(weights=least.weights + own["weights"], macs=macs, online_ms=time)
            refuse_below(budget, baseline, smallest, self.multiple)
        donor = donor_accuracy(_on(shard.device, graph.module), data, groups) if groups else {}
        clock = Clock(limits["online_ms"], baseline.online_ms, ms) if "online_ms" in limits else None
        counted = {metric: limits[metric] for metric in METRICS if metric in limits}
        if self.mode == "reference":
            floor = Floor(donor["restricted"], data.size("validation"), self.margin)
            state, feasible = search.reference(self.alpha, floor, self.patience, counted)
            feasible = feasible and (clock is None or ms(state) <= clock.limit)
        else:
            state, feasible = search.dual(counted, clock)
        points = [
            {k: p[k] + own.get(k, 0) for k in ("weights", "macs")} | {"accuracy": p["accuracy"]}
            for p in search.history
        ]
        if not feasible:
            raise missed(f"{state.weights:,} weights, {state.macs:,} macs in the end", str(budget), points)
        if self.floor is not None and state.accuracy < donor["restricted"] - self.floor - 1e-9:
            wanted = f"{donor['restricted'] - self.floor:.4f} (the donor's {donor['restricted']:.4f})"
            raise missed(f"accuracy {state.accuracy:.4f}", wanted, points)
        spent = _cost(frozen(state))
        if spent.macs > budget.resolve(baseline).get("macs", math.inf):  # a tensor without channels keeps one
            raise missed(f"{spent.macs:,.0f} macs with a channel in every tensor", str(budget), points)
        others = dict(donor)
        if self.controls:
            others |= controls(start, state.weights, self.epochs, _scorer(data))
        kept = state.weights / masked.total
        return Learned(
            choices=_choices(masked, state.bits),
            tensors=_pack(state.bits) | {f"head.{k}": v for k, v in state.head.items()},
            predicted=Cost(
                weights=state.weights + own["weights"],
                macs=spent.macs,
                drelus=spent.drelus,
                online_ms=0.0 if clock is None else ms(state),
            ),
            baseline=baseline,
            loss=1 - state.accuracy,
            notes=(
                f"{kept:.2%} of the {masked.total:,} weights that could be masked are kept, "
                f"and a head of {own['weights']:,}",
                f"storage: 1 bit a mask, {sum(-(-b.numel() // 8) for b in state.bits.values()):,} bytes",
                *(_STORAGE if self.granularity == "weight" else ()),
                *(_BELOW if self.mode == "reference" and state.accuracy < donor["restricted"] - 1e-9 else ()),
            ),
            accuracy=state.accuracy,
            controls=others,
            front=front(points),
            shown=(_shown(masked, state.bits),),
        )

    def rebuild(
        self, graph: Graph, choices: Mapping[str, Json], tensors: Mapping[str, Tensor]
    ) -> fx.GraphModule:
        """The plain, smaller network. Raises BundleError for masks that do not fit it."""
        head = {k.removeprefix("head."): v for k, v in tensors.items() if k.startswith("head.")}
        if set(head) != {"weight", "bias"}:
            raise BundleError("the masks' head is missing", got=", ".join(sorted(tensors)))
        kind: HeadKind = "relu_linear" if self.head == "relu_linear" else "linear"
        headed = attach(graph, kind, len(head["weight"]), (), self.seed)
        masked = self._masked(headed, graph.input_shape)
        bits = _unpack(masked, tensors)
        if _choices(masked, bits) != choices:
            raise BundleError("the masks and the plan do not belong together: one of them was changed")
        layer = headed.model.get_submodule(headed.name)
        if layer.weight.shape != head["weight"].shape:
            raise BundleError("the masks' head does not fit the network", got=tuple(head["weight"].shape))
        return _plain(headed, masked, bits, head, graph.input_shape)

    def searches(
        self,
        graph: Graph,
        labels: int,
        groups: tuple[tuple[int, ...], ...],
        data: Data,
        progress: Progress = lambda *_: None,
        device: torch.device = SINGLE.device,
    ) -> Callable[[], Search]:
        """Makes searches with these settings, each at its start; `groups` as in `heads.attach`."""
        settings = Settings(
            epochs=self.epochs, batch_size=self.batch_size, lr_mask=self.lr_mask, lr_head=self.lr_head,
            distill=self.distill, augment=self.augment, multiple=self.multiple, decay=self.decay,
            seed=self.seed,
        )  # fmt: skip
        channels: list[Channels] = []

        def start() -> Search:
            headed = attach(graph, self.head, labels, groups, self.seed)
            headed.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster
            masked = self._masked(headed, graph.input_shape, *channels, device=device)
            channels[:] = [masked.channels]
            repair(headed.model)
            for module in headed.model.modules():
                if isinstance(module, nn.Dropout):
                    module.train()  # as published; everything else keeps its statistics
            teacher = nn.Sequential(_on(device, graph.module), GroupMax(groups)) if groups else None
            return Search(masked, headed, data, settings, progress, teacher)

        return start

    def _key(self, graph: Graph, data: Data, task: Task | None, budget: Budget, cost: CostModel) -> str:
        """What makes a search this one."""
        asked = [asdict(self), model_sha256(graph.module), data.name, list(data.classes), str(budget)]
        sizes = [data.size(split) for split in ("train", "validation")]
        sampled = None if task is None else task.to_json()
        timed = repr(cost) if any(limit.metric == "online_ms" for limit in budget.limits) else ""
        return hashlib.sha256(json.dumps([asked, sizes, sampled, timed]).encode()).hexdigest()

    def _masked(
        self,
        headed: Headed,
        input_shape: tuple[int, ...],
        *known: Channels,
        device: torch.device = SINGLE.device,
    ) -> Masked:
        model = headed.model.requires_grad_(False)
        model.get_submodule(headed.name).requires_grad_(headed.trained)
        names = tuple(
            f"{name}.{part}"
            for name, layer in layers(model).items()
            if name != headed.name
            for part, _ in layer.named_parameters()
        )
        channels = Channels()
        if self.granularity != "weight":
            channels = known[0] if known else find_channels(model, input_shape)
        used = positions(trace(model, input_shape))
        return Masked.start(model.to(device), names, channels, self.granularity, used)

    def _baseline(self, graph: Graph, budget: Budget, cost: CostModel) -> Cost:
        """Raises BudgetError for a limit on time where the runtime has none."""
        program = lower(graph.module, graph.input_shape)
        spent = _cost(program)
        timed = any(limit.metric == "online_ms" for limit in budget.limits)
        ms = cost.exact(program).online_ms if timed else 0.0
        if timed and not ms:
            raise BudgetError("this runtime has no times", got=str(budget), fix="--runtime onnx")
        return Cost(weights=weights(graph.module), macs=spent.macs, drelus=spent.drelus, online_ms=ms)


def _cost(program: Program) -> Cost:
    return total(base_cost(op) for op in program.ops)


_BELOW = (
    "no epoch within the budget was as accurate as the donor restricted to the task: this is the one with "
    "the largest accuracy minus share kept",
)
_STORAGE = ("masks of single weights save storage, not time: dense kernels multiply zeros",)


def _on(device: torch.device, model: nn.Module) -> nn.Module:
    """The caller's model stays where it is."""
    return model if device == SINGLE.device else copy.deepcopy(model).to(device)


def _scorer(data: Data) -> Callable[[nn.Module], float]:
    def score(model: nn.Module) -> float:
        hits, seen = 0, 0
        with torch.no_grad():
            for x, y in data.batches("validation", 500):
                hits += int((model(x).argmax(1) == y).sum())
                seen += len(y)
        return hits / seen

    return score


def _plain(
    headed: Headed, masked: Masked, bits: Bits, head: Mapping[str, Tensor], input_shape: tuple[int, ...]
) -> fx.GraphModule:
    """Masks multiplied in, then everything removed that has become idle."""
    model = copy.deepcopy(headed.model).cpu()
    restore(model)
    with torch.no_grad():
        model.load_state_dict(masked.effective(bits), strict=False)
        model.get_submodule(headed.name).load_state_dict(dict(head))
    channels = masked.channels.to(SINGLE.device) if masked.granularity != "weight" else None
    return compact(trace(model.requires_grad_(), input_shape), channels=channels)


def _choices(masked: Masked, bits: Bits) -> dict[str, Json]:
    """{layer: weights kept of weights}; with `channels`, how many units of them."""
    found = {name: {"kept": kept, "of": of} for name, (kept, of) in masked.by_layer(bits).items()}
    if CHANNELS in bits:
        found[CHANNELS] = {"kept": int(bits[CHANNELS].sum()), "of": bits[CHANNELS].numel()}
    return found


def _shown(masked: Masked, bits: Bits) -> Shown:
    rows = tuple(
        (name, f"{c['of']:,}", f"{c['kept']:,}", f"{c['kept'] / max(c['of'], 1):.1%}")
        for name, c in _choices(masked, bits).items()
    )
    return Shown(
        title="What is kept of every layer", columns=("layer", "weights", "kept", "share"), rows=rows
    )


def _pack(bits: Bits) -> dict[str, Tensor]:
    """8 masks a byte."""
    return {
        f"mask.{name}": torch.from_numpy(np.packbits(mask.numpy().reshape(-1))) for name, mask in bits.items()
    }


def _unpack(masked: Masked, tensors: Mapping[str, Tensor]) -> Bits:
    bits = {}
    for name, score in masked.scores.items():
        packed = tensors.get(f"mask.{name}")
        if packed is None or packed.dtype != torch.uint8 or packed.numel() != -(-score.numel() // 8):
            raise BundleError("the masks do not fit the network", where=name)
        flat = np.unpackbits(packed.numpy(), count=score.numel())
        bits[name] = torch.from_numpy(flat.astype(bool)).view(score.shape)
    return bits
