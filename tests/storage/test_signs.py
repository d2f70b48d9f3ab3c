"""Weights of signs in files: a bit each, with a scale for each row; layers, and what is refused."""

import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch.formats import SignWeight
from tersetorch.nn import BinaryLinear
from tersetorch.storage import TerseFileError
from tersetorch.storage.packed_kinds import plain_form
from tersetorch.storage.tensors import decode_tensor, encode_tensor


def signs(*shape, seed=0):
    return torch.where(torch.randn(shape, generator=torch.Generator().manual_seed(seed)) < 0, -1.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(40, 130), (16, 9, 3, 3)])
def test_rows_of_two_values_take_a_bit_a_weight(same_bits, dtype, shape):
    scale = torch.rand(shape[0], *[1] * (len(shape) - 1), generator=torch.Generator().manual_seed(1))
    weight = (signs(*shape) * scale).to(dtype)
    entry, encoded = encode_tensor("w", weight, True)
    assert entry.form == "signs"
    assert sum(len(stream.data) for stream in encoded) <= weight.numel() / 8 + dtype.itemsize * shape[0] + 8
    same_bits(decode_tensor(entry, [stream.data for stream in encoded]), weight)


def test_other_layouts_and_bit_patterns_come_back(same_bits):
    weight = signs(16, 8, 3, 3).mul_(torch.rand(16, 1, 1, 1)).to(memory_format=torch.channels_last)
    strange = signs(12, 100) * torch.tensor([0.0, 1.0, float("inf"), float("nan")] * 3)[:, None]
    for tensor in (weight, strange):
        entry, encoded = encode_tensor("w", tensor, True)
        assert entry.form == "signs"
        same_bits(decode_tensor(entry, [stream.data for stream in encoded]), tensor)


def test_negative_magnitudes_are_refused():
    entry, encoded = encode_tensor("w", signs(40, 130) * torch.rand(40, 1), True)
    data = [stream.data for stream in encoded]
    entry = type(entry)(
        **{**vars(entry), "streams": (type(entry.streams[0])("scales", "raw", 0, 160), entry.streams[1])}
    )
    with pytest.raises(TerseFileError, match="magnitudes of rows that are not negative"):
        decode_tensor(entry, [(-torch.ones(40)).numpy().tobytes(), data[1]])


def layers():
    torch.manual_seed(0)
    scaled = SignWeight.from_dense(signs(50, 70, seed=1) * torch.rand(50, 1))
    flattened = SignWeight.from_dense(signs(64, 120, seed=2), 6)
    return nn.Sequential(
        BinaryLinear(flattened, thresholds=torch.randint(-9, 9, (64,)).int()),
        BinaryLinear(SignWeight.from_dense(signs(70, 64, seed=3)), thresholds=torch.randint(-9, 9, (70,)).int()),
        BinaryLinear(scaled, torch.randn(50)),
    ).eval()


def test_layers_come_back_to_the_bit(tmp_path, round_trip):
    model = layers()
    loaded = round_trip(model, torch.randn(4, 120))
    assert repr(loaded) == repr(model)
    found = tt.inspect(tmp_path / "model.terse")
    weights = 50 * 70 + 64 * 120 + 70 * 64
    assert weights / 8 <= found.parts["signs"] <= weights / 8 + 60
    assert 0 < found.parts["thresholds"] <= 4 * (64 + 70) and found.parts["scales"] <= 4 * 50 and found.parts["biases"]
    assert [tensor.shape for tensor in found.tensors if tensor.name.endswith("signs")] == [
        (64, 120),
        (70, 64),
        (50, 70),
    ]
    tt.save(loaded, tmp_path / "again.terse")
    assert (tmp_path / "again.terse").read_bytes() == (tmp_path / "model.terse").read_bytes()


def test_a_stored_1_is_minus():
    for layer in layers():
        assert torch.equal(plain_form(layer), layer.weight < 0)


def test_a_finalized_network_is_stored_as_bits(tmp_path, round_trip):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 200), nn.BatchNorm1d(200), nn.ReLU(), nn.Linear(200, 300, bias=False))
    tt.binarize.bnn(model, scale="row")
    loaded = round_trip(tt.finalize(model), torch.randn(3, 100))
    assert type(loaded[2]) is tt.binarize.Sign
    found = tt.inspect(tmp_path / "model.terse")
    assert [tensor.form for tensor in found.tensors if len(tensor.shape) == 2] == ["signs", "signs"]
    assert found.parts["signs"] <= (100 * 200 + 200 * 300) / 8 + 20 and found.parts["scales"] <= 4 * 500


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(120, 64), nn.Linear(64, 70), nn.Linear(70, 50)

    def forward(self, x):
        return self.third(self.second(self.first(x)))


def test_layers_go_into_an_instance(tmp_path):
    model = Net()
    model.first, model.second, model.third = layers()
    tt.save(model, tmp_path / "m.terse")
    found = tt.load(tmp_path / "m.terse", model=Net())
    x = torch.randn(3, 120)
    assert type(found.first) is BinaryLinear and torch.equal(found(x), model(x))
    other = Net()
    other.second = nn.Linear(64, 71)
    with pytest.raises(ValueError, match="BinaryLinear"):
        tt.load(tmp_path / "m.terse", model=other)


def test_damaged_bits_are_refused(tmp_path):
    model = layers()
    model[1].bits[0, -1, 0] = 0
    model[2].bits[0, -1, 0] = -1
    tt.save(model, tmp_path / "m.terse")
    with pytest.raises(TerseFileError, match="bits past the last channel must be 0"):
        tt.load(tmp_path / "m.terse")


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        (torch.zeros(50, 69, dtype=torch.bool), r"hold bool signs \[50, 70\] in a BinaryLinear"),
        (torch.zeros(50, 70), r"got torch.float32 \[50, 70\]"),
    ],
)
def test_signs_of_another_layer_are_refused(tmp_path, monkeypatch, plain, message):
    monkeypatch.setattr("tersetorch.storage.describe.plain_form", lambda module: plain)
    tt.save(layers()[2], tmp_path / "m.terse")
    with pytest.raises(TerseFileError, match=message):
        tt.load(tmp_path / "m.terse")


def test_numbers_of_another_dtype_are_refused(tmp_path):
    layer = layers()[1]
    layer.thresholds = layer.thresholds.float()
    tt.save(nn.Sequential(layer), tmp_path / "m.terse")
    with pytest.raises(TerseFileError, match="thresholds must be int32"):
        tt.load(tmp_path / "m.terse")


def test_shift_batch_norm_and_signs_are_rebuilt(round_trip):
    model = nn.Sequential(tt.binarize.ShiftBatchNorm1d(5, eps=1e-3), tt.binarize.Sign(True)).eval()
    assert repr(round_trip(model, torch.randn(3, 5))) == repr(model)
