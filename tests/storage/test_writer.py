import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from torch import nn
from torch.nn.utils import parametrizations

from tersetorch import methods
from tersetorch.nn import CodebookLinear, SparseCodebookLinear, SparseLinear
from tersetorch.nn.layout import LAYOUTS
from tersetorch.storage import TerseFileError, inspect, integers, load, save, streams, vectors


class Stateful(nn.Module):
    def get_extra_state(self):
        return 3

    def set_extra_state(self, state):
        pass


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(x)


def test_the_same_model_gives_the_same_bytes(tmp_path, small_model):
    save(small_model, tmp_path / "a.terse", provenance={"error": 0.016})
    save(load(tmp_path / "a.terse"), tmp_path / "b.terse", provenance={"error": 0.016})
    assert (tmp_path / "a.terse").read_bytes() == (tmp_path / "b.terse").read_bytes()


def test_another_process_writes_the_same_bytes(tmp_path):
    program = (
        "import torch; from torch import nn; from tersetorch.storage import save; torch.manual_seed(0);"
        f"save(nn.TransformerEncoderLayer(8, 2, 16), {str(tmp_path / 'a.terse')!r})"
    )
    subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONHASHSEED": "7"}, check=True)
    torch.manual_seed(0)
    save(nn.TransformerEncoderLayer(8, 2, 16), tmp_path / "b.terse")
    assert (tmp_path / "a.terse").read_bytes() == (tmp_path / "b.terse").read_bytes()


def test_the_header_of_a_small_network_is_small(tmp_path):
    model = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    save(model, tmp_path / "m.terse")
    found = inspect(tmp_path / "m.terse")
    assert found.header_bytes + found.container_bytes < 450


def test_a_model_in_training_is_stored_as_finalize_leaves_it(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 5))
    methods.prune.magnitude(model, sparsity=0.9)
    x = torch.randn(2, 30)
    expected = model(x)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save(model, tmp_path / "m.terse")
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    loaded = load(tmp_path / "m.terse")
    assert type(loaded[0]) is nn.Linear
    assert torch.equal(loaded(x), expected)
    assert inspect(tmp_path / "m.terse").tensors[0].form == "sparse"
    # The instance may be one in training as well.
    assert torch.equal(load(tmp_path / "m.terse", model=model)(x), expected)
    assert list(model.state_dict()) == list(before)


@pytest.mark.parametrize("content", [None, b"what was there"])
def test_a_failed_write_leaves_what_was_there(tmp_path, small_model, monkeypatch, content):
    path = tmp_path / "m.terse"
    if content:
        path.write_bytes(content)

    def fail(*arguments):
        raise OSError("disk full")

    for step in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, fail)
            with pytest.raises(OSError, match="disk full"):
                save(small_model, path)
        assert [file.name for file in tmp_path.iterdir()] == (["m.terse"] if content else [])
        assert not content or path.read_bytes() == content


def test_a_file_is_replaced_and_nothing_else_left(tmp_path, small_model):
    path = tmp_path / "m.terse"
    path.write_bytes(b"old")
    save(small_model, str(path))
    load(str(path))
    assert [file.name for file in tmp_path.iterdir()] == ["m.terse"]


def test_a_file_has_the_usual_permissions(tmp_path, small_model):
    (tmp_path / "other").write_bytes(b"")
    save(small_model, tmp_path / "m.terse")
    assert (tmp_path / "m.terse").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_provenance_comes_back(tmp_path):
    provenance = {"error": {"dense": 0.0164, "compressed": 0.0158}, "layers": ["fc1", None, True], "text": "ä"}
    save(nn.Linear(2, 2), tmp_path / "m.terse", provenance=provenance)
    assert inspect(tmp_path / "m.terse").provenance == provenance
    save(nn.Linear(2, 2), tmp_path / "m.terse")
    assert inspect(tmp_path / "m.terse").provenance is None


