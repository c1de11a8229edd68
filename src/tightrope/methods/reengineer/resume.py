"""A mask search under way, in one file: it goes on exactly where its last whole epoch ended."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from tightrope.errors import BundleError
from tightrope.types import atomic_write

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what Adam keeps of a parameter


@dataclass(frozen=True)
class Journal:
    """`key` names the search: what another one has left is not read."""

    path: Path
    key: str

    @classmethod
    def at(cls, workdir: Path, key: str) -> Journal:
        return cls(workdir / "search.safetensors", key)

    def write(
        self,
        tensors: Mapping[str, Tensor],
        optimizers: Sequence[torch.optim.Optimizer],
        notes: Mapping[str, Any],
    ) -> None:
        """Replace the file. `notes` is JSON."""
        everything = dict(tensors)
        for k, optimizer in enumerate(optimizers):
            for index, moments in optimizer.state_dict()["state"].items():
                everything |= {f"adam.{k}.{index}.{m}": moments[m] for m in MOMENTS}
        whole = {name: value.detach().clone().contiguous() for name, value in everything.items()}
        data = save(whole, metadata={"key": self.key, "notes": json.dumps(dict(notes))})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path, lambda f: f.write(data))

    def read(
        self, optimizers: Sequence[torch.optim.Optimizer]
    ) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and notes of this search, its optimisers set; None if there is none.

        Raises BundleError for a damaged file.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != self.key:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            notes: dict[str, Any] = json.loads(metadata["notes"])
            for k, optimizer in enumerate(optimizers):
                state: dict[int, dict[str, Tensor]] = {}
                for name in [n for n in tensors if n.startswith(f"adam.{k}.")]:
                    _, _, index, moment = name.split(".")
                    state.setdefault(int(index), {})[moment] = tensors.pop(name)
                groups = optimizer.state_dict()["param_groups"]
                optimizer.load_state_dict({"state": state, "param_groups": groups})
        except Exception as error:  # safetensors raises many kinds
            raise BundleError(
                "the search under way cannot be read", where=str(self.path), got=str(error)[:200],
                fix="remove it",
            ) from error  # fmt: skip
        return tensors, notes
