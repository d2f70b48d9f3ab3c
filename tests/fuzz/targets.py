"""What is fuzzed: tt.load and tt.inspect, coders of streams, importers, data sets and recipes. Seeds are made here."""

import copy
import io
import json
import random
import struct
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

import tersetorch
from fuzz.engine import Target
from tersetorch import _native
from tersetorch.recipes import DeepCompressionRecipe
from tersetorch.storage import (
    TerseFileError,
    container,
    import_exported,
    inspect,
    load,
    read_deep_compression,
    read_larq,
    read_quantized,
    streams,
)
from tersetorch.storage.streams import Context, Grid, Stream
from tersetorch.zoo import read_dataset

PACKAGE = Path(tersetorch.__file__).parent
GOLDEN = Path(__file__).parent.parent / "storage" / "golden"
# Small, so that reaching it costs no time.
MAX_BYTES = 4 << 20
MAX_ITEMS = 1 << 16

ODD_NUMBERS = [-1, 0, 1, 2, 3, 7, 16, 255, 256, 65535, 1 << 20, 1 << 23, 1 << 31, 1 << 47, 1 << 48, 1 << 70, 1.5, 1e308]
ODD = [None, True, False, [], {}, [0], "", "a.b", "weight", "bias", *ODD_NUMBERS]


