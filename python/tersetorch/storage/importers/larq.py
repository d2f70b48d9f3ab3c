"""The weights of Larq's binary layers, as Keras saves them in HDF5, or by their names in an NPZ file.

Names are those of Keras, `layer/kernel:0`: `kernel` [in, out] of QuantDense and [height, width, in / groups, out] of
QuantConv2D, `bias` [out]; `gamma`, `beta`, `moving_mean` and `moving_variance` [channels] of BatchNormalization.
Kernels are kept in full precision, and a layer multiplies with what its kernel_quantizer makes of them:

    ste_sign, approx_sign, swish_sign    +1 where the kernel is at least 0, else -1
    magnitude_aware_sign                 the same times the mean magnitude of the kernel for each output

In HDF5 the attribute layer_names names the groups, and weight_names of each of them its weights; a file of a whole
model has them in the group model_weights.

Source: github.com/larq/larq, larq/quantizers.py and larq/layers.py; Keras's saving of weights in HDF5.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tersetorch.methods.arguments import check_number
from tersetorch.storage.archives import FREE_BYTES, RATIO, check_npz

WHERE = "read_larq"
SIGNS = ("ste_sign", "approx_sign", "swish_sign")
QUANTIZERS = (*SIGNS, "magnitude_aware_sign")
NORMS = ("gamma", "beta", "moving_mean", "moving_variance")
EPSILON = 1e-3


@dataclass(frozen=True)
class LarqLayer:
    """A QuantDense or QuantConv2D: scale * weight is what it multiplies with.

    Attributes:
        weight: float32 +1 and -1, [out, in] or [out, in / groups, height, width].
        scale: float32 [out], the mean magnitudes of magnitude_aware_sign, or None for 1.
        bias: float32 [out], or None.
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def after_flatten(self, channels: int) -> LarqLayer:
        """The same layer behind a flattened image of so many channels.

        Keras has the channels of each position together, torch the positions of each channel.

        Raises:
            ValueError: the layer is no dense one, or channels does not divide its columns.
        """
        if self.weight.dim() != 2 or channels < 1 or self.weight.shape[1] % channels:
            raise ValueError(
                f"LarqLayer: channels must divide the columns of a dense layer, got {channels} for a weight of shape "
                f"{tuple(self.weight.shape)}; pass those of the image that is flattened"
            )
        rows, columns = self.weight.shape
        by_channel = self.weight.view(rows, columns // channels, channels).transpose(1, 2)
        return LarqLayer(by_channel.reshape(rows, columns), self.scale, self.bias)


@dataclass(frozen=True)
class LarqBatchNorm:
    """y = gamma * (x - mean) / sqrt(variance + epsilon) + beta, each float32 [channels]."""

    gamma: Tensor
    beta: Tensor
    mean: Tensor
    variance: Tensor
    epsilon: float


def read_larq(
    source: str | Path, *, quantizer: str | Mapping[str, str] = "ste_sign", epsilon: float = EPSILON
) -> dict[str, LarqLayer | LarqBatchNorm]:
    """The binary layers and batch norms of a file of Larq's weights, by the layers' names, in the file's order.

    Args:
        source: an HDF5 file (.h5, .hdf5 or .keras.h5; needs h5py), or an NPZ file whose arrays have Keras's names:
            numpy.savez(path, **{w.name: w.numpy() for w in model.weights}).
        quantizer: the kernel_quantizer of the layers, which the file does not say: one of "ste_sign", "approx_sign",
            "swish_sign" and "magnitude_aware_sign", or one for each layer's name.
        epsilon: of the batch norms, which the file does not say either; Keras has 0.001.

    Raises:
        TypeError: quantizer is neither a name nor a mapping, or epsilon no number.
        ImportError: source is HDF5 and h5py is not installed.
        ValueError: a layer has weights that are not read (depthwise and separable kernels among them), a shape does not
            fit, a number is not finite, or a quantizer has no signs: nothing is guessed.
        OSError: the file cannot be read.
    """
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{WHERE}: source must be a file, got {path}; pass one that exists")
    if not isinstance(quantizer, str | Mapping):
        raise TypeError(
            f"{WHERE}: quantizer must be a name, or a mapping from layers to names, got {quantizer!r}; pass 'ste_sign'"
        )
    check_number(WHERE, "epsilon", epsilon, 0.0, float("inf"))
    layers: dict[str, dict[str, NDArray[Any]]] = {}
    for name, array in (_from_npz(path) if path.suffix == ".npz" else _from_hdf5(path)).items():
        layer, _, part = name.removesuffix(":0").rpartition("/")
        if not layer:
            _refuse("name each array as Keras does, 'layer/kernel:0'", repr(name))
        if part in layers.setdefault(layer, {}):
            _refuse(f"hold {part!r} of {layer!r} once", "two")
        layers[layer][part] = array
    if not layers:
        _refuse("hold weights", "none")
    if not isinstance(quantizer, str):
        unknown = sorted(set(quantizer) - set(layers))
        if unknown:
            raise ValueError(
                f"{WHERE}: quantizer must name layers of the file, got {unknown[0]!r}; pass {list(layers)}"
            )
    found: dict[str, LarqLayer | LarqBatchNorm] = {}
    for layer, parts in layers.items():
        if set(parts) <= {"kernel", "bias"} and "kernel" in parts:
            chosen = quantizer if isinstance(quantizer, str) else quantizer.get(layer)
            found[layer] = _layer(layer, parts, chosen)
        elif set(parts) <= set(NORMS) and {"moving_mean", "moving_variance"} <= set(parts):
            found[layer] = _norm(layer, parts, epsilon)
        else:
            _refuse("hold kernels and biases, or batch norms", f"{sorted(parts)} of {layer!r}")
    return found


def _layer(layer: str, parts: Mapping[str, NDArray[Any]], quantizer: str | None) -> LarqLayer:
    if quantizer not in QUANTIZERS:
        raise ValueError(
            f"{WHERE}: quantizer must be one of {list(QUANTIZERS)}, got {quantizer!r} for {layer!r}; others have more "
            "values than two"
        )
    kernel = _floats(layer, "kernel", parts["kernel"])
    if kernel.dim() not in (2, 4) or not kernel.numel():
        _refuse(f"hold [in, out] or [height, width, in, out] in the kernel of {layer!r}", f"{list(kernel.shape)}")
    rows = kernel.shape[-1]
    bias = None if "bias" not in parts else _floats(layer, "bias", parts["bias"], rows)
    scale = None
    if quantizer not in SIGNS:
        scale = kernel.abs().double().flatten(0, -2).mean(0).float()
    signs = torch.where(kernel >= 0, 1.0, -1.0)
    return LarqLayer((signs.T if kernel.dim() == 2 else signs.permute(3, 2, 0, 1)).contiguous(), scale, bias)


def _norm(layer: str, parts: Mapping[str, NDArray[Any]], epsilon: float) -> LarqBatchNorm:
    channels = parts["moving_mean"].size
    read = {part: _floats(layer, part, array, channels) for part, array in parts.items()}
    mean, variance = read["moving_mean"], read["moving_variance"]
    if bool((variance < 0).any()):
        _refuse(f"hold no negative moving_variance of {layer!r}", f"{variance.min().item():g}")
    gamma, beta = read.get("gamma", torch.ones(channels)), read.get("beta", torch.zeros(channels))
    return LarqBatchNorm(gamma, beta, mean, variance, epsilon)


def _floats(layer: str, part: str, array: NDArray[Any], size: int | None = None) -> Tensor:
    if array.dtype != np.float32:
        _refuse(f"hold float32 in {part!r} of {layer!r}", f"{array.dtype}")
    if size is not None and array.shape != (size,):
        _refuse(f"hold [{size}] in {part!r} of {layer!r}", f"{list(array.shape)}")
    if not np.isfinite(array).all():
        _refuse(f"hold finite numbers in {part!r} of {layer!r}", "others")
    return torch.from_numpy(np.array(array))


def _from_npz(path: Path) -> dict[str, NDArray[Any]]:
    if not zipfile.is_zipfile(path):
        _refuse("be an NPZ file", "another or a damaged one", "save it with numpy.savez")
    try:
        check_npz(path)
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # whatever readers make of a damaged file
        _refuse("be a whole NPZ file of plain arrays", f"{type(error).__name__}", "save it with numpy.savez")


def _from_hdf5(path: Path) -> dict[str, NDArray[Any]]:
    try:
        import h5py
    except ImportError:
        raise ImportError(
            f"{WHERE}: HDF5 files need h5py, which is not installed; pip install h5py, or save the weights as NPZ"
        ) from None
    found: dict[str, NDArray[Any]] = {}
    with h5py.File(path, "r") as file:
        root = file.get("model_weights", file)
        if "layer_names" not in root.attrs:
            _refuse("hold the attribute 'layer_names'", "none", "save it with model.save_weights(path)")
        for layer in _names(root.attrs["layer_names"]):
            for name in _names(root[layer].attrs["weight_names"]):
                dataset = root[layer][name]
                elsewhere = dataset.external or dataset.is_virtual or dataset.file.filename != file.filename
                if elsewhere or dataset.nbytes > max(FREE_BYTES, RATIO * path.stat().st_size):
                    _refuse(f"hold {name!r} itself, in plain numbers", "another file's, or far more than its bytes")
                array = np.array(dataset)
                # The layer's own name, not that of a scope around it.
                found[f"{layer}/{name.rpartition('/')[2]}"] = array
    return found


def _names(values: Any) -> list[str]:
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values]


def _refuse(rule: str, came: str, fix: str = "save the model's weights again") -> NoReturn:
    raise ValueError(f"{WHERE}: source must {rule}, got {came}; {fix}")