@pytest.mark.parametrize(
    "provenance,error,match",
    [
        ([1], TypeError, "provenance must be a dict, got list"),
        ({"a": torch.zeros(1)}, ValueError, "provenance must be JSON, got Object of type Tensor"),
        ({"a": float("nan")}, ValueError, "provenance must be JSON, got Out of range float"),
        ({1: 2}, ValueError, "must come back from JSON as it is"),
        ({"a": (1, 2)}, ValueError, "must come back from JSON as it is"),
        ({"a": "x" * 70_000}, ValueError, "provenance must fit 65536 bytes as JSON, got 70009"),
    ],
)
def test_bad_provenance_is_refused(tmp_path, provenance, error, match):
    with pytest.raises(error, match=match):
        save(nn.Linear(2, 2), tmp_path / "m.terse", provenance=provenance)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "model,match",
    [
        (nn.Linear, "model must be an eager nn.Module, got type"),
        ({"weight": 1}, "model must be an eager nn.Module, got dict"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path, model, match):
    with pytest.raises(TypeError, match=match):
        save(model, tmp_path / "m.terse")
    assert not list(tmp_path.iterdir())


def test_bad_paths_are_refused(tmp_path):
    with pytest.raises(TypeError, match="save: path must be a string or a path, got int"):
        save(nn.ReLU(), 3)
    with pytest.raises(ValueError, match="save: path must name a file, got the folder"):
        save(nn.ReLU(), tmp_path)
    with pytest.raises(FileNotFoundError, match="save: path must lie in a folder that exists"):
        save(nn.ReLU(), tmp_path / "none" / "m.terse")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="save: path must lie in a folder that exists"):
        save(nn.ReLU(), tmp_path / "file" / "m.terse")
    with pytest.raises(ValueError, match="save: path must name a file, got ''"):
        save(nn.ReLU(), "")
    for name in ("a\0b", "a\ud800b"):
        with pytest.raises(ValueError, match="save: path must be a name that a file can have"):
            save(nn.ReLU(), tmp_path / name)
    with pytest.raises(OSError, match=r"save: path must name a file that can be written, got .*; choose another"):
        save(nn.ReLU(), tmp_path / ("x" * 300))
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="save: path must name a file that can be written"):
        save(nn.ReLU(), tmp_path / "loop")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "loop"]


