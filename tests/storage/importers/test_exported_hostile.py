"""Exported programs made to run code, to take memory, or to reach files: nothing of it happens."""

import io
import json
import pickle
import sys
import zipfile

import pytest
import torch
from torch import nn

from tersetorch.storage import import_exported


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """The bytes of an exported program with a batch of any size."""
    path = tmp_path_factory.mktemp("honest") / "m.pt2"
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    torch.export.save(torch.export.export(model, (torch.zeros(3, 6),), dynamic_shapes=({0: batch},)), path)
    return path.read_bytes()


def forged(honest, path, change=lambda name, data: data, more=(), method=zipfile.ZIP_STORED):
    """Writes the archive with change(name, data) in the place of each file's bytes, and more files."""
    with zipfile.ZipFile(io.BytesIO(honest)) as old, zipfile.ZipFile(path, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, change(name.partition("/")[2], old.read(name)))
        for name, data in more:  # torch refuses another prefix
            new.writestr(f"{old.namelist()[0].partition('/')[0]}/{name}", data)
    return path


def with_json(kind, change):
    """A change of the program (models/) or of a table of weights: change(parsed) changes it in place."""

    def changed(name, data):
        if name != kind:
            return data
        parsed = json.loads(data)
        change(parsed)
        return json.dumps(parsed).encode()

    return changed


PROGRAM, WEIGHTS = "models/model.json", "data/weights/model_weights_config.json"


def input_name(text):
    def change(program):
        program["graph_module"]["module_call_graph"][0]["signature"]["forward_arg_names"] = [text]

    return with_json(PROGRAM, change)


def parameter_name(text):
    return lambda name, data: data.replace(b'"0.weight"', json.dumps(text).encode())


def size_expression(text):
    def change(program):
        sizes = program["graph_module"]["graph"]["tensor_values"]["input"]["sizes"]
        sizes[0]["as_expr"]["expr_str"] = text

    return with_json(PROGRAM, change)


def operator(target, inputs):
    def change(program):
        node = program["graph_module"]["graph"]["nodes"][1]  # relu
        node["target"], node["inputs"] = target, inputs(node["inputs"])

    return with_json(PROGRAM, change)


def input_spec(change):
    def changed(program):
        signature = program["graph_module"]["module_call_graph"][0]["signature"]
        version, spec = json.loads(signature["in_spec"])
        change(spec)
        signature["in_spec"] = json.dumps([version, spec])

    return with_json(PROGRAM, changed)


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def pickled(trace):
    buffer = io.BytesIO()
    torch.save({"weight": Harm(trace)}, buffer)
    return buffer.getvalue()


def opening(trace):
    return f"open({str(trace)!r}, 'w')"


def text_argument(text):
    return lambda inputs: [{"name": "filename", "arg": {"as_string": text}, "kind": 1}]


# What runs code, or reaches a file, in torch.export.load or in the module that it gives.
ATTACKS = {
    "weights of the older form": lambda trace: {"more": [("data/weights/model.pt", pickled(trace))]},
    "constants of the older form": lambda trace: {"more": [("data/constants/model.pt", pickled(trace))]},
    "example inputs": lambda trace: {"change": lambda n, d: pickled(trace) if "sample_inputs" in n else d},
    "an expression": lambda trace: {"change": size_expression(opening(trace))},
    "an expression's symbol": lambda trace: {"change": size_expression(f"Symbol('s0' if {opening(trace)} else 's1')")},
    "a power": lambda trace: {"change": size_expression("Integer(9)**Integer(9)**Integer(9)**Integer(9)")},
    "a shift": lambda trace: {"change": size_expression(f"LShift(Integer(1), Integer({1 << 40}))")},
    "an input's name": lambda trace: {"change": input_name(f"input={opening(trace)}")},
    "a parameter's name": lambda trace: {"change": parameter_name(f'0.weight") or {opening(trace)} or ("')},
    "an operator of JIT's": lambda trace: {
        "change": operator("torch.ops.aten.save.default", text_argument(str(trace)))
    },
    "an operator on files": lambda trace: {
        "change": operator(
            "torch.ops.aten.from_file.default",
            lambda inputs: [
                {"name": "filename", "arg": {"as_string": str(trace)}, "kind": 1},
                {"name": "shared", "arg": {"as_bool": True}, "kind": 1},
                {"name": "size", "arg": {"as_int": 64}, "kind": 1},
            ],
        )
    },
    "a function of Python's": lambda trace: {"change": operator("torch.os.mkdir", text_argument(str(trace)))},
    "an argument that names a function": lambda trace: {
        "change": operator(
            "torch.ops.aten.relu.default",
            lambda i: [*i, {"name": "x", "arg": {"as_operator": "torch.os.abort"}, "kind": 1}],
        )
    },
    "a guard": lambda trace: {"change": with_json(PROGRAM, lambda p: p.update(guards_code=[opening(trace)]))},
}
UNREAD = ("example inputs", "a guard")  # what nobody reads does no harm


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_code_of_a_file_runs(honest, tmp_path, attack):
    trace = tmp_path / "trace"
    path = forged(honest, tmp_path / "m.pt2", **ATTACKS[attack](trace))
    if attack in UNREAD:
        assert import_exported(path)(torch.ones(3, 6)).shape == (3, 2)
    else:
        with pytest.raises(ValueError, match=r"import_exported: path must hold .*, got .*m\.pt2 with .*write it"):
            import_exported(path)
    assert not trace.exists()


