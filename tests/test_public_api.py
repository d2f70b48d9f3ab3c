"""What a release promises to keep, compared with the stored listing; CONTRIBUTING.md, Versions, has the rules.

python tests/test_public_api.py writes tests/golden/public_api.txt anew.
"""

import importlib
import inspect
import re
from pathlib import Path

import torch
import typer

import tersetorch
from tersetorch.cli import app
from tersetorch.storage import container, registry
from tersetorch.storage.entry import DTYPES, FIELDS, FORMS, ROLE_CODERS

LISTING = Path(__file__).parent / "golden" / "public_api.txt"
PACKAGE = Path(tersetorch.__file__).parent
# Beside what tersetorch itself has; methods are reached as tersetorch.prune and its like.
ROOMS = ("conversion", "recipes", "storage")


def arguments(function):
    """Names of arguments; = follows what may be left out, / and * stand as in a definition."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # exceptions have none
        return "(...)"
    marks = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parts = []
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not any(part.startswith("*") for part in parts):
            parts.append("*")
        optional = "" if parameter.default is parameter.empty else "="
        parts.append(marks.get(parameter.kind, "") + parameter.name + optional)
    return f"({', '.join(part for part in parts if part != 'self')})"


def members(name, cls):
    """Our own methods and properties of a class; what every nn.Module has is no promise of ours."""
    for key in sorted(set(dir(cls)) - set(dir(torch.nn.Module))):
        found = inspect.getattr_static(cls, key)
        function = getattr(found, "fget", None) or getattr(found, "__func__", found)
        if not key.startswith("_") and str(getattr(function, "__module__", "")).startswith("tersetorch"):
            yield f"{name}.{key}" + ("" if isinstance(found, property) else arguments(function))


def names(module, path):
    """Everything in __all__, and in the modules that stand there."""
    for key in module.__all__:
        found, name = getattr(module, key), f"{path}.{key}"
        if inspect.ismodule(found):
            yield from names(found, name)
        else:
            yield name + (arguments(found) if callable(found) else "")
            if inspect.isclass(found):
                yield from members(name, found)


def ops():
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("tersetorch::"):
            yield f"op {torch._C._get_schema(name, '')}"


def commands():
    whole = typer.main.get_command(app)
    for parameter in whole.params:
        yield f"command tersetorch {'/'.join(parameter.opts)}"
    for verb, command in whole.commands.items():
        yield f"command tersetorch {verb}"
        for parameter in command.params:
            spelling = "/".join([*parameter.opts, *parameter.secondary_opts])
            yield f"command tersetorch {verb} {spelling if spelling.startswith('-') else parameter.name.upper()}"


def files():
    yield from (f"file version {version}" for version in container.VERSIONS)
    yield from (f"file form {form}: {', '.join(roles)}" for form, roles in FORMS.items())
    yield from (f"file coder of {role}: {coder}" for role, coders in ROLE_CODERS.items() for coder in coders)
    yield from (f"file dtype {name}" for name in DTYPES)
    yield from (f"file field {name}" for name in FIELDS)
    for name, kind in registry._by_name.items():
        ours = kind.cls.__module__.startswith("tersetorch.")
        if ours or kind.cls.__module__.startswith("torch."):  # not those that other tests register
            yield f"file kind {name}{arguments(kind.build) if ours else ''}"


def environment():
    for file in PACKAGE.rglob("*.py"):
        yield from (f"environment {name}" for name in re.findall(r"[\"'](TERSETORCH_\w+)[\"']", file.read_text()))


def listing():
    """Sorted lines, one for each thing that somebody may rely on."""
    found = {*names(tersetorch, "tersetorch"), *ops(), *commands(), *files(), *environment()}
    for room in ROOMS:
        found.update(names(importlib.import_module(f"tersetorch.{room}"), f"tersetorch.{room}"))
    return sorted(found)


def test_the_public_api_is_the_listed_one():
    stored, found = set(LISTING.read_text().splitlines()), set(listing())
    rule = "decide it by CONTRIBUTING.md, Versions, then run python tests/test_public_api.py"
    assert not stored - found, f"gone or changed: {rule}"
    assert not found - stored, f"new: {rule}"


def test_packages_of_methods_are_imported_by_their_short_names():
    from tersetorch.prune import obs

    assert obs is tersetorch.prune.obs
    for package in ("binarize", "factorize", "prune", "quantize"):
        assert importlib.import_module(f"tersetorch.{package}") is getattr(tersetorch, package)
    # Nothing is loaded twice, whichever name it is asked by.
    obd = importlib.import_module("tersetorch.methods.prune.obd")
    assert importlib.import_module("tersetorch.prune.obd") is obd
    assert callable(tersetorch.prune.obd)


if __name__ == "__main__":
    LISTING.write_text("\n".join(listing()) + "\n")