def odd_bytes(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Data with a few bytes flipped, set, cut out, doubled, or taken from other data."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randrange(len(changed) + 1)
        action = rng.randrange(6)
        if action == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif action == 1 and at < len(changed):
            changed[at] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        elif action == 2:
            del changed[at : at + rng.choice([1, 2, 8, 64])]
        elif action == 3:
            changed[at:at] = changed[at : at + rng.choice([1, 4, 32])]
        elif action == 4 and other:
            begin = rng.randrange(len(other))
            changed[at:at] = other[begin : begin + rng.choice([1, 4, 32])]
        else:
            changed[at:at] = rng.randbytes(rng.choice([1, 2, 8]))
    return bytes(changed)


# ---- files


def parts(raw: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Header and streams of a file, a last stream being what is left where they do not fit."""
    header, data, _, _ = container.unpack(raw)
    found, at = [], 0
    for entry in header["t"]:
        for stream in entry["x"]:
            found.append(bytes(data[at : at + stream[1]]))
            at += stream[1] + container.CHECKSUM_BYTES
    return header, found


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every path into a JSON value."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def at_place(value: Any, path: tuple[Any, ...]) -> Any:
    """What is at a path."""
    for key in path:
        value = value[key]
    return value


def odd_file(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """A file whose header or streams are changed and whose checksums fit, or one that is just damaged."""
    if rng.random() < 0.05:
        return odd_bytes(rng, data, other)
    try:
        header, found = parts(data)
        of_other, _ = parts(other)
    except (TerseFileError, KeyError, TypeError, IndexError, AttributeError):
        return odd_bytes(rng, data, other)
    changes = rng.choice([1, 1, 2, 3])
    of_streams = sum(rng.random() < 0.35 for _ in range(changes)) if found else 0
    for change in range(changes):
        if change < of_streams:  # first, while the header tells their lengths
            number = rng.randrange(len(found))
            kept = len(found[number])
            found[number] = odd_bytes(rng, found[number], rng.choice(found))
            if rng.random() < 0.5:  # of the length that the header tells
                found[number] = (found[number] + bytes(kept))[:kept]
            else:
                set_length(header, number, len(found[number]))
        else:
            odd_header(rng, header, of_other)
    return container.pack(header, found)


def set_length(header: dict[str, Any], number: int, length: int) -> None:
    """Writes a stream's length where the header tells it."""
    specs = [stream for entry in header["t"] for stream in entry["x"]]
    specs[number][1] = length


def odd_header(rng: random.Random, header: dict[str, Any], other: dict[str, Any]) -> None:
    """Changes one place of a header: another value, one from elsewhere or another file, none, or one more."""
    path = rng.choice(list(places(header))[1:] or [()])
    if not path:
        return
    owner, key = at_place(header, path[:-1]), path[-1]
    action = rng.randrange(6)
    if action == 0:
        owner[key] = copy.deepcopy(rng.choice(ODD))
    elif action == 1 and type(owner[key]) is int:
        owner[key] += rng.choice([-8, -1, 1, 8, owner[key]])
    elif action == 2:
        owner.pop(key)
    elif action == 3 and isinstance(owner[key], dict):
        owner[key][rng.choice("kcatmeosdfnwuhimbgovx01")] = copy.deepcopy(rng.choice(ODD))
    else:
        source = header if action == 4 else other
        alike = [where for where in places(source) if where and type(where[-1]) is type(key)]
        if isinstance(key, str):
            alike = [where for where in alike if where[-1] == key] or alike
        if alike:
            owner[key] = copy.deepcopy(at_place(source, rng.choice(alike)))


@cache
def _path() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzz-")) / "m.terse"


def read_file(data: bytes) -> object:
    """Inspects and loads a file, also into an instance; what came of it counts as coverage."""
    _path().write_bytes(data)
    outcomes = []
    for read in (inspect, lambda path: load(path, max_bytes=MAX_BYTES)):
        try:
            read(_path())
            outcomes.append("")
        except TerseFileError as error:
            if "must " not in str(error) or ", got " not in str(error):
                raise
            outcomes.append(type(error.__cause__).__name__)
    if outcomes[0] == "":
        root = parts(data)[0].get("m")
        children = len(root.get("m", {})) if isinstance(root, dict) else -1
        if children in _instances():
            try:
                load(_path(), model=_instances()[children], max_bytes=MAX_BYTES)
                outcomes.append("")
            except ValueError as error:
                if "must " not in str(error) or ", got " not in str(error):
                    raise
                outcomes.append(type(error).__name__)
    return tuple(outcomes)


@cache
def _instances() -> dict[int, Any]:
    """The models of the seeds, by the number of their children."""
    models = [load(path) for path in sorted(GOLDEN.glob("*.terse"))]
    return {len(model._modules): model for model in models}


def files() -> Iterable[bytes]:
    """The files of every format version."""
    return [path.read_bytes() for path in sorted(GOLDEN.glob("*.terse"))]


# ---- coders: an input is a JSON line with the arguments, and the stream


def coded() -> Iterable[bytes]:
    """Streams of every coder."""
    rng = np.random.default_rng(0)
    codes = rng.binomial(7, 0.3, 300).astype(np.uint16)
    counts = np.bincount(codes, minlength=8)
    for coder in ("packed", "huffman", "rans"):
        stream = streams.encode_codes(codes, 8, streams.Coding(coder, 0))
        yield _input(stream, entries=8, count=300)
    grid = Grid(300, 10, 3, 3)
    order = np.arange(8)
    context = Context(grid, None, order, 3)
    coding = streams.Coding(
        "contexts", 0, data=_native.contexts_encode_symbols(codes.astype(np.uint8), *context.arguments)
    )
    yield _input(streams.encode_codes(codes, 8, coding), entries=8, count=300, grid=[300, 10, 3, 3])
    assert counts.sum() == 300
    positions = np.flatnonzero(rng.random(2000) < 0.1)
    for coder, width in (("gaps", 3), ("gaps-huffman", 5), ("gaps-rans", 5), ("bitmap", 0)):
        stream = streams.encode_positions("positions", positions, 2000, streams.Coding(coder, 0, width))
        yield _input(stream, count=positions.size, size=2000)
    data = _native.contexts_encode_positions(positions, 2000, 20, 5, 5)
    yield _input(Stream("positions", "contexts", 0, data), count=positions.size, size=2000, grid=[2000, 20, 5, 5])
    values = rng.standard_normal(200).astype(np.float32)
    for kept in (values.view(np.uint32), (values * 4).round().astype(np.int64).astype(np.uint64)):
        stream = streams.value_stream("values", kept)
        yield _input(stream, count=200, bytes=kept.itemsize)
        numbers = _native.numbers_encode(kept.astype(np.uint64), 8 * kept.itemsize)
        yield _input(Stream("values", "numbers", 0, numbers), count=200, bytes=kept.itemsize)
    yield _input(
        streams.value_stream("values", values.view(np.uint32), streams.Coding("planes", 0)), count=200, bytes=4
    )


def _input(stream: Stream, **arguments: Any) -> bytes:
    arguments |= {"role": stream.role, "coder": stream.coder, "width": stream.width}
    return json.dumps(arguments).encode() + b"\n" + stream.data


def odd_stream(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """A stream with other bytes, or other arguments, in the ranges that the header's checks leave."""
    line, _, stream = data.partition(b"\n")
    arguments = json.loads(line)
    if rng.random() < 0.7:
        stream = odd_bytes(rng, stream, other.partition(b"\n")[2])
    else:
        name = rng.choice([name for name in arguments if name not in ("role", "coder", "bytes")])
        if name == "grid":
            kernel_width, lines, channels, rows = (rng.randrange(1, 9) for _ in range(4))
            kernel = kernel_width * lines
            arguments["grid"] = [rows * channels * kernel, channels, kernel, kernel_width]
        elif name == "width":
            arguments["width"] = rng.randrange(1, 16)
        else:
            arguments[name] = rng.choice([0, 1, 2, 255, 256, 8191, MAX_ITEMS, rng.randrange(MAX_ITEMS)])
    return json.dumps(arguments).encode() + b"\n" + stream


def read_stream(data: bytes) -> object:
    """Decodes a stream as the header's checks would let it through."""
    line, _, stream = data.partition(b"\n")
    told = json.loads(line)
    coder, count = told["coder"], told["count"]
    grid = Grid(*told["grid"]) if "grid" in told else None
    if told["role"] == "values":
        decoded: Any = streams.decode_values(stream, coder, np.dtype(f"u{told['bytes']}"), count)
    elif told["role"] == "codes":
        entries = max(1, told["entries"])
        context = None
        if coder == "contexts":
            assert grid is not None
            entries = min(entries, streams.MAX_CONTEXT_ENTRIES)
            count = grid.size
            context = Context(grid, None, np.arange(entries), entries // 2)
        decoded = streams.decode_codes(stream, coder, entries, count, context)
        streams.table_bytes(stream, coder, entries)
        assert decoded.size == count and (not count or int(decoded.max()) < entries)
    else:
        size = told["size"] if grid is None else grid.size
        count = min(count, size)
        decoded = streams.decode_positions(stream, coder, told["width"], count, size, grid)
        assert decoded.size == count and bool((np.diff(decoded) > 0).all())
        assert not count or 0 <= int(decoded[0]) <= int(decoded[-1]) < size
    return coder, int(decoded.size).bit_length()


# ---- recipes


def recipes() -> Iterable[bytes]:
    """The recipes of the package, and one without training."""
    published = [path.read_bytes() for path in sorted((PACKAGE / "recipes").glob("*.yaml"))]
    return [*published, b"prune: {method: obs, sparsity: 0.5, calibration: 64, refine: 0}\nshare: {bits: 4}\n"]


def odd_text(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """A recipe with a word from another, or from YAML's, in the place of one of its own, or damaged."""
    words = [
        "&a",
        "*a",
        "!!int",
        "!!float",
        "[",
        "]",
        "{",
        "}",
        "-",
        ".nan",
        "1e400",
        "0x",
        "2001-99-99",
        "<<:",
        "null",
    ]
    if rng.random() < 0.4:
        return odd_bytes(rng, data, other)
    mine, others = data.split(b" "), other.split()
    at = rng.randrange(len(mine))
    mine[at] = rng.choice([*(word.encode() for word in words), rng.choice(others or [b""])])
    return b" ".join(mine)


def read_recipe(data: bytes) -> object:
    """Reads a recipe; one that is read must be written and read again as the same."""
    path = _path().with_name("recipe.yaml")
    path.write_bytes(data)
    recipe = DeepCompressionRecipe.from_yaml(path)
    path.write_text(recipe.to_yaml())
    assert DeepCompressionRecipe.from_yaml(path) == recipe
    return None


# ---- exported programs


@cache
def _exported() -> bytes:
    model = torch.nn.Sequential(torch.nn.Conv1d(2, 4, 3, padding=1), torch.nn.Flatten(1), torch.nn.Linear(20, 3)).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    path = _path().with_name("seed.pt2")
    torch.export.save(torch.export.export(model, (torch.zeros(3, 2, 5),), dynamic_shapes=({0: batch},)), path)
    return path.read_bytes()


def exported() -> Iterable[bytes]:
    """An exported program."""
    return [_exported()]


EXPRESSIONS = ["Integer(2)", "Symbol('s9')", "Pow(Symbol('s77'), Integer(2))", "Max(1, 2)", "FloorDiv(4, 0)", "Mod()"]


def odd_exported(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """An archive with a word of its program or of a table changed, or one that is just damaged."""
    if rng.random() < 0.1:
        return odd_bytes(rng, data, other)
    changed = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(changed, "w") as new:
            names = old.namelist()
            chosen = rng.choice([*names, *[name for name in names if name.endswith(".json")] * len(names)])
            for name in names:
                content = old.read(name)
                if name == chosen:
                    content = _odd_json(rng, content) if name.endswith(".json") else odd_bytes(rng, content, other)
                if name != chosen or rng.random() > 0.02:
                    new.writestr(name, content)
    except Exception:  # an archive that was damaged before
        return odd_bytes(rng, data, other)
    return changed.getvalue()


def _odd_json(rng: random.Random, content: bytes) -> bytes:
    header = json.loads(content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        path = rng.choice(list(places(header))[1:] or [()])
        if not path:
            break
        if path[-1] == "expr_str":
            at_place(header, path[:-1])["expr_str"] = rng.choice(EXPRESSIONS)
        else:
            odd_header(rng, header, header)
    return json.dumps(header).encode()


def read_exported(data: bytes) -> object:
    """Imports an exported program."""
    path = _path().with_name("m.pt2")
    path.write_bytes(data)
    return type(import_exported(path)).__name__


# ---- files of other libraries: the first byte is the reader


def foreign() -> Iterable[bytes]:
    """A small file for each reader."""
    rng = np.random.default_rng(0)

    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    gguf = b"GGUF" + struct.pack("<IQQ", 3, 3, 2)
    gguf += text(b"general.alignment") + struct.pack("<II", 4, 32)
    gguf += text(b"names") + struct.pack("<IIQ", 9, 8, 2) + text(b"a") + text(b"b")
    for name, kind, shape, offset in ((b"w", 2, (32, 2), 0), (b"q", 8, (32, 1), 64), (b"f", 0, (3,), 128)):
        gguf += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    gguf += bytes(-len(gguf) % 32) + rng.bytes(36).ljust(64, b"\0") + rng.bytes(34).ljust(64, b"\0") + bytes(12)
    yield b"\0" + gguf
    buffer = io.BytesIO()
    np.savez(buffer, **{"d/kernel:0": rng.standard_normal((5, 3)).astype("f4"), "d/bias:0": np.zeros(3, "f4")})
    yield b"\1" + buffer.getvalue()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=np.zeros((24, 4), np.uint8), labels=np.zeros(24, np.int64))
    yield b"\2" + buffer.getvalue()
    table = np.arange(16, dtype="<f4").tobytes() + np.zeros(4, "<f4").tobytes()
    yield b"\3" + struct.pack("<I", 6) + table + bytes([0x21, 0x43, 0x65]) + bytes([0x10, 0x12, 0x01])
    tensors = {"w": torch.zeros(4, 8), "images": torch.zeros(24, 4), "labels": torch.zeros(24, dtype=torch.int64)}
    yield b"\4" + safetensors.torch.save(tensors)
    yield b"\5" + safetensors.torch.save({name: tensors[name] for name in ("images", "labels")})


def odd_foreign(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """A changed file for the same reader."""
    return data[:1] + odd_bytes(rng, data[1:], other[1:])


def read_foreign(data: bytes) -> object:
    """Reads a file as the library that its first byte names."""
    kind, suffix = data[0] % 6, (".gguf", ".npz", ".npz", ".net", ".safetensors", ".safetensors")[data[0] % 6]
    path = _path().with_name(f"foreign{suffix}")
    path.write_bytes(data[1:])
    if kind in (0, 4):
        found: Any = read_quantized(path)
    elif kind == 1:
        found = read_larq(path)
    elif kind == 3:
        found = read_deep_compression(path, {"fc": (4, 11)})
    else:
        found = read_dataset(path).classes
    return kind, type(found).__name__


TARGETS = {
    "files": Target(files, read_file, odd_file, (TerseFileError,), (str(PACKAGE / "storage"),)),
    "coders": Target(coded, read_stream, odd_stream, (TerseFileError,), (str(PACKAGE / "storage"),)),
    "exported": Target(exported, read_exported, odd_exported, (ValueError,), (str(PACKAGE / "storage" / "importers"),)),
    "foreign": Target(
        foreign, read_foreign, odd_foreign, (ValueError,), (str(PACKAGE / "storage"), str(PACKAGE / "zoo" / "own_data"))
    ),
    "recipes": Target(recipes, read_recipe, odd_text, (ValueError,), (str(PACKAGE / "recipes"),)),
}
