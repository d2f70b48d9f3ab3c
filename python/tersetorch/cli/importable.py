"""Objects of the user's own code, named on the command line as package.module:name."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any


def is_importable(name: str) -> bool:
    """Whether name has the form package.module:name."""
    module, colon, attribute = name.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), *attribute.split(".")))


def files_of(name: str) -> list[str]:
    """Where the code of package.module:name may lie; nothing is imported to find out."""
    parts = os.path.join(*name.partition(":")[0].split("."))
    folders = [os.getcwd(), *sys.path]
    return [os.path.join(folder, file) for folder in folders for file in (f"{parts}.py", f"{parts}/__init__.py")]


def call_importable(verb: str, option: str, name: str) -> Any:
    """What the function name gives; the current folder is looked in first, as by python -m.

    Raises:
        ValueError: there is no such module or function, it cannot be called without arguments, or it raises.
    """
    module, _, attribute = name.partition(":")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
        function: Callable[[], Any] = found
        return function()
    except Exception as error:  # whatever the user's code raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"{verb}: {option} must name a function that works without arguments, got {name} ({reason}); "
            "mend it, or name another"
        ) from error
