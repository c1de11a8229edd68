"""`tightrope measure`: the latency table of a search space on a device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from tightrope.device import Shape, conditions, open_device, time_ms, torch_threads
from tightrope.errors import InputError
from tightrope.lock import check_writable
from tightrope.methods.binas import latency
from tightrope.methods.binas.latency import LatencyTable
from tightrope.methods.binas.parts import parts
from tightrope.methods.binas.space import Space
from tightrope.models.arch import Architecture
from tightrope.models.mobilenet import mobilenet

Progress = Callable[[str, int, int], None]
ROWS, ROW_SECONDS = 3, 0.05  # at a visit
VISITS = 5


def measure(
    space: Space,
    device: str,
    path: Path,
    *,
    threads: int = 1,
    batch: int = 1,
    clock: str = "wall",
    runs: int = 25,
    visits: int = VISITS,
    fitted: int = 24,
    held_out: int = 12,
    seed: int = 0,
    progress: Progress = lambda *_: None,
) -> LatencyTable:
    """Time every part of `space` and some whole networks, in `visits` rounds over all of them, at each the
    fastest of three rows of at least `runs` runs; kept at `path` after every visit, from where the same call
    goes on.

    Raises InputError for a device that is not there, and a table at `path` that is another one's.
    """
    if runs < 2:
        raise InputError("a quartile needs at least two runs", got=runs)
    check_writable(path.parent)
    engine = open_device(device, threads)
    now = conditions(device, engine, threads=threads, batch=batch, clock=clock)
    table = latency.empty(space, now, visits=visits, fitted=fitted, held_out=held_out, seed=seed)
    if path.exists():
        found = latency.load(path, space, unfinished=True)
        found.check(space, now)
        same = (found.visits, found.fitted, tuple(found.networks_ms))
        if same != (visits, fitted, tuple(table.networks_ms)):
            raise InputError(
                "the table at this place is measured on other networks, or more or less often",
                where=str(path),
                fix="the settings of the first time, or another --out",
            )
        table = found
    things = _things(space, table)
    done, of = 0, visits * len(things)
    with torch_threads(threads):
        for visit in range(visits):
            for key, (build, shape) in things.items():
                done += 1
                known = table.parts_ms.get(key) or table.networks_ms.get(key) or ()
                if len(known) > visit:
                    continue
                run = engine.load(build(), shape, batch)
                table = table.add(key, time_ms(run, runs, clock, rows=ROWS, row_seconds=ROW_SECONDS))
                table.save(path)
                progress(f"measuring on {device}", done, of)
    return table


def _things(space: Space, table: LatencyTable) -> dict[str, tuple[Callable[[], nn.Module], Shape]]:
    """Everything that is timed: how to build it, and its input."""
    found: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
        key: (part.module, part.input_shape) for key, part in parts(space).items()
    }

    def whole(text: str) -> Callable[[], nn.Module]:
        return lambda: mobilenet(Architecture.parse(text), space.classes, space.input_shape[0]).eval()

    return found | {text: (whole(text), space.input_shape) for text in table.networks_ms}
