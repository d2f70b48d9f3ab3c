import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch.zoo import (
    LeNet5,
    SqueezeNet,
    caffe_input,
    load_deep_compression,
    read_imagenet100,
    squeezenet_from_deep_compression,
)

ROOT = Path(os.environ.get("TERSETORCH_DATA") or "/nonexistent")
PUBLISHED = ROOT / "models" / "squeezenet-deep-compression.net"
published = pytest.mark.skipif(
    not PUBLISHED.is_file(), reason="wants TERSETORCH_DATA with models/squeezenet-deep-compression.net"
)


def network():
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))


@pytest.fixture
def file(tmp_path):
    """A file for network(): conv weights 0 2 0 5 0 0 as codes are, linear weight [1, 3] = 7."""
    conv = np.concatenate([np.arange(256), [0.5, 1, 2]]).astype("<f4").tobytes() + bytes([2, 5]) + bytes([0x11])
    linear = np.concatenate([np.arange(16), [3, 4]]).astype("<f4").tobytes() + bytes([7]) + bytes([15])
    path = tmp_path / "m.net"
    path.write_bytes(np.array([2, 1], "<u4").tobytes() + conv + linear)
    return path


def test_puts_every_weight_in_its_place(file):
    model = network()
    assert load_deep_compression(model, file) is model
    assert model[0].weight.flatten().tolist() == [0, 2, 0, 5, 0, 0]
    assert model[0].bias.tolist() == [0.5, 1, 2]
    assert model[3].weight.nonzero().tolist() == [[1, 3]] and model[3].weight[1, 3] == 7
    assert model[3].bias.tolist() == [3, 4]
    assert all(parameter.requires_grad for parameter in model.parameters())


def without_bias():
    return nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.Linear(12, 2))


def pruned():
    return tt.prune.magnitude(network(), sparsity=0.5)


@pytest.mark.parametrize(
    ("build", "error", "sentence"),
    [
        (lambda: 3, TypeError, r"model must be a torch\.nn\.Module, got int"),
        (nn.ReLU, ValueError, "model must have convolutional or linear layers, got none"),
        (without_bias, ValueError, r"0\.bias must be a plain float32 parameter, got none"),
        (pruned, ValueError, r"0\.weight must be a plain float32 parameter, got none"),
        (lambda: network().double(), ValueError, r"0\.weight must be .* got torch\.float64 on cpu"),
        (lambda: network().to("meta"), ValueError, r"0\.weight must be .* got torch\.float32 on meta"),
        (LeNet5, ValueError, r"must hold at most 5000 entries for fc2 of shape \[10, 500\], got"),
    ],
)
def test_what_does_not_fit_is_refused_and_left_alone(build, error, sentence, file):
    model = build()
    before = copy.deepcopy(model.state_dict()) if isinstance(model, nn.Module) else {}
    with pytest.raises(error, match=sentence):
        load_deep_compression(model, file)
    for name, tensor in before.items():
        assert tensor.is_meta or torch.equal(model.state_dict()[name], tensor)


def test_a_damaged_last_layer_leaves_the_first_alone(file):
    raw = bytearray(file.read_bytes())
    raw[-1] = 0x0F
    raw[-74:-70] = np.array([1], "<f4").tobytes()  # the last layer's codebook begins with 1
    file.write_bytes(raw)
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="must have 0 first in the codebook of 3, got 1"):
        load_deep_compression(model, file)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_another_file_is_no_squeezenet(file):
    with pytest.raises(ValueError, match=r"must .*, got .*; pass the shapes of its network, or download it again"):
        squeezenet_from_deep_compression(file)
    with pytest.raises(FileNotFoundError, match="path must name a file that can be read"):
        squeezenet_from_deep_compression(file.with_name("nowhere.net"))


@published
def test_the_published_squeezenet():
    model = squeezenet_from_deep_compression(PUBLISHED)
    assert type(model) is SqueezeNet and model.version == "1.0" and not model.training
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert sum(weight.numel() for weight in weights) == 1_244_448
    assert sum(int(weight.count_nonzero()) for weight in weights) == 415_921
    assert all(weight.unique().numel() <= 256 for weight in weights)
    counted = tt.costs.count(model, torch.zeros(1, 3, 227, 227))
    assert (counted.parameters, counted.macs) == (1_248_424, 861_339_936)
    assert counted.nonzeros == 415_921 + sum(int(m.bias.count_nonzero()) for m in model.modules() if hasattr(m, "bias"))


@published
def test_the_published_squeezenet_takes_a_fifth_less_than_its_authors_file(tmp_path):
    model = squeezenet_from_deep_compression(PUBLISHED)
    path = tmp_path / "squeezenet.terse"
    tt.save(model, path)
    # 541,700 bytes are the entropy of its streams, each by itself, with codebooks and biases as they are.
    assert path.stat().st_size < 519_000 < 0.77 * PUBLISHED.stat().st_size
    loaded = tt.load(path)
    for (name, ours), (_, theirs) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32)), name
    image = torch.randn(1, 3, 227, 227, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(image), loaded(image))


@published
@pytest.mark.slow
@pytest.mark.skipif(
    not (ROOT / "data" / "imagenet-100.npz").is_file(), reason="wants TERSETORCH_DATA with data/imagenet-100.npz"
)
def test_the_published_squeezenet_recognises_images():
    model = squeezenet_from_deep_compression(PUBLISHED)
    images, labels = read_imagenet100(ROOT)
    with torch.no_grad():
        best = torch.cat([model(caffe_input(part)).topk(5).indices for part in images.split(10)])
    hits = best == labels[:, None]
    # 65.5 % and 85.9 % of a thousand images; no decision here hangs on less than 0.07 of a logit.
    assert (int(hits[:, 0].sum()), int(hits.sum())) == (64, 83)


@published
@pytest.mark.slow
@pytest.mark.skipif(
    not (ROOT / "data" / "imagenet-100.npz").is_file(), reason="wants TERSETORCH_DATA with data/imagenet-100.npz"
)
def test_the_published_squeezenet_at_six_bits(tmp_path):
    """Each layer's values shared once more, 64 of them, without training: 412,275 bytes (published: 0.47 MB)."""
    model = squeezenet_from_deep_compression(PUBLISHED)
    images, labels = read_imagenet100(ROOT)
    small = tt.finalize(tt.quantize.kmeans(squeezenet_from_deep_compression(PUBLISHED), bits=6))
    tt.save(small, tmp_path / "m.terse")
    assert (tmp_path / "m.terse").stat().st_size < 413_000
    small = tt.load(tmp_path / "m.terse")
    with torch.no_grad():
        wide, narrow = (
            torch.cat([network(caffe_input(part)).argmax(1) for part in images.split(10)]) for network in (model, small)
        )
    # 79 images of a hundred get the answer of 8 bits, 61 the right one, where 8 bits give 64.
    assert int((wide == narrow).sum()) >= 76 and int((narrow == labels).sum()) >= 59
