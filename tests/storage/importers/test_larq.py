"""read_larq: Keras's names and layouts, written here with numpy and h5py."""

import builtins

import numpy as np
import pytest
import torch
from torch.nn.functional import conv2d

from tersetorch.storage import read_larq


def weights():
    generator = np.random.default_rng(0)

    def normal(*shape):
        return generator.standard_normal(shape, dtype=np.float32)

    kernel = normal(3, 2, 4, 5)
    kernel[0, 0, 0, :2] = 0.0, -0.0
    return {
        "quant_conv2d/kernel:0": kernel,
        "bn/gamma:0": normal(5),
        "bn/beta:0": normal(5),
        "bn/moving_mean:0": normal(5),
        "bn/moving_variance:0": normal(5) ** 2,
        "quant_dense/kernel:0": normal(30, 7),
        "quant_dense/bias:0": normal(7),
        "plain_bn/moving_mean:0": normal(7),
        "plain_bn/moving_variance:0": normal(7) ** 2,
    }


def save_npz(path, arrays):
    np.savez(path, **arrays)
    return path


def save_hdf5(path, arrays, group=None):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        root = file.create_group(group) if group else file
        layers = list(dict.fromkeys(name.split("/")[0] for name in arrays))
        root.attrs["layer_names"] = [layer.encode() for layer in layers]
        for layer in layers:
            names = [name for name in arrays if name.startswith(f"{layer}/")]
            root.create_group(layer).attrs["weight_names"] = [name.encode() for name in names]
            for name in names:
                root[layer][name] = arrays[name]
    return path


@pytest.mark.parametrize("form", ["npz", "h5", "model"])
def test_reads_what_keras_saves(tmp_path, form):
    arrays = weights()
    path = tmp_path / f"weights.{'npz' if form == 'npz' else 'h5'}"
    if form == "npz":
        save_npz(path, arrays)
    else:
        save_hdf5(path, arrays, "model_weights" if form == "model" else None)
    found = read_larq(path)
    assert list(found) == ["quant_conv2d", "bn", "quant_dense", "plain_bn"]
    conv, dense, norm = found["quant_conv2d"], found["quant_dense"], found["bn"]
    kernel = arrays["quant_conv2d/kernel:0"]
    # A position of a convolution by Keras's definition, on [height, width, channels].
    image = np.random.default_rng(1).standard_normal((3, 2, 4))
    expected = [(np.where(kernel[..., o] >= 0, 1, -1) * image).sum() for o in range(5)]
    got = conv2d(torch.from_numpy(image).permute(2, 0, 1)[None], conv.weight.double()).flatten()
    assert torch.allclose(got, torch.tensor(expected)) and conv.scale is None and conv.bias is None
    assert torch.equal(
        dense.weight, torch.from_numpy(np.where(arrays["quant_dense/kernel:0"] >= 0, 1.0, -1.0).T).float()
    )
    assert torch.equal(dense.bias, torch.from_numpy(arrays["quant_dense/bias:0"]))
    for ours, theirs in (
        ("gamma", "gamma"),
        ("beta", "beta"),
        ("mean", "moving_mean"),
        ("variance", "moving_variance"),
    ):
        assert torch.equal(getattr(norm, ours), torch.from_numpy(arrays[f"bn/{theirs}:0"]))
    assert norm.epsilon == 1e-3
    assert torch.equal(found["plain_bn"].gamma, torch.ones(7)) and torch.equal(found["plain_bn"].beta, torch.zeros(7))


def test_a_dense_layer_behind_an_image(tmp_path):
    dense = read_larq(save_npz(tmp_path / "w.npz", weights()))["quant_dense"]
    image = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))  # [channels, height, width]
    keras = dense.weight @ image.permute(1, 2, 0).flatten()
    assert torch.allclose(dense.after_flatten(5).weight @ image.flatten(), keras, atol=1e-5)
    with pytest.raises(ValueError, match="channels must divide the columns"):
        dense.after_flatten(4)


def test_magnitude_aware_signs_have_scales(tmp_path):
    arrays = weights()
    chosen = {"quant_conv2d": "magnitude_aware_sign", "quant_dense": "approx_sign"}
    found = read_larq(save_npz(tmp_path / "w.npz", arrays), quantizer=chosen)
    expected = np.abs(arrays["quant_conv2d/kernel:0"]).mean((0, 1, 2))
    assert np.allclose(found["quant_conv2d"].scale, expected, rtol=1e-6) and found["quant_dense"].scale is None


def test_refuses(tmp_path):
    def refused(message, *, without=None, quantizer="ste_sign", **changes):
        arrays = {name: array for name, array in weights().items() if name != without}
        arrays |= {name.replace("__", "/") + ":0": array for name, array in changes.items()}
        with pytest.raises(ValueError, match=message):
            read_larq(save_npz(tmp_path / "w.npz", arrays), quantizer=quantizer)

    ones = np.ones(5, np.float32)
    refused("hold kernels and biases", depthwise__depthwise_kernel=np.ones((3, 3, 4, 1), np.float32))
    refused("hold kernels and biases", without="bn/moving_mean:0")
    refused("float32 in 'kernel'", quant_dense__kernel=np.ones((30, 7)))
    refused("finite numbers in 'kernel'", quant_dense__kernel=np.full((30, 7), np.nan, np.float32))
    refused(r"hold \[in, out\]", quant_dense__kernel=ones)
    refused(r"hold \[7\] in 'bias'", quant_dense__bias=ones)
    refused("no negative moving_variance", bn__moving_variance=-ones)
    refused("got 'ste_tern' for 'quant_conv2d'", quantizer="ste_tern")
    refused("got None for 'quant_conv2d'", quantizer={"quant_dense": "ste_sign"})
    refused("must name layers of the file, got 'x'", quantizer={"x": "ste_sign"})
    refused("name each array as Keras does", arr_0=ones)
    with pytest.raises(FileNotFoundError, match="source must be a file"):
        read_larq(tmp_path / "none.npz")


def test_refuses_arguments_and_damage(tmp_path):
    path = save_npz(tmp_path / "w.npz", weights())
    for quantizer in (None, 3):
        with pytest.raises(TypeError, match="quantizer must be a name"):
            read_larq(path, quantizer=quantizer)
    for epsilon, error in (("x", TypeError), (-5.0, ValueError), (float("nan"), ValueError)):
        with pytest.raises(error, match="epsilon must be"):
            read_larq(path, epsilon=epsilon)
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[300] ^= 1
    for content in (b"", b"no zip", whole[:300], bytes(changed)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="source must be"):
            read_larq(path)
    np.savez(path, **{"a/kernel:0": np.array([None])})
    with pytest.raises(ValueError, match="whole NPZ file of plain arrays"):
        read_larq(path)
    with pytest.raises(ValueError, match="source must hold weights"):
        read_larq(save_npz(path, {}))


def test_hdf5_without_h5py_is_refused(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **others):
        if name == "h5py":
            raise ImportError(name)
        return real(name, *rest, **others)

    monkeypatch.setattr(builtins, "__import__", without)
    (tmp_path / "w.h5").write_bytes(b"")
    with pytest.raises(ImportError, match="HDF5 files need h5py"):
        read_larq(tmp_path / "w.h5")
