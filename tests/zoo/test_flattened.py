"""FlattenedCNN: its formula, its size, files, conversion and what it refuses."""

import pytest
import torch

import tersetorch as tt
from tersetorch.nn import FlattenedConv2d
from tersetorch.zoo import FlattenedCNN


@pytest.fixture
def small():
    torch.manual_seed(0)
    return FlattenedCNN(1, 12, 3, (4, 6, 8), 5).eval()


def test_computes_its_formula(small):
    x = torch.randn(2, 1, 12, 12)
    y = x
    for conv in (small.conv1, small.conv2, small.conv3):
        y = torch.max_pool2d(torch.relu(conv(y)), 2)
    y = torch.relu(small.fc4(y.flatten(1)))
    torch.testing.assert_close(small(x), small.fc5(y))


def test_only_the_second_and_third_convolution_are_flattened(small):
    assert type(small.conv1) is torch.nn.Conv2d
    assert all(type(c) is FlattenedConv2d and c.stages == 2 and c.padding == "same" for c in (small.conv2, small.conv3))
    dense = FlattenedCNN(1, 12, 3, (4, 6, 8), 5, flattened=False)
    assert not any(isinstance(module, FlattenedConv2d) for module in dense.modules())
    assert dense(torch.randn(2, 1, 12, 12)).shape == (2, 3)


def test_the_papers_widths():
    with torch.device("meta"):
        dense, flat = (FlattenedCNN(flattened=kind) for kind in (False, True))
    weights = [
        sum(p.numel() for n, p in model.named_parameters() if n.startswith("conv") and "bias" not in n)
        for model in (dense, flat)
    ]
    assert weights == [1_133_600, 141_856]


def test_travels_and_converts(small, tmp_path):
    x = torch.randn(2, 1, 12, 12)
    tt.save(small, tmp_path / "net.terse")
    loaded = tt.load(tmp_path / "net.terse")
    assert torch.equal(loaded(x), small(x)) and loaded.widths == (4, 6, 8)
    fast = tt.convert(small, x, plan={"conv2": "flattened_conv2d", "conv3": "flattened_conv2d"})
    assert fast.conv2.layout == fast.conv3.layout == "fused"
    with torch.no_grad():
        torch.testing.assert_close(fast(x), small(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"in_channels": 0}, ValueError, "FlattenedCNN: in_channels must be at least 1, got 0"),
        ({"size": 7}, ValueError, "FlattenedCNN: size must be at least 8, got 7"),
        ({"widths": (96, 128)}, TypeError, r"FlattenedCNN: widths must be three ints, got \(96, 128\)"),
        ({"widths": (96, 128, 0)}, ValueError, "FlattenedCNN: widths must be at least 1, got 0"),
        ({"hidden": 1.5}, TypeError, "FlattenedCNN: hidden must be an int, got 1.5"),
        ({"dropout": 1.0}, ValueError, r"FlattenedCNN: dropout must be in \[0, 1\), got 1.0"),
        ({"flattened": 1}, TypeError, "FlattenedCNN: flattened must be True or False, got 1; pass a bool"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        FlattenedCNN(**arguments)


def test_wrong_images_are_refused(small):
    with pytest.raises(ValueError, match=r"FlattenedCNN: images must be \[N, 1, 12, 12\], got shape \(2, 1, 10, 12\)"):
        small(torch.zeros(2, 1, 10, 12))
