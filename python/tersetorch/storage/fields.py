"""Reading a header strictly: every field has a type and a range, and nothing else may be there."""

from __future__ import annotations

from typing import Any

from tersetorch.storage.errors import refuse

# Beyond any tensor, and small enough that products of two stay exact in the native code.
MAX_SIZE = 1 << 48
# Of a module's or a tensor's path. Each module below has its own, so a long one would be kept many times.
MAX_PATH = 4096


def check_keys(data: Any, owner: str, allowed: set[str]) -> dict[str, Any]:
    """Returns data, an object whose keys are all allowed."""
    if not isinstance(data, dict):
        refuse(f"have an object as {owner}", type(data).__name__)
    unknown = data.keys() - allowed
    if unknown:
        refuse(f"have only known fields in {owner}", sorted(unknown)[0][:40], "read it with a newer tersetorch")
    return data


def integer(value: Any, owner: str, low: int, high: int) -> int:
    """Returns value, an integer in [low, high]."""
    if type(value) is not int or not low <= value <= high:
        refuse(f"have an integer in [{low}, {high}] as {owner}", repr(value)[:40])
    return value


def number(value: Any, owner: str, low: float, high: float) -> float:
    """Returns value, a number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        refuse(f"have a number in [{low}, {high}] as {owner}", repr(value)[:40])
    return value


def joined(path: str, name: str) -> str:
    """Returns the path of what is called name inside path."""
    if len(path) + len(name) >= MAX_PATH:
        refuse(f"have paths of modules of fewer than {MAX_PATH} characters", f"{path[:40]}...")
    if not name.isprintable():
        refuse("have names of modules and tensors without control characters", repr(name)[:40])
    return f"{path}.{name}".removeprefix(".")


def text(value: Any, owner: str, allowed: tuple[str, ...] = ()) -> str:
    """Returns value, a string, one of allowed where that is given."""
    if not isinstance(value, str) or (allowed and value not in allowed):
        rule = f"one of {', '.join(allowed)}" if allowed else "a string"
        refuse(f"have {rule} as {owner}", repr(value)[:40])
    return value


def items(value: Any, owner: str) -> list[Any]:
    """Returns value, a list."""
    if not isinstance(value, list):
        refuse(f"have a list as {owner}", repr(value)[:40])
    return value


def flag(value: Any, owner: str) -> bool:
    """Returns value, true or false."""
    if not isinstance(value, bool):
        refuse(f"have true or false as {owner}", repr(value)[:40])
    return value
