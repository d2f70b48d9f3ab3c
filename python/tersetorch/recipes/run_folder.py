"""What a long recipe leaves in a folder, so that it can go on from there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from tersetorch.zoo.ranks import from_rank_0, rank, ranks


class RunFolder:
    """A folder with record.json, and with states of the model by name; each file is whole at any time.

    Where torch.distributed has started, rank 0 alone writes, and what it reads is what every rank gets: all must make
    one, and call kept, in the same order.

    Attributes:
        where: as it was given.
        folder: as it was given.
        record: settings, and what was stored beside them.

    Args:
        where: the public function, for errors.
        folder: made where it is missing; None for a run that leaves nothing.
        settings: what decides the run; JSON-able.
        limits: what may be others the next time: then the parts that restart names are as at the start again.
        restart: names of parts.
        **parts: of the record, as they are at the start.

    Raises:
        ValueError: folder holds a run with other settings, or a file that is no record.
    """

    def __init__(
        self,
        where: str,
        folder: str | os.PathLike[str] | None,
        settings: dict[str, Any],
        limits: dict[str, Any] | None = None,
        restart: Sequence[str] = (),
        **parts: Any,
    ) -> None:
        self.where = where
        # Another number of ranks rounds in another way: what it went on with would be the result of neither.
        settings = settings | ({"ranks": ranks()} if ranks() > 1 else {})
        limits = limits or {}
        self.record: dict[str, Any] = {"settings": settings, "limits": limits, **parts}
        self.folder = None if folder is None else Path(folder)
        if folder is not None:
            self.record = from_rank_0(lambda: self._found(Path(folder)))
            if self.record.get("limits", {}) != limits:
                self.store(limits=limits, **{name: parts[name] for name in restart})

    def _found(self, folder: Path) -> dict[str, Any]:
        """The record that folder holds, which is made where it is missing; ours where there is none."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise type(error)(
                f"{self.where}: folder must be one that can be written, got {folder} ({error.strerror}); name another"
            ) from error
        path = folder / "record.json"
        if path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                theirs, ours = found["settings"], json.loads(json.dumps(self.record["settings"]))
                others = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{self.where}: folder must hold a run's record, got {path} ({error}); delete it"
                ) from error
            if others:
                raise ValueError(
                    f"{self.where}: folder must hold a run with the same model and arguments, got another in {path}, "
                    f"with other {', '.join(others)}; pass another folder, or delete it"
                )
            return dict(found)
        return self.record

    def store(self, **parts: Any) -> None:
        """Writes the record with these parts."""
        self.record |= parts
        if self.folder is not None and rank() == 0:
            partial = self.folder / "record.json.partial"
            partial.write_text(json.dumps(self.record, indent=1), encoding="utf-8")
            partial.replace(self.folder / "record.json")

    def keep(self, model: nn.Module, name: str) -> dict[str, torch.Tensor]:
        """Stores the state of model under name, and gives it."""
        state = {key: tensor.detach().clone().contiguous() for key, tensor in model.state_dict().items()}
        if self.folder is not None and rank() == 0:
            partial = self.folder / f"{name}.safetensors.partial"
            safetensors.torch.save_file(state, partial)
            partial.replace(self.folder / f"{name}.safetensors")
        return state

    def kept(self, name: str) -> dict[str, torch.Tensor] | None:
        """The state that keep stored under name; None where there is none.

        Raises:
            ValueError: the file is damaged.
        """
        folder = self.folder
        return None if folder is None else from_rank_0(lambda: self._read(folder / f"{name}.safetensors"))

    def _read(self, path: Path) -> dict[str, torch.Tensor] | None:
        if not path.exists():
            return None
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{self.where}: folder must hold whole states, got {path} ({error}); delete it") from error

    def forget(self, name: str) -> None:
        """Deletes the state under name, if there is one."""
        if self.folder is not None and rank() == 0:
            (self.folder / f"{name}.safetensors").unlink(missing_ok=True)


def fingerprint(model: nn.Module) -> str:
    """What tells the tensors of one model from another's."""
    return fingerprint_of(model.state_dict().items())


def fingerprint_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """What tells named tensors from others."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
