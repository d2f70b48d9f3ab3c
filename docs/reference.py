"""The reference's pages, written from what the package says is public: nothing here is a list of names to be kept."""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import tersetorch

ROOT = Path(__file__).parent.parent
PACKAGE = Path(tersetorch.__file__).parent
# Classes of others, whose members their own documentation describes.
NOT_OURS = "Module,Optimizer,BaseModel,AOBaseConfig,object,tuple"
LIBRARY = ROOT / "csrc" / "torch" / "library.cpp"


@functools.cache
def public_modules() -> dict[str, ModuleType]:
    """The modules that say in __all__ what is public, by the name that a user types, most used names first.

    Modules that only gather others are left out, and the command line, which has a page of its own.
    """
    found = {"tersetorch": tersetorch}
    found |= {f"tersetorch.{name}": value for name, value in public(tersetorch).items() if inspect.ismodule(value)}
    for file in sorted(PACKAGE.rglob("*.py")):
        if "\n__all__ = " not in file.read_text() or PACKAGE / "cli" in file.parents:
            continue
        name = ".".join(("tersetorch", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        module = importlib.import_module(name)
        parent, _, own = name.rpartition(".")
        # A function hides the module of its name, see ops: what cannot be reached is not public.
        reached = not parent or getattr(importlib.import_module(parent), own) is module
        if reached and module not in found.values():
            found[name] = module
    gathered = {name for name, module in found.items() if all(map(inspect.ismodule, public(module).values()))}
    return {name: module for name, module in found.items() if name not in gathered}


def public(module: ModuleType) -> dict[str, Any]:
    """What __all__ names."""
    return {name: getattr(module, name) for name in module.__all__}


@functools.cache
def places() -> dict[str, dict[str, Any]]:
    """The names that each module's page describes: an object that several modules offer is described by the first."""
    described: set[int] = set()
    pages: dict[str, dict[str, Any]] = {}
    for module_name, module in public_modules().items():
        # Numbers and tuples may be one object by accident.
        new = {name: value for name, value in public(module).items() if id(value) not in described or is_plain(value)}
        if here := {name: value for name, value in new.items() if not inspect.ismodule(value)}:
            pages[module_name] = here
        described |= {id(value) for value in new.values()}
    return pages


@functools.cache
def public_names() -> dict[str, str]:
    """Where an object is defined -> the name that a user types, for classes and functions."""
    return {
        f"{value.__module__}.{value.__qualname__}": f"{module}.{name}"
        for module, names in places().items()
        for name, value in names.items()
        if inspect.isclass(value) or inspect.isfunction(value)
    }


def write_pages(folder: Path) -> None:
    """One page for each public module, one for the ops as the dispatcher knows them, one for the command line."""
    folder.mkdir(exist_ok=True)
    pages = {module: _module_page(module, names) for module, names in places().items()}
    pages["schemas"] = _schemas_page()
    for name, text in pages.items():
        _write(folder / f"{name}.rst", text)
    _write(folder / "command_line.md", command_line())
    for left in {*folder.glob("*.rst"), *folder.glob("*.md")} - {folder / f"{name}.rst" for name in pages}:
        if left.name != "command_line.md":
            left.unlink()


def as_markup(docstring: list[str]) -> list[str]:
    """A docstring's lines as reStructuredText. Ours are plain text with names in `backticks`.

    An asterisk or a bar in them is mathematics; what is indented under a paragraph, or under Example:, is a formula, a
    table or code, and stays as it is.
    """
    lines: list[str] = []
    section, literal = "", False
    for line in docstring:
        if line and not line.startswith(" "):
            header = re.fullmatch(r"(\w+):", line)
            section = header[1] if header else ""
            literal = section == "Example"
            if literal:
                lines += ["Example::", ""]
                continue
        elif line and not (literal or section) and lines and not lines[-1]:
            lines += ["::", ""]
            literal = True
        if section and not literal and (names := re.match(r"    \w+(, \w+)+:", line)):
            # Several attributes in one line: without a space, or the first would count as the others' type.
            line = names[0].replace(", ", ",") + line[names.end() :]
        lines.append(line if literal and line.startswith(" ") else _escaped(line))
    return lines


def _escaped(line: str) -> str:
    parts = re.split(r"`([^`]+)`", line)
    parts[::2] = [re.sub(r"(\\|\*|\||`|(?<=\w)_(?!\w))", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [f"``{part}``" for part in parts[1::2]]
    return "".join(parts)


def command_line() -> str:
    """Every verb with its arguments and options, as typer writes them."""
    import typer
    from typer.cli import get_docs_for_click

    from tersetorch.cli import app

    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="tersetorch", title="Command line")
    return re.sub(r"<(?=[a-z])", r"\\<", text)


def schemas() -> dict[str, tuple[str, str]]:
    """Name of an op -> its schema, and what csrc/torch/library.cpp says above it."""
    registered = {
        schema.name.partition("::")[2]: str(schema).partition("::")[2]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("tersetorch::")
    }
    comment: list[str] = []
    found = {}
    for line in LIBRARY.read_text().splitlines():
        if said := re.match(r"\s*// (.*)", line):
            comment.append(said[1])
        elif op := re.search(r'"(\w+)\(', line):
            found[op[1]] = (registered[op[1]], " ".join(comment))
            comment = []
        elif not line.strip():
            comment = []
    return found


def is_plain(value: object) -> bool:
    """Whether it is a value: it has no docstring of its own."""
    return not (inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value))


def _write(path: Path, text: str) -> None:
    """Only where it differs, so that Sphinx reads again what has changed."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _module_page(module: str, names: dict[str, Any]) -> str:
    heading = module
    lines = [heading, "=" * len(heading), "", f".. automodule:: {module}", ""]
    lines += [f".. currentmodule:: {module}", ""]
    for name, value in names.items():
        said = comment_above(name) if is_plain(value) else (inspect.getdoc(value) or "").splitlines()
        lines += [f":py:obj:`{name}`", f"   {_first_sentence(said)}", ""]
    for name, value in names.items():
        lines += _entry(name, value)
    return "\n".join(lines)


def _entry(name: str, value: object) -> list[str]:
    if is_plain(value):
        said = as_markup(comment_above(name))
        return [f".. py:data:: {name}", f"   :value: {_short(value)}", "", *(f"   {line}" for line in said), ""]
    if inspect.isclass(value) and issubclass(value, BaseException):
        return [f".. autoexception:: {name}", ""]
    if inspect.isclass(value):
        return [f".. autoclass:: {name}", "   :members:", f"   :inherited-members: {NOT_OURS}", ""]
    return [f".. autofunction:: {name}", ""]


def _first_sentence(docstring: list[str]) -> str:
    paragraph = " ".join(itertools.takewhile(bool, docstring))
    return _escaped(re.split(r"(?<=[.;]) ", paragraph)[0].rstrip(";"))


def comment_above(name: str) -> list[str]:
    """What the source says of a constant: the comment lines before it, or before the group of lines that it is in."""
    for lines in _sources():
        for number, line in enumerate(lines):
            if re.match(rf"{name}\b[^=]* = ", line):
                while re.match(r"\w+ = ", lines[number - 1]):
                    number -= 1
                first = number
                while lines[first - 1].startswith("# "):
                    first -= 1
                return [said.removeprefix("# ") for said in lines[first:number]]
    return []


@functools.cache
def _sources() -> list[list[str]]:
    return [file.read_text().splitlines() for file in sorted(PACKAGE.rglob("*.py"))]


def _short(value: object) -> str:
    """A constant's value on one line, where it fits."""
    text = repr(value)
    return text if len(text) < 100 else f"{type(value).__name__} of {len(value)}"  # type: ignore[arg-type]


def _schemas_page() -> str:
    heading = "torch.ops.tersetorch"
    lines = [heading, "=" * len(heading), ""]
    lines += [
        "The ops as PyTorch's dispatcher has them, for graphs and for C++. In Python, call",
        ":mod:`tersetorch.ops`.",
    ]
    for name, (schema, comment) in schemas().items():
        lines += ["", name, "-" * len(name), "", ".. code-block:: text", "", f"   {schema}", ""]
        lines += [_escaped(comment)]
    return "\n".join(lines) + "\n"
