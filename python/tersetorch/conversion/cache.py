"""Decisions on disk, so that the same layer on the same machine is measured once."""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any


def directory() -> Path:
    """$TERSETORCH_CACHE, else tersetorch in the user's cache directory."""
    chosen = os.environ.get("TERSETORCH_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "tersetorch"


class DecisionCache:
    """One JSON file for each key: {"key", "decision", "digest" of both}. It never fails: it notes the problem instead.

    Attributes:
        problem: what went wrong first, in words for a warning, or None.
    """

    def __init__(self) -> None:
        self.problem: str | None = None
        self._folder = directory() / "decisions"

    def load(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The decision stored under key, or None."""
        path = self._path(key)
        try:
            text = path.read_text()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            self._note(f"{path} must be readable, got {error}")
            return None
        try:
            entry = json.loads(text)
            decision: dict[str, Any] = entry["decision"]
            if entry["digest"] != _digest([key, decision]):
                raise ValueError("a wrong digest")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self._note(f"{path} must hold a decision, got {type(error).__name__}: {error}")
            return None
        return decision

    def refuse(self, key: dict[str, Any], problem: str) -> None:
        """Notes that the decision stored under key is not one."""
        self._note(f"{self._path(key)} must hold a decision, got {problem}")

    def store(self, key: dict[str, Any], decision: dict[str, Any]) -> None:
        """Writes a decision: readers see the old file or the new one, nothing between."""
        temporary = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._folder, suffix=".tmp", delete=False) as file:
                temporary = file.name
                json.dump({"key": key, "decision": decision, "digest": _digest([key, decision])}, file)
            os.replace(temporary, self._path(key))
        except OSError as error:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
            self._note(f"{self._folder} must be writable, got {error}")

    def _path(self, key: dict[str, Any]) -> Path:
        return self._folder / f"{_digest(key)}.json"

    def _note(self, problem: str) -> None:
        self.problem = self.problem or problem


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:32]
