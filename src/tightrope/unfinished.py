"""A search by training under way: which one it is, so that no other goes on with it, and how far it is."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from tightrope.bundle import read_json, write_json
from tightrope.checkpoint import differences
from tightrope.errors import BudgetError, InputError
from tightrope.shard import Shard
from tightrope.types import Json

RUN = "run.json"  # beside the files of the method
FORM = {"run": dict, "reached": {"what": str, "done": int, "of": int}}
SHOWN = 8  # differences
Progress = Callable[[str, int, int], None]


@contextmanager
def going_on(
    workdir: Path, run: Mapping[str, Json], progress: Progress, *, restart: bool, shard: Shard
) -> Iterator[Progress]:
    """Within, a method keeps files in `workdir` and tells the given function how far it is, `progress` too.

    `run`, nested dicts of JSON, says which search this is; it is kept with how far the files are, which
    `progress` hears when they are found again. They go first with `restart`, and at last when no network met
    the budget: the same search would end so again. Raises InputError where the files are of another search.
    """
    if restart and shard.first:
        shutil.rmtree(workdir, ignore_errors=True)
    shard.barrier()
    note, state = workdir / RUN, _state(workdir)
    if note.exists():
        found = read_json(note, FORM)
        if other := list(differences(found["run"], run)):
            raise InputError(
                "an unfinished search with other settings lies here",
                where=str(workdir),
                got="; ".join(other[:SHOWN]) + ("; …" if len(other) > SHOWN else ""),
                fix="--restart, which forgets it, another --out, or its own settings to go on",
            )
        reached = found["reached"]
        progress(f"going on after an interruption, {reached['what']}", reached["done"], reached["of"])

    def told(what: str, done: int, of: int) -> None:
        nonlocal state
        if shard.first and (now := _state(workdir)) != state:  # kept since it last told
            state = now
            write_json(note, {"run": run, "reached": {"what": what, "done": done, "of": of}})
        progress(what, done, of)

    shard.barrier()  # nobody writes before all have looked
    try:
        yield told
    except BudgetError:
        if shard.first:
            shutil.rmtree(workdir, ignore_errors=True)
            with suppress(OSError):  # there is more in it, or there is none
                workdir.parent.rmdir()
        raise


def _state(workdir: Path) -> set[tuple[str, int]]:
    """The files of the method, as they are."""
    if not workdir.is_dir():
        return set()
    return {(path.name, path.stat().st_mtime_ns) for path in workdir.iterdir() if path.name != RUN}
