import io
import pickle
import zipfile

import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch.storage import import_exported


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=3)
        self.stem = nn.Conv1d(8, 12, 3, stride=2, padding="valid", groups=2)
        self.blocks = nn.Sequential(nn.Conv2d(1, 4, (3, 2), padding=(1, 0), dilation=2, bias=False), nn.BatchNorm2d(4))
        self.head = nn.Linear(4 * 10, 5)
        self.tied = nn.Linear(5, 5, bias=False)

    def forward(self, x):
        hidden = self.stem(self.embed(x).transpose(1, 2)).relu()
        hidden = self.blocks(nn.functional.pad(hidden[:, None], (0, 10))).amax(3).flatten(1)
        hidden = self.head(hidden)
        return self.tied(self.tied(hidden).tanh())


def exported(path):
    torch.manual_seed(0)
    model = Network().eval()
    x = torch.randint(0, 11, (2, 9))
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)), path)
    return model, torch.randint(0, 11, (5, 9))


def test_layers_have_their_names_and_the_outputs_their_bits(tmp_path):
    model, x = exported(tmp_path / "m.pt2")
    found = import_exported(tmp_path / "m.pt2")
    kinds = {name: type(module) for name, module in found.named_modules() if name in dict(model.named_modules())}
    assert kinds["embed"] is nn.Embedding and kinds["stem"] is nn.Conv1d and kinds["blocks.0"] is nn.Conv2d
    assert kinds["head"] is nn.Linear and kinds["tied"] is nn.Linear  # which is called twice
    assert found.embed.padding_idx == 3 and not found.training
    assert found(x).equal(model(x))
    assert set(found.state_dict()) == set(model.state_dict())


class Tied(nn.Module):
    """Layers that share weights: two Linears, an Embedding and its Linear, one under three names, one in a product."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.a, self.b, self.other = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head.weight, self.b.weight = self.words.weight, self.a.weight
        self.again = nn.Linear(6, 6)
        self.thrice = nn.Sequential(self.again, nn.Tanh(), self.again)
        rows = torch.randn(9, 6)
        self.upper, self.lower = nn.Linear(6, 8, bias=False), nn.Linear(6, 8, bias=False)
        self.upper.weight, self.lower.weight = nn.Parameter(rows[:8]), nn.Parameter(rows[1:])

    def forward(self, x):
        x = self.b(self.a(self.words(x)).relu()).relu()
        x = self.other(x) @ self.other.weight
        x = self.thrice(x)
        return self.head(x), self.upper(x), self.lower(x)


def test_what_was_tied_is_tied(tmp_path):
    torch.manual_seed(0)
    model, x = Tied().eval(), torch.randint(0, 11, (2, 5))
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "m.pt2")
    found = import_exported(tmp_path / "m.pt2")
    assert all(y.equal(z) for y, z in zip(found(x), model(x), strict=True))
    assert set(found.state_dict()) == set(model.state_dict())
    assert type(found.words) is nn.Embedding and found.head.weight is found.words.weight
    assert type(found.a) is type(found.b) is nn.Linear and found.a.weight is found.b.weight
    assert found.a.bias is not found.b.bias
    assert found.again is found.thrice.get_submodule("0") is found.thrice.get_submodule("2")
    assert type(found.other) is not nn.Linear  # something else uses its weight
    assert found.upper.weight is not found.lower.weight  # a part of each other
    tt.prune.magnitude(found, 0.5, targets=["a", "again", "head"])
    assert torch.equal(found.a.weight, found.b.weight) and found.b.weight.count_nonzero() == 18
    tt.save(tt.finalize(found), tmp_path / "m.terse")
    names = [tensor.name for tensor in tt.inspect(tmp_path / "m.terse").tensors]
    assert {"a.weight", "b.weight"} - set(names) == {"b.weight"} and sum("again.weight" in name for name in names) == 1
    again = tt.load(tmp_path / "m.terse", model=import_exported(tmp_path / "m.pt2"))
    assert all(y.equal(z) for y, z in zip(again.eval()(x), found.eval()(x), strict=True))


class Dilated(nn.Module):
    """Convolutions that share weight and bias, or the weight alone, and differ in how they stride over it."""

    def __init__(self):
        super().__init__()
        self.near, self.far = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=2, dilation=2)
        self.plain = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.far.weight, self.far.bias, self.plain.weight = self.near.weight, self.near.bias, self.near.weight
        self.alias = self.plain

    def forward(self, x):
        return self.far(self.alias(self.near(x)))


def test_layers_that_share_all_but_their_stride_are_layers(tmp_path):
    torch.manual_seed(0)
    model, x = Dilated().eval(), torch.randn(2, 4, 8, 8)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "m.pt2")
    found = import_exported(tmp_path / "m.pt2")
    assert found(x).equal(model(x)) and set(found.state_dict()) == set(model.state_dict())
    assert {type(layer) for layer in (found.near, found.far, found.plain, found.alias)} == {nn.Conv2d}
    assert found.far.dilation == (2, 2) and found.near.bias is found.far.bias
    assert found.alias is found.plain and found.near.weight is found.plain.weight is found.far.weight


def test_methods_convert_and_files_take_it(tmp_path):
    _, x = exported(tmp_path / "m.pt2")
    found = import_exported(tmp_path / "m.pt2")
    tt.prune.magnitude(found, 0.5, targets=["stem", "blocks.0", "head"])
    found.train()
    found(x).sum().backward()
    assert found.head.parametrizations.weight.original.grad.count_nonzero() > 0
    tt.finalize(found)
    tt.save(found, tmp_path / "m.terse")
    again = tt.load(tmp_path / "m.terse", model=import_exported(tmp_path / "m.pt2"))
    assert again.eval()(x).equal(found.eval()(x)) and again.head.weight.count_nonzero() == again.head.weight.numel() / 2
    fast = tt.convert(again, plan={"head": "csr"})
    torch.testing.assert_close(fast(x), again(x))


def repacked(source, target, change):
    """The archive with each file changed: change(name, bytes) gives bytes, or None for none."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)