def test_what_is_no_regular_file_is_left_alone(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    for path in (pipe, tmp_path / "link"):
        with pytest.raises(ValueError, match=r"save: path must name a regular file, got the device or pipe .*pipe;"):
            save(nn.ReLU(), path)
    assert pipe.is_fifo()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("content", [None, b"old"])
def test_a_link_stays_and_its_target_is_replaced(tmp_path, content):
    folder = tmp_path / "folder"
    folder.mkdir()
    if content:
        (folder / "real.terse").write_bytes(content)
    link = tmp_path / "link.terse"
    link.symlink_to("folder/real.terse")
    save(nn.ReLU(), link)
    assert link.is_symlink()
    assert isinstance(load(folder / "real.terse"), nn.ReLU)
    assert [file.name for file in folder.iterdir()] == ["real.terse"]


class Packed(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "packed"] = self.value


def renamed(module, state, prefix, metadata):
    state["other"] = state.pop("weight")


def test_state_that_a_hook_renames_is_stored(tmp_path):
    layer = nn.Linear(2, 2)
    layer.register_state_dict_post_hook(renamed)
    save(layer, tmp_path / "m.terse")
    assert torch.equal(load(tmp_path / "m.terse", model=nn.Linear(2, 2)).weight, layer.weight)


def within_itself(model):
    model.add_module("again", nn.Sequential(model))


def tied_to_values(model):
    model[1].bias = nn.Parameter(torch.zeros(2))
    model[1].bias = model[0].values


def tied_layers(model):
    model[1] = SparseLinear.from_dense(nn.Linear(3, 2))
    model[1].values = model[0].values
    model[1].col_indices = model[1].col_indices.flip(0)


@pytest.mark.parametrize(
    "model,change,match",
    [
        (nn.Sequential(Stateful()), None, r"must keep its state in tensors, got extra state in 0 \(Stateful\)"),
        (nn.Sequential(Packed(3)), None, r"keep its state in tensors, got int as 0\.packed in its state dict"),
        (Packed(torch.zeros(2)), None, "in parameters and buffers, got 0 and a state dict of 1"),
        (nn.Sequential(nn.ReLU()), within_itself, r"must be a tree, got again\.0, which contains itself"),
        (nn.Linear(2, 2, device="meta"), None, "save: weight must hold values, got a tensor on device meta"),
        (nn.Sequential(nn.LazyLinear(2)), None, "save: 0.weight must"),
        (nn.Sequential(SparseLinear.from_dense(nn.Linear(3, 2)), nn.Linear(2, 2)), tied_to_values, "share its values"),
        (
            nn.Sequential(SparseLinear.from_dense(nn.Linear(3, 2)), None),
            tied_layers,
            "hold a valid|share its values",
        ),
    ],
)
def test_what_a_file_cannot_keep_is_refused(tmp_path, model, change, match):
    if change:
        change(model)
    with pytest.raises(ValueError, match=match):
        save(model, tmp_path / "m.terse")
    assert not list(tmp_path.iterdir())


def with_hook(model):
    model[0].register_forward_hook(lambda module, args, output: output * 2)


def with_other_forward(model):
    model[0].forward = torch.relu


def with_weight_norm(model):
    parametrizations.weight_norm(model[0])


def with_attribute(model):
    model[0].in_features = 4


def with_more_parameters(model):
    model[0].register_parameter("more", nn.Parameter(torch.zeros(1)))


def with_function(model):
    model[1] = nn.TransformerEncoderLayer(4, 2, 8, activation=torch.sin)


def with_custom(model):
    model.add_module("net", Net())


def with_sparse_hook(model):
    model[0] = SparseLinear.from_dense(model[0])
    with_hook(model)


@pytest.mark.parametrize(
    "change,match",
    [
        (with_hook, r"torch\.nn\.modules\.linear\.Linear at 0 \(it has hooks\)"),
        (with_other_forward, r"Linear at 0 \(its attribute 'forward' differs"),
        (with_weight_norm, r"ParametrizedLinear at 0 \(its class is not registered\)"),
        (with_attribute, r"Linear at 0 \(its parameters or buffers differ"),
        (with_more_parameters, r"Linear at 0 \(its parameters or buffers differ"),
        (with_function, r"TransformerEncoderLayer at 1 \(its constructor's arguments cannot be read back from it\)"),
        (with_custom, r"Net at net \(its class is not registered\)"),
        (with_sparse_hook, r"SparseLinear at 0 \(it has hooks\)"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_what_load_cannot_build_is_stored_and_said(tmp_path, change, match):
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    change(model)
    path = tmp_path / "m.terse"
    save(model, path)
    assert sum(inspect(path).parts.values()) == path.stat().st_size
    with pytest.raises(TerseFileError, match=match):
        load(path)


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_models_with_foreign_parametrizations_load_into_an_instance(tmp_path):
    model = parametrizations.weight_norm(nn.Linear(3, 2))
    save(model, tmp_path / "m.terse")
    loaded = load(tmp_path / "m.terse", model=parametrizations.weight_norm(nn.Linear(3, 2)))
    x = torch.ones(1, 3)
    assert torch.equal(loaded(x), model(x))


def test_notes_of_our_own_do_not_matter(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2))
    vars(model)["_tersetorch_note"] = {"anything": object()}
    save(model, tmp_path / "m.terse")
    assert isinstance(load(tmp_path / "m.terse"), nn.Sequential)


def test_the_golden_file_of_version_1(same_state):
    path = Path(__file__).parent / "golden" / "version1.terse"
    namespace = runpy.run_path(path.parent / "make_golden.py", run_name="golden")
    model = namespace["model"]()
    loaded = load(path)
    same_state(model, loaded)
    found = inspect(path)
    assert found.version == 1
    assert found.provenance == namespace["PROVENANCE"]
    assert {tensor.form for tensor in found.tensors} == {"raw", "codebook", "sparse", "sparse-codebook"}
    coders = {coder for tensor in found.tensors for coder in tensor.coders}
    assert coders == {"raw", "packed", "huffman", "constant", "gaps", "gaps-huffman", "bitmap", "all"}


def test_the_golden_file_of_version_2(same_state, tmp_path, monkeypatch):
    path = Path(__file__).parent / "golden" / "version2.terse"
    namespace = runpy.run_path(path.parent / "make_golden.py", run_name="golden")
    model = namespace["coders"]()
    same_state(model, load(path))
    found = inspect(path)
    assert found.version == 2
    coders = {coder for tensor in found.tensors for coder in tensor.coders}
    assert coders >= {"numbers", "planes", "rans", "contexts", "gaps-rans"}
    monkeypatch.setattr(vectors, "TRIED", 0)  # came later, and one of the weights has shared sub-vectors
    for name, value in namespace["SMALL"].items():
        monkeypatch.setattr(streams, name, value)
    monkeypatch.setattr(integers, "find", lambda *args: None)  # a form that came later, and is smaller
    save(model, tmp_path / "m.terse")
    assert (tmp_path / "m.terse").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("name", "made_by"),
    [("packed_codes", "products"), ("plain_codes", "coded"), ("signs", "signs"), ("fixed", "fixed")],
)
def test_the_golden_files_of_packed_layers(same_state, tmp_path, monkeypatch, name, made_by):
    path = Path(__file__).parent / "golden" / f"version2_{name}.terse"
    namespace = runpy.run_path(path.parent / "make_golden.py", run_name="golden")
    model = namespace[made_by]()
    loaded = load(path)
    same_state(model, loaded)
    assert [layer.extra_repr() for layer in loaded] == [layer.extra_repr() for layer in model]
    if name != "packed_codes":
        for limit, value in namespace["SMALL"].items():
            monkeypatch.setattr(streams, limit, value)
        save(model, tmp_path / "again.terse")
        assert (tmp_path / "again.terse").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("name", "made_by", "forms"),
    [("codebooks", "tables", {"codebooks"}), ("integers", "quantized", {"integers", "affine", "scaled"})],
)
def test_the_golden_files_of_dense_weights_with_few_values(same_state, tmp_path, monkeypatch, name, made_by, forms):
    path = Path(__file__).parent / "golden" / f"version2_{name}.terse"
    namespace = runpy.run_path(path.parent / "make_golden.py", run_name="golden")
    model = namespace[made_by]()
    same_state(model, load(path))
    found = inspect(path)
    assert {tensor.form for tensor in found.tensors if len(tensor.shape) > 1} == forms
    for limit, value in namespace["SMALL"].items():
        monkeypatch.setattr(streams, limit, value)
    save(model, tmp_path / "again.terse")
    assert (tmp_path / "again.terse").read_bytes() == path.read_bytes()


def test_the_golden_file_of_layouts_and_convolutions(same_state):
    path = Path(__file__).parent / "golden" / "version1_layouts.terse"
    model = runpy.run_path(path.parent / "make_golden.py", run_name="golden")["layouts"]()
    loaded = load(path)
    same_state(model, loaded)
    with torch.no_grad():
        for ours, theirs in zip(model, loaded, strict=True):
            assert repr(ours) == repr(theirs)
            linear = isinstance(ours, SparseLinear | SparseCodebookLinear)
            given = torch.ones(5, 70) if linear else torch.ones(2, ours.in_channels, *(11, 9)[-ours.dims :])
            assert torch.equal(theirs(given), ours(given))
    assert {layer.layout for layer in loaded[:14]} == set(LAYOUTS)


def test_fast_coders_leave_out_contexts_and_nothing_else(tmp_path, same_state):
    torch.manual_seed(0)
    grid = torch.arange(64 * 27)
    conv = nn.Conv2d(3, 64, 3)
    rows, codes, signs, layer, dense = (nn.Linear(96, 64) for _ in range(5))
    with torch.no_grad():
        conv.weight.copy_(torch.where(grid // 27 % 4 == 0, grid % 5, 0).reshape(64, 3, 3, 3))
        rows.weight.copy_(torch.randint(0, 7, (64, 96)) * torch.rand(64, 1))
        codes.weight.copy_(torch.arange(64)[:, None] // 8 + torch.randint(0, 2, (64, 96)))
        signs.weight.copy_(torch.where(torch.arange(96) < 48, 1.0, -1.0) * torch.rand(64, 1))
        layer.weight.mul_(torch.arange(96) % 3 == 0)
        dense.weight.copy_(layer.weight.roll(1, 1))
    shared = CodebookLinear.from_dense(codes)
    model = nn.Sequential(conv, rows, codes, signs, SparseLinear.from_dense(layer), dense, shared)
    coders = {}
    for name in streams.CODERS:
        save(model, tmp_path / name, coders=name)
        coders[name] = {coder for tensor in inspect(tmp_path / name).tensors for coder in tensor.coders}
        same_state(model, load(tmp_path / name))
    save(model, tmp_path / "usual")
    assert (tmp_path / "usual").read_bytes() == (tmp_path / "smallest").read_bytes()
    assert "contexts" in coders["smallest"] and "contexts" not in coders["fast"]
    assert (tmp_path / "smallest").stat().st_size < (tmp_path / "fast").stat().st_size


@pytest.mark.parametrize("coders", ["slow", "", None, 3, ["fast"]])
def test_other_coders_are_refused_before_anything_is_written(tmp_path, coders):
    with pytest.raises(ValueError, match=r"save: coders must be one of smallest, fast, got .*; pass one of these"):
        save(nn.Linear(2, 2), tmp_path / "m.terse", coders=coders)
    assert not list(tmp_path.iterdir())


def test_bars_end_with_every_byte(tmp_path):
    model = nn.Sequential(nn.Linear(30, 20), SparseCodebookLinear.from_dense(nn.Linear(6, 6)))
    with Progress(disable=True) as progress:
        save(model, tmp_path / "m.terse", progress=progress)
        load(tmp_path / "m.terse", progress=progress)
    assert [(task.description, task.percentage) for task in progress.tasks] == [("saving", 100), ("loading", 100)]


def test_a_live_recurrent_module_saves_after_a_forward_pass(tmp_path):
    torch.manual_seed(0)
    model = nn.LSTM(5, 7)
    methods.prune.magnitude(model, 0.5, targets="weight_*")
    x = torch.randn(3, 1, 5)
    expected = model(x)[0]
    save(model, tmp_path / "m.terse")
    assert torch.equal(load(tmp_path / "m.terse")(x)[0], expected)
