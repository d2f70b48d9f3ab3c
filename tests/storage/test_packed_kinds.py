"""Layers of shared sub-vectors in files: written, read back to the bit, and refused where damaged."""

import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch.formats import CodebookWeight
from tersetorch.nn import CodebookLinear, ProductLinear, ResidualLinear
from tersetorch.storage import TerseFileError


def layers():
    torch.manual_seed(0)
    product = ProductLinear.from_codes(
        torch.randint(20, (30, 7)).to(torch.uint8), torch.randn(1, 7, 3, 20), torch.randn(30), in_features=20
    )
    residual = ResidualLinear.from_codes(
        torch.randint(5, (4, 3)).to(torch.uint8), torch.randn(3, 1, 30, 5), in_features=30
    )
    product.mode, product.relu = "int8", True
    residual.codebooks.requires_grad_(False)
    return nn.Sequential(product, residual).eval()


def test_come_back_to_the_bit(tmp_path):
    model = layers()
    tt.save(model, tmp_path / "m.terse")
    found = tt.load(tmp_path / "m.terse")
    assert [type(layer) for layer in found] == [ProductLinear, ResidualLinear]
    assert found[0].mode == "int8" and found[0].relu and not found[1].codebooks.requires_grad
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)
    with torch.no_grad():
        x = torch.randn(3, 20)
        assert torch.equal(found(x), model(x))
    tt.save(found, tmp_path / "again.terse")
    assert (tmp_path / "again.terse").read_bytes() == (tmp_path / "m.terse").read_bytes()


class Net(nn.Module):
    def __init__(self, hidden=30):
        super().__init__()
        self.first, self.second = nn.Linear(20, hidden), nn.Linear(hidden, 4, bias=False)

    def forward(self, x):
        return self.second(self.first(x))


def test_go_into_an_instance(tmp_path):
    model = Net()
    model.first, model.second = layers()
    tt.save(model, tmp_path / "m.terse")
    dense = Net()
    found = tt.load(tmp_path / "m.terse", model=dense)
    assert type(found.first) is ProductLinear and type(dense.first) is nn.Linear
    x = torch.randn(3, 20)
    assert torch.equal(found(x), model(x))
    with pytest.raises(ValueError, match="ProductLinear"):
        tt.load(tmp_path / "m.terse", model=Net(31))


def test_a_relu_in_a_layer_of_codes_goes_into_an_instance(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))

    fast = tt.convert(tt.finalize(tt.quantize.kmeans(build(), 2)), plan="codebook")
    assert type(fast[0]) is CodebookLinear and fast[0].relu and type(fast[1]) is nn.Identity
    tt.save(fast, tmp_path / "m.terse")
    x = torch.randn(3, 64)
    assert torch.equal(tt.load(tmp_path / "m.terse", model=build())(x), fast(x))


def test_codes_past_the_entries_are_refused(tmp_path):
    model = layers()
    model[0].codes[0, 0] = 20
    tt.save(model, tmp_path / "m.terse")
    with pytest.raises(TerseFileError, match=r"codes must lie in \[0, 20\), got 20"):
        tt.load(tmp_path / "m.terse")


def test_codes_are_stored_without_what_pads_them(tmp_path):
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (50, 30), generator=g).to(torch.uint8)
    layer = CodebookLinear(CodebookWeight.from_codes(codes, torch.randn(1, 16, generator=g)))
    assert layer.codes.nbytes == 50 * 64
    tied = CodebookLinear(layer.codebook_weight)
    tied.codes, tied.codebook = layer.codes, layer.codebook
    tt.save(nn.Sequential(layer, tied), tmp_path / "m.terse")
    (stored,) = [tensor for tensor in tt.inspect(tmp_path / "m.terse").tensors if "codes" in tensor.name]
    assert stored.shape == (50, 30) and stored.nbytes < 50 * 30 / 2 + 40
    loaded = tt.load(tmp_path / "m.terse")
    assert torch.equal(loaded[0].codes, layer.codes) and loaded[1].codes is loaded[0].codes
    # Padding that no pack function wrote is kept as it is.
    layer.codes[0, 63] = 0xF0
    tt.save(layer, tmp_path / "m.terse")
    assert torch.equal(tt.load(tmp_path / "m.terse").codes, layer.codes)


def test_padding_counts_for_the_limit(tmp_path):
    layer = CodebookLinear(CodebookWeight.from_codes(torch.zeros(9000, 1, dtype=torch.uint8), torch.zeros(1, 2)))
    tt.save(layer, tmp_path / "m.terse")
    with pytest.raises(TerseFileError, match="decode to at most 20000 bytes, got 576000"):
        tt.load(tmp_path / "m.terse", max_bytes=20_000)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.full((50, 30), 16, dtype=torch.uint8), r"codes must lie in \[0, 16\), got 16"),
        (torch.zeros(50, 31, dtype=torch.uint8), r"hold uint8 codes \[50, 30\] in a CodebookLinear"),
        (torch.zeros(50, 30), r"got torch.float32 \[50, 30\]"),
    ],
)
def test_plain_codes_of_another_layer_are_refused(tmp_path, monkeypatch, codes, message):
    layer = CodebookLinear(CodebookWeight.from_codes(torch.zeros(50, 30, dtype=torch.uint8), torch.randn(1, 16)))
    monkeypatch.setattr("tersetorch.storage.describe.plain_form", lambda module: codes)
    tt.save(layer, tmp_path / "m.terse")
    with pytest.raises(TerseFileError, match=message):
        tt.load(tmp_path / "m.terse")


def test_bytes_of_codes_are_told_as_codes(tmp_path):
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (64, 64), generator=g).to(torch.uint8)
    layer = CodebookLinear(CodebookWeight.from_codes(codes, torch.randn(1, 256, generator=g)))
    tt.save(nn.Sequential(layer, *layers()), tmp_path / "m.terse")
    found = tt.inspect(tmp_path / "m.terse")
    assert "values" not in found.parts or not found.parts["values"]
    assert found.parts["codes"] >= 64 * 64 and found.parts["codebooks"] > 900
    assert found.dense_bytes == 4 * (64 * 64 + 30 * 20 + 30 + 4 * 30)
    assert sum(found.parts.values()) == found.file_bytes


def test_another_block_of_columns_is_refused(tmp_path, monkeypatch):
    layer = CodebookLinear(
        CodebookWeight.from_codes(torch.zeros(8, 64, dtype=torch.uint8), torch.randn(2, 16), column_block=32)
    )
    node = {"k": "tersetorch.CodebookLinear", "c": {**layer.sizes, "column_block": 7}}
    monkeypatch.setattr("tersetorch.storage.describe._identity", lambda module, made: node)
    tt.save(layer, tmp_path / "m.terse")
    with pytest.raises(TerseFileError, match="sizes of a CodebookLinear"):
        tt.load(tmp_path / "m.terse")