def test_what_a_file_of_a_program_goes_into_is_named(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    torch.export.save(torch.export.export(model, (torch.randn(3, 6),)), tmp_path / "m.pt2")
    tt.save(import_exported(tmp_path / "m.pt2"), tmp_path / "m.terse")
    with pytest.raises(tt.TerseFileError, match=r"model=tersetorch\.storage\.import_exported of the \.pt2 file"):
        tt.load(tmp_path / "m.terse")
    with pytest.raises(ValueError, match=r"here tersetorch\.storage\.import_exported of the \.pt2 file"):
        tt.load(tmp_path / "m.terse", model=model)
    again = tt.load(tmp_path / "m.terse", model=import_exported(tmp_path / "m.pt2"))
    assert torch.equal(again(torch.ones(3, 6)), model(torch.ones(3, 6)))


class Harm:
    def __reduce__(self):
        return (print, ("this ran",))


def test_nothing_in_a_file_is_run(tmp_path, capsys):
    exported(tmp_path / "m.pt2")
    buffer = io.BytesIO()
    torch.save(Harm(), buffer)

    def inputs(name, data):
        return buffer.getvalue() if "sample_inputs" in name else data

    def weights(name, data):
        if name.endswith("weights/weight_0"):
            return buffer.getvalue()
        return data.replace(b'"use_pickle": false', b'"use_pickle": true') if name.endswith("_config.json") else data

    def compiled(name, data):
        return pickle.dumps(Harm()) if name.endswith("serialization_id") else data

    repacked(tmp_path / "m.pt2", tmp_path / "bad.pt2", weights)
    with pytest.raises(ValueError, match=r"without pickled objects, got .* with pickled tensors"):
        import_exported(tmp_path / "bad.pt2")
    for change in (inputs, compiled):
        repacked(tmp_path / "m.pt2", tmp_path / "odd.pt2", change)
        import_exported(tmp_path / "odd.pt2")  # nobody reads that one
    assert "this ran" not in capsys.readouterr().out


def test_what_is_no_program_is_refused(tmp_path):
    exported(tmp_path / "m.pt2")
    whole = (tmp_path / "m.pt2").read_bytes()
    for name, data in (("empty", b""), ("text", b"nothing"), ("half", whole[: len(whole) // 2])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match="import_exported: path must hold"):
            import_exported(tmp_path / name)
    repacked(tmp_path / "m.pt2", tmp_path / "none.pt2", lambda name, data: None if "models/" in name else data)
    with pytest.raises(ValueError, match="with 0 programs"):
        import_exported(tmp_path / "none.pt2")
    repacked(tmp_path / "m.pt2", tmp_path / "bad.pt2", lambda name, data: b"{}" if name.endswith(".json") else data)
    with pytest.raises(ValueError, match="a program or a table of weights that cannot be read"):
        import_exported(tmp_path / "bad.pt2")
    with pytest.raises(FileNotFoundError, match="path must exist"):
        import_exported(tmp_path / "missing.pt2")
