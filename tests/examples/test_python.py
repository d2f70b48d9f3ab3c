"""Each example, at a size that a test can pay for: its own functions, on smaller networks and less data."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tersetorch as tt

EXAMPLES = Path(__file__).parents[2] / "examples" / "python"


def example(name):
    """The example's module; its main program does not run."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= tested


def test_sentence_embeddings(tmp_path):
    transformers = pytest.importorskip("transformers")
    module = example("sentence_embeddings")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model, dense = (transformers.BertModel(config).eval() for _ in range(2))
    dense.load_state_dict(model.state_dict())
    words = torch.randint(0, 99, (6, 40, 12), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": some, "attention_mask": torch.ones_like(some)} for some in words]
    before = module.compare(dense, module.compress(model, data[:4]), data[:4])
    after = module.compare(dense, module.distil(model, dense, data[:4], 20, lr=1e-5), data[:4])
    assert after["mean_cosine"] > before["mean_cosine"]
    tt.finalize(model)
    for name, layer in model.named_modules():
        if name.startswith("encoder") and isinstance(layer, nn.Linear):
            assert layer.weight.count_nonzero() == layer.weight.numel() // 2
            assert layer.weight.unique().numel() <= 16
    found = module.compare(dense, model, data[4:])
    assert 0.6 < found["least_cosine"] <= found["mean_cosine"] < 1
    fast = tt.convert(model, plan={"encoder.layer.0.output.dense": "csr"})
    tt.save(fast, tmp_path / "m.terse")
    again = tt.load(tmp_path / "m.terse", model=dense)
    assert torch.equal(module.embed(again, data[4:]), module.embed(fast, data[4:]))
    torch.testing.assert_close(module.embed(fast, data[4:]), module.embed(model, data[4:]))
    assert module.milliseconds(fast, data[0], 3) > 0


def test_sentence_embeddings_texts():
    calibration, held_out = example("sentence_embeddings").read_paragraphs()
    assert len(calibration) == 2 * len(held_out) == len(set(calibration) - set(held_out))
    assert all(60 <= len(text) <= 400 for text in calibration)


def test_resnet_cifar():
    module = example("resnet_cifar")
    torch.manual_seed(0)
    images = torch.randn(96, 3, 16, 16), torch.randint(0, 10, (96,))
    network = tt.zoo.ResNet20()
    module.compress(network, module.Images(images, images, images), epochs=2)
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d):
            kept = layer.weight.count_nonzero() / layer.weight.numel()
            assert kept == pytest.approx(0.2, abs=0.01) if name.startswith("layer") else kept > 0.9, name
            assert layer.weight.unique().numel() <= 32
    assert 0 <= module.error(network, images) <= 100


def test_squeezenet(data_folder):
    module = example("squeezenet")
    network = module.load_network(data_folder / "models" / "squeezenet-deep-compression.net")
    first, five = module.right_of(network, data_folder, most=4)
    assert 0 <= first <= five <= 4


@pytest.fixture
def data_folder():
    import os

    folder = os.environ.get("TERSETORCH_DATA")
    if not folder:
        pytest.skip("TERSETORCH_DATA names no folder with the published network")
    return Path(folder)


def test_lstm(tmp_path):
    module = example("lstm")
    torch.manual_seed(0)
    text = torch.randint(0, 7, (50,)).repeat(40)
    model = module.Characters(7, hidden=48, layers=2)
    plain = model.lstm
    x, state = torch.randn(3, 5, 64), (torch.randn(2, 3, 48), torch.randn(2, 3, 48))
    for given in (None, state):
        (ours, (h, c)), (theirs, (h_theirs, c_theirs)) = module.CellLSTM.from_lstm(plain)(x, given), plain(x, given)
        for found, expected in ((ours, theirs), (h, h_theirs), (c, c_theirs)):
            torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="one direction"):
        module.CellLSTM.from_lstm(nn.LSTM(4, 4, bidirectional=True, batch_first=True))
    before = module.bits_per_character(model, text)
    module.train(model, text, 20)
    module.compress(model, text, 20)
    assert module.bits_per_character(model, text) < before
    hidden = model.lstm.of_hidden[1].weight
    assert hidden.count_nonzero() == pytest.approx(0.1 * hidden.numel(), abs=2) and hidden.unique().numel() <= 32
    fast = tt.convert(model, plan={"lstm.of_hidden.0": "csr", "lstm.of_hidden.1": "sparse_codebook"})
    torch.testing.assert_close(fast(text[None, :9]), model(text[None, :9]), rtol=1e-4, atol=1e-5)