def test_no_module_is_imported_by_a_name_in_the_file(honest, tmp_path, monkeypatch):
    (tmp_path / "named_in_a_file.py").write_text("import enum\nclass Kind(enum.Enum):\n    A = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    by_default = {"default_factory_module": "named_in_a_file", "default_factory_name": "Kind", "dict_context": []}
    by_enum = [{"__enum__": True, "fqn": "named_in_a_file:Kind", "name": "A"}]
    for kind, context in (("collections.defaultdict", by_default), ("builtins.dict", by_enum)):

        def change(spec, kind=kind, context=context):
            spec["children_spec"][1] |= {"type": kind, "context": json.dumps(context)}

        with pytest.raises(ValueError, match="import_exported: path must hold"):
            import_exported(forged(honest, tmp_path / "m.pt2", input_spec(change)))
    assert "named_in_a_file" not in sys.modules


def test_what_archives_can_hide(honest, tmp_path):
    zeros = bytes(64 << 20)
    bomb = forged(honest, tmp_path / "bomb.pt2", more=[("data/weights/weight_9", zeros)], method=zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 1 << 20
    with pytest.raises(ValueError, match="with deflated files"):
        import_exported(bomb)
    config = with_json(WEIGHTS, lambda c: [part.update(use_pickle=True) for part in c["config"].values()])
    hidden = []
    forged(honest, tmp_path / "odd.pt2", lambda name, data: hidden.append(config(name, data)) or data)
    other = next(data for data in hidden if b'"use_pickle": true' in data)
    twice = forged(honest, tmp_path / "twice.pt2", more=[("Data/Weights/Model_weights_config.json", other)])
    with pytest.raises(ValueError, match="with a name that comes twice"):
        import_exported(twice)
    # Entries that are the same part of the file: many times its size in all.
    more = [(f"data/weights/more_{number}", bytes(100_000 if number == 0 else 1)) for number in range(20)]
    path = forged(honest, tmp_path / "m.pt2", more=more)
    raw, entries = bytearray(path.read_bytes()), []
    while (at := raw.find(b"PK\1\2", entries[-1] + 4 if entries else 0)) != -1:
        entries.append(at)
    large = entries[-20]
    for at in entries[-19:]:
        raw[at + 16 : at + 28], raw[at + 42 : at + 46] = raw[large + 16 : large + 28], raw[large + 42 : large + 46]
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="with files that share their bytes"):
        import_exported(path)


@pytest.mark.parametrize(
    "sizes,strides", [([1 << 40], [1]), ([1 << 20, 1 << 20], [0, 0]), ([-1, 4], [4, 1]), ([4, 6], [-6, 1])]
)
def test_a_table_asks_for_more_than_the_file_has(honest, tmp_path, sizes, strides):
    def change(table):
        meta = table["config"]["0.weight"]["tensor_meta"]
        meta |= {"sizes": [{"as_int": n} for n in sizes], "strides": [{"as_int": n} for n in strides]}

    for empty in (False, True):
        changed = with_json(WEIGHTS, change)
        path = forged(
            honest,
            tmp_path / "m.pt2",
            lambda name, data, empty=empty, changed=changed: (
                b"" if empty and name == "data/weights/weight_0" else changed(name, data)
            ),
        )
        with pytest.raises(ValueError, match="import_exported: path must hold"):
            import_exported(path)


def test_pickles_are_refused_wherever_they_stand(honest, tmp_path):
    for kind in ("0.weight", "0.bias"):
        table = with_json(WEIGHTS, lambda c, kind=kind: c["config"][kind].update(use_pickle=True))
        with pytest.raises(ValueError, match="with pickled tensors or objects"):
            import_exported(forged(honest, tmp_path / "m.pt2", table))
    custom = {
        "config": {"c": {"path_name": "custom_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}}
    }
    path = forged(
        honest,
        tmp_path / "m.pt2",
        lambda name, data: json.dumps(custom).encode() if name.endswith("constants_config.json") else data,
        more=[("data/constants/custom_obj_0", pickle.dumps(1))],
    )
    with pytest.raises(ValueError, match="with pickled tensors or objects"):
        import_exported(path)


def test_expressions_of_dynamic_sizes_are_read(tmp_path):
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, stride=2)

        def forward(self, x):
            x = nn.functional.max_pool2d(self.conv(x), 2)
            return x.flatten(1), nn.functional.interpolate(x, scale_factor=2.0)

    model = Halves().eval()
    height, width = torch.export.Dim("height", min=16, max=99), torch.export.Dim("width", min=16, max=99)
    program = torch.export.export(model, (torch.randn(2, 3, 32, 40),), dynamic_shapes=({2: height, 3: width},))
    torch.export.save(program, tmp_path / "m.pt2")
    x = torch.randn(2, 3, 21, 33)
    for found, want in zip(import_exported(tmp_path / "m.pt2")(x), model(x), strict=True):
        assert found.equal(want)


def test_a_part_before_the_file_is_refused(honest, tmp_path):
    path = forged(honest, tmp_path / "m.pt2")
    raw = bytearray(path.read_bytes())
    at = raw.rfind(b"PK\5\6") + 16
    raw[at : at + 4] = (int.from_bytes(raw[at : at + 4], "little") + 2).to_bytes(4, "little")
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="with a part that lies outside the file"):
        import_exported(path)
