"""The archive of an exported program (.pt2), written anew from what is known to be harmless in it.

torch.export.load trusts its file: it unpickles weights of an older form, constants and example inputs, evaluates sizes
as Python, imports modules by names in descriptions of inputs, and makes source code of the graph's names. So it is
given an archive in memory that holds the program, plain weights and constants, every word of them looked at here, and
nothing else; two readers of zip files that understand one file differently, a way round any check, then do no harm.

    <prefix>/models/<name>.json                   the graph, schema in torch/_export/serde/schema.py
    <prefix>/data/{weights,constants}/<name>_..._config.json   a table: where each tensor's bytes are, and its shape
    <prefix>/data/{weights,constants}/...         bytes of tensors as they are, named by a table
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from tersetorch.storage.archives import what_is_wrong

TABLES = {"weights": "weight_", "constants": "tensor_"}
MODEL = "model"  # the name that torch.export.save gives, and the one that load reads
# Names of nodes, inputs, parameters and devices; they become source code.
_NAME = re.compile(r"[\w.@-]*")
# Strings in an op's arguments become literals, and may be anything.
_TEXTS = ("as_string", "as_strings")
_NOTES: dict[str, Any] = {"metadata": {}, "guards_code": [], "treespec_namedtuple_fields": {}}
# Arguments that name functions or classes.
_REFUSED = ("as_operator", "as_custom_obj", "as_complex")
_OPERATORS = re.compile(
    r"torch\.ops\.(aten|tersetorch|quantized_decomposed|torchvision)\.\w+\.\w+"
    r"|torch\.ops\.higher_order\.(cond|wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|_operator\.(add|sub|mul|truediv|floordiv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)"
    r"|torch\.sym_\w+|math\.\w+"
)
# These read and write files, or the terminal.
_HARMFUL = re.compile(r"torch\.ops\.aten\.(from_file|save|_print|print|warn)\.\w+")
# Containers of inputs and outputs, all of builtins.
_CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict", "builtins.NoneType", "collections.OrderedDict")
# Sizes are written as calls of these.
_FUNCTIONS = re.compile(
    "Symbol|Integer|Rational|Float|Add|Mul|Pow|Max|Min|Mod|floor|ceiling|Abs|Equality|Unequality|StrictLessThan|LessThan"
    "|StrictGreaterThan|GreaterThan|And|Or|Not|FloorDiv|ModularIndexing|Where|PythonMod|CleanDiv|CeilDiv|CeilToInt"
    "|FloorToInt|FloatTrueDiv|IntTrueDiv|TruncToFloat|TruncToInt|RoundToInt|ToFloat|Identity|PowByNatural|LShift|RShift"
)
_POWERS = ("Pow", "PowByNatural", "LShift")
MOST_POWER = 16
MOST_NESTED_POWERS = 2
MOST_NUMBER = 1 << 63
MOST_EXPRESSION = 2000


class HarmfulError(Exception):
    """What a file came with; import_exported makes a sentence of it."""


def rewritten(path: Path) -> io.BytesIO:
    """An archive that torch.export.load may be given.

    It takes at most twice the file's bytes, beside the program and the tables as Python objects.

    Raises:
        HarmfulError: the file holds more than a graph of known operators and plain tensors.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _rewritten(archive, path.stat().st_size)
    except (zipfile.BadZipFile, NotImplementedError, EOFError):
        raise HarmfulError("no archive in it") from None
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError):
        raise HarmfulError("a program or a table of weights that cannot be read") from None


def _rewritten(archive: zipfile.ZipFile, file_bytes: int) -> io.BytesIO:
    entries = _entries(archive, file_bytes)
    programs = [name for name in entries if name.startswith("models/") and name.endswith(".json")]
    if len(programs) != 1:
        refuse(f"{len(programs)} programs")
    model = programs[0].removeprefix("models/").removesuffix(".json")
    if any(name.startswith("data/aotinductor") for name in entries):
        refuse("compiled code")
    if any(f"data/{kind}/{model}.pt" in entries for kind in TABLES):
        refuse("pickled tensors or objects")
    # Imported here, since it imports torch's compiler for two seconds.
    from torch.export.pt2_archive import PT2ArchiveWriter

    out = io.BytesIO()
    with PT2ArchiveWriter(out) as writer:
        program = json.loads(archive.read(entries[programs[0]]))
        _check_program(program)
        writer.write_bytes(f"models/{MODEL}.json", json.dumps(program).encode())
        for kind, prefix in TABLES.items():
            table = json.loads(archive.read(entries[f"data/{kind}/{model}_{kind}_config.json"]))
            for name in _files(table, prefix, {at: info.file_size for at, info in entries.items()}, f"data/{kind}/"):
                writer.write_bytes(f"data/{kind}/{name}", archive.read(entries[f"data/{kind}/{name}"]))
            writer.write_bytes(f"data/{kind}/{MODEL}_{kind}_config.json", json.dumps(table).encode())
        writer.write_bytes(f"data/sample_inputs/{MODEL}.pt", b"")
    out.seek(0)
    return out


def refuse(came: str) -> NoReturn:
    """Raises HarmfulError."""
    raise HarmfulError(came)


def _entries(archive: zipfile.ZipFile, file_bytes: int) -> dict[str, zipfile.ZipInfo]:
    """The archive's files by their names without the prefix that all of them have."""
    wrong = what_is_wrong(archive, file_bytes)
    if wrong is not None:
        refuse(wrong)
    return {info.filename.partition("/")[2]: info for info in archive.infolist()}


