import sys

import numpy as np
import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch.storage import export_onnx

onnxruntime = pytest.importorskip("onnxruntime")


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 20), nn.ReLU(), nn.Linear(20, 4)
    )
    tt.prune.magnitude(model, 0.8)
    return model.eval()


def outputs(path, x):
    session = onnxruntime.InferenceSession(path)
    assert {node.domain for node in __import__("onnx").load(path).graph.node} <= {""}  # standard operators alone
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def test_a_converted_model_runs_elsewhere(tmp_path):
    model = network()
    tt.quantize.kmeans(model, 4, targets="3")
    fast = tt.convert(tt.finalize(model), plan={"0": "sparse_conv2d", "3": "sparse_codebook", "5": "csr"})
    assert fast[3].relu  # computed in the layer, an operator of its own in the file
    found = export_onnx(fast, torch.randn(2, 3, 8, 8), tmp_path / "m.onnx")
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        np.testing.assert_allclose(outputs(tmp_path / "m.onnx", x), fast(x), rtol=1e-4, atol=1e-5)
    assert found.onnx_bytes == (tmp_path / "m.onnx").stat().st_size
    tt.save(fast, tmp_path / "m.terse")
    assert found.terse_bytes == (tmp_path / "m.terse").stat().st_size < found.onnx_bytes / 4
    assert set(found.lost) == {"0", "3", "5"}
    for name, words in (("0", "SparseConv2d becomes Conv2d"), ("3", "SparseCodebookLinear becomes Linear")):
        assert found.lost[name].startswith(words)
    assert "times the" in str(found) and isinstance(fast[3], tt.nn.SparseCodebookLinear)


def test_an_example_of_one_is_enough_for_any_batch(tmp_path):
    fast = tt.convert(tt.finalize(network()), plan="sparse")
    export_onnx(fast, torch.randn(1, 3, 8, 8), tmp_path / "m.onnx")
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 8, 8)
        with torch.no_grad():
            np.testing.assert_allclose(outputs(tmp_path / "m.onnx", x), fast(x), rtol=1e-4, atol=1e-5)


def test_a_model_of_one_batch_alone_is_told_how(tmp_path):
    class OneRow(nn.Linear):
        def forward(self, x):
            return super().forward(x.reshape(1, 12))

    with pytest.raises(ValueError, match="pass dynamic_batch=False for a file of this batch alone"):
        export_onnx(OneRow(12, 3).eval(), torch.randn(1, 12), tmp_path / "m.onnx")
    export_onnx(OneRow(12, 3).eval(), torch.randn(1, 12), tmp_path / "m.onnx", dynamic_batch=False)
    assert outputs(tmp_path / "m.onnx", torch.randn(1, 12)).shape == (1, 3)


def test_thin_layers_stay_thin_and_live_methods_are_baked(tmp_path):
    model = tt.factorize.svd(tt.finalize(network()), ratio=3, targets="3")
    found = export_onnx(model, (torch.randn(2, 3, 8, 8),), tmp_path / "m.onnx", dynamic_batch=False)
    assert found.lost == {} and found.onnx_bytes < 4 * sum(p.numel() for p in network().parameters())
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        np.testing.assert_allclose(outputs(tmp_path / "m.onnx", x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_what_has_no_standard_form_is_refused(tmp_path):
    model, x = network(), torch.randn(2, 3, 8, 8)
    tt.quantize.fixed_formats(model, [x], bits=8)
    fixed = tt.convert(tt.finalize(model), plan="fixed")
    with pytest.raises(ValueError, match="standard form, got FixedPointConv2d at '0'"):
        export_onnx(fixed, x, tmp_path / "m.onnx")

    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"model must pass torch\.export"):
        export_onnx(Branches(), x, tmp_path / "m.onnx")
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        export_onnx(3, x, tmp_path / "m.onnx")
    with pytest.raises(TypeError, match="example_inputs must be a tensor, a tuple"):
        export_onnx(network(), [x], tmp_path / "m.onnx")
    with pytest.raises(FileNotFoundError, match="folder that exists"):
        export_onnx(network(), x, tmp_path / "none" / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


def test_without_onnxscript(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ModuleNotFoundError, match="pip install onnx onnxscript"):
        export_onnx(network(), torch.randn(2, 3, 8, 8), tmp_path / "m.onnx")
