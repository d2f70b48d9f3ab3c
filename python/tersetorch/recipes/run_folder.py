"""What a long recipe leaves in a folder, so that it can go on from there."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import safetensors
import safetensors.torch
import torch
from torch import nn

from tersetorch.zoo.ranks import from_rank_0, rank, ranks

LOCK, RECORD = "lock", "record.json"


class RunFolder:
    """A folder with record.json, and with states of the model by name; each file is whole at any time.

    The record holds a checksum of itself and of each state, so that one that was edited or damaged is refused. A state
    that was stored counts from the next store on: where a run is stopped between the two, the record knows the ones
    before, so the name of a new one must be new.

    The folder is locked until the with block ends, or the process does. Where torch.distributed has started, rank 0
    alone locks and writes, and what it reads is what every rank gets: all must make one, and call kept, in the same
    order.

    Attributes:
        where: as it was given.
        folder: as it was given.
        record: settings, checksums of states, and what was stored beside them.

    Args:
        where: the public function, for errors.
        folder: made where it is missing; None for a run that leaves nothing.
        settings: what decides the run; JSON-able.
        limits: what may be others the next time: then the parts that restart names are as at the start again.
        restart: names of parts.
        **parts: of the record, as they are at the start.

    Raises:
        ValueError: another run uses folder, or it holds one with other settings, or a file that is no record or was
            changed since it was stored.
        OSError: folder cannot be written.
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
        self.record: dict[str, Any] = {"settings": settings, "limits": limits, "states": {}, **parts}
        self.folder = None if folder is None else Path(folder)
        self._open = ExitStack()
        if folder is not None:
            with self._open:  # which ends here only where something is refused
                self.record = from_rank_0(lambda: self._found(Path(folder)))
                if self.record["limits"] != limits:
                    others = [*self.record["states"]]
                    self.store(limits=limits, states={}, **{name: parts[name] for name in restart})
                    for name in others:
                        self.forget(name)
                self._open = self._open.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def _found(self, folder: Path) -> dict[str, Any]:
        """The record that folder holds, which is made where it is missing, and locked; ours where there is none."""
        with _writing(self.where, folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._open.enter_context(locked(self.where, folder))
        path = folder / RECORD
        if not path.exists():
            return self.record
        try:
            found = json.loads(_regular(path).read_text(encoding="utf-8"))
            whole = found.pop("sha256", None) == _checksum(found)
        except (ValueError, TypeError, AttributeError, RecursionError, OSError) as error:
            raise self._refused("a run's record", path, str(error)) from error
        if not whole:
            raise self._refused("a run's record", path, "it was edited, damaged, or stored without a checksum")
        theirs, ours = found["settings"], json.loads(json.dumps(self.record["settings"]))
        others = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
        if others:
            raise ValueError(
                f"{self.where}: folder must hold a run with the same model and arguments, got another in {path}, "
                f"with other {', '.join(others)}; pass another folder, or delete it"
            )
        return dict(found)

    def _refused(self, what: str, path: Path, why: str) -> ValueError:
        return ValueError(
            f"{self.where}: folder must hold {what} as it was stored, got {path} ({why:.200}); delete the folder "
            f"{path.parent}, or name another"
        )

    def store(self, **parts: Any) -> None:
        """Writes the record with these parts."""
        self.record |= parts
        if self.folder is not None and rank() == 0:
            text = json.dumps({**self.record, "sha256": _checksum(self.record)}, indent=1)
            with _replacing(self.where, self.folder / RECORD) as partial:
                partial.write_text(text, encoding="utf-8")

    def keep(self, model: nn.Module, name: str) -> dict[str, torch.Tensor]:
        """Stores the state of model under name, which the next store makes count, and gives it."""
        state = {key: tensor.detach().clone().contiguous() for key, tensor in model.state_dict().items()}
        if self.folder is not None and rank() == 0:
            with _replacing(self.where, self._path(name)) as partial:
                safetensors.torch.save_file(state, partial)
                self.record["states"] |= {name: _digest(partial)}
        return state

    def kept(self, name: str) -> dict[str, torch.Tensor] | None:
        """The state that keep stored under name; None where there is none.

        Raises:
            ValueError: the file was changed since.
        """
        return None if self.folder is None else from_rank_0(lambda: self._read(name))

    def _read(self, name: str) -> dict[str, torch.Tensor] | None:
        path = self._path(name)
        if not path.exists():
            return None
        try:
            if _digest(_regular(path)) != self.record["states"].get(name):
                raise ValueError("its bytes are others")
            return safetensors.torch.load_file(path)
        except (ValueError, OSError, safetensors.SafetensorError) as error:
            raise self._refused("each state", path, str(error)) from error

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"

    def forget(self, name: str) -> None:
        """Deletes the state under name, if there is one."""
        self.record["states"].pop(name, None)
        if self.folder is not None and rank() == 0:
            with _writing(self.where, self._path(name)):
                self._path(name).unlink(missing_ok=True)


@contextmanager
def locked(where: str, folder: Path) -> Iterator[None]:
    """Keeps other runs out of folder, which exists; the system lets them in again where this process is killed.

    Raises:
        ValueError: another run, of this process or another, is in it.
        OSError: it cannot be locked.
    """
    with _writing(where, folder / LOCK):
        held = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with _writing(where, folder / LOCK):
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(
                    f"{where}: folder must be in use by no other run, got {folder}, which is; wait until that run "
                    "ends, or name another folder or output"
                ) from error
        try:
            yield
        finally:
            fcntl.flock(held, fcntl.LOCK_UN)  # for forked workers too, which have it open
    finally:
        os.close(held)


@contextmanager
def _replacing(where: str, path: Path) -> Iterator[Path]:
    """A path to write to, which then replaces path."""
    partial = path.with_name(f"{path.name}.partial")
    with _writing(where, path):
        try:
            yield partial
            partial.replace(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


@contextmanager
def _writing(where: str, path: Path) -> Iterator[None]:
    """Says of what the system refuses inside which file of the folder it was, and what to do."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).rpartition("I/O error: ")[2]
        kind = type(error) if isinstance(error, OSError) else OSError
        raise kind(
            f"{where}: folder must be one that can be written, got {path} ({reason}); make room there and call again, "
            "or name another"
        ) from error


def _regular(path: Path) -> Path:
    """The path of what can be read to its end."""
    if not path.is_file():
        raise ValueError("it is no regular file")
    return path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(record: dict[str, Any]) -> str:
    """Of the JSON of a record, the same for what is read back from it."""
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


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