def _files(table: Any, prefix: str, sizes: dict[str, int], folder: str) -> Iterator[str]:
    """The names of the files that a table of tensors needs, after looking at every row."""
    _check_names(table)
    seen = set()
    for part in table["config"].values():
        name, meta = part["path_name"], part["tensor_meta"]
        if part["use_pickle"] is not False or not re.fullmatch(rf"{prefix}\d+", name):
            refuse("pickled tensors or objects")
        shape, strides, offset = (meta[key] for key in ("sizes", "strides", "storage_offset"))
        numbers = [entry["as_int"] for entry in (*shape, *strides, offset)]
        if not all(type(number) is int and 0 <= number < MOST_NUMBER for number in numbers):
            refuse("sizes of a tensor that are no numbers")
        count = 1
        for entry in shape:
            count *= entry["as_int"]
        if count > sizes[folder + name]:
            refuse("a tensor of more numbers than it has bytes")
        if name not in seen:
            seen.add(name)
            yield name


def _check_program(program: Any) -> None:
    """Refuses what would run, or reach a file; takes out notes that nobody needs."""
    if not isinstance(program, dict) or not isinstance(program["graph_module"], dict):
        refuse("a program that is no object")
    _check_names(program)


def _check_names(value: Any, key: str = "") -> None:
    if isinstance(value, str):
        if key in _TEXTS:
            return
        if key == "target":
            _check_operator(value)
        elif key == "expr_str":
            check_expression(value)
        elif key in ("in_spec", "out_spec"):
            _check_containers(value)
        elif key != "torch_version" and not _NAME.fullmatch(value):
            refuse(f"a name such as {value[:40]!r}")
    elif isinstance(value, dict):
        for name in value:
            if not _NAME.fullmatch(name):
                refuse(f"a name such as {name[:40]!r}")
            if name in _REFUSED and value[name] is not None:
                refuse(f"an argument {name}")
            if name in _NOTES:
                value[name] = _NOTES[name]
            else:
                _check_names(value[name], name)
    elif isinstance(value, list):
        for item in value:
            _check_names(item, key)


def _check_operator(target: str) -> None:
    if not _OPERATORS.fullmatch(target) or _HARMFUL.fullmatch(target):
        refuse(f"the operator {target[:80]!r}, which is none that is known to be harmless")


def _check_containers(text: str) -> None:
    """A description of inputs or outputs: JSON of [1, spec], an empty string for none."""
    if not text:
        return
    _, spec = json.loads(text)
    left = [spec]
    while left:
        one = left.pop()
        context = None if one["context"] is None else json.loads(one["context"])
        if one["type"] not in _CONTAINERS:
            refuse(f"inputs or outputs in a {str(one['type'])[:80]}")
        if context is not None and not (
            isinstance(context, list) and all(isinstance(name, str) and _NAME.fullmatch(name) for name in context)
        ):
            refuse("inputs or outputs whose names are no names")
        left += one["children_spec"]


def check_expression(text: str) -> None:
    """Refuses a size that is more than sums, products and comparisons of numbers and symbols.

    torch hands it to sympy, which evaluates it as Python.

    Raises:
        HarmfulError: it is.
    """
    if len(text) > MOST_EXPRESSION:
        refuse("a size of too many operations")
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, MemoryError, RecursionError):
        refuse("a size that is no expression")
    _check_node(tree, 0)


def _check_node(node: Any, powers: int) -> None:
    if isinstance(node, ast.Name) and node.id in ("true", "false"):
        return
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return _check_node(node.operand, powers)
    if isinstance(node, ast.Constant) and (type(node.value) is bool or _is_number(node.value)):
        return None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and _FUNCTIONS.fullmatch(node.func.id):
        return _check_call(node, node.func.id, powers)
    refuse("a size that is no sum or product of numbers and symbols")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -MOST_NUMBER <= value <= MOST_NUMBER


def _check_call(node: Any, name: str, powers: int) -> None:
    arguments = node.args
    for keyword in node.keywords:  # what a symbol is assumed to be, or a number's precision
        word: Any = getattr(keyword.value, "value", None)
        if type(word) not in (bool, int):
            refuse("a size with other words than true and false")
        if keyword.arg == "precision" and not 1 <= word <= 100:
            refuse("a size of too many digits")
    if name in ("Symbol", "Float") and arguments and isinstance(arguments[0], ast.Constant):
        first, arguments = arguments[0].value, arguments[1:]
        named = re.fullmatch(r"\w{1,64}" if name == "Symbol" else r"[-+]?[\d.]{1,40}(e[-+]?\d{1,3})?", str(first))
        if not named:
            refuse("a size whose symbols have no names")
    if name in _POWERS:
        last = arguments[-1] if len(arguments) == 2 else None
        exponent = last.args[0] if isinstance(last, ast.Call) and len(last.args) == 1 else last
        power: Any = getattr(exponent.operand if isinstance(exponent, ast.UnaryOp) else exponent, "value", None)
        if powers >= MOST_NESTED_POWERS or not _is_number(power) or power > MOST_POWER:
            refuse(f"a size with a power above {MOST_POWER}")
        powers += 1
    for argument in arguments:
        _check_node(argument, powers)
