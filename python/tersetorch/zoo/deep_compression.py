"""The networks that the authors of Deep Compression published."""

from __future__ import annotations

from os import PathLike
from typing import TypeVar

import torch
from torch import nn

from tersetorch.storage import read_deep_compression
from tersetorch.zoo.squeezenet import SqueezeNet

Model = TypeVar("Model", bound=nn.Module)


def squeezenet_from_deep_compression(path: str | PathLike[str]) -> SqueezeNet:
    """The published SqueezeNet 1.0, pruned and shared, from its file compressed_SqueezeNet.net; in evaluation mode.

    A third of its 1,244,448 weights is not zero. Images go in as `caffe_input` makes them, 227 x 227; logits come out
    in the order of ImageNet's synsets.

    Args:
        path: the file.

    Raises:
        TypeError: path is no path.
        ValueError: the file is damaged or of another network.
        OSError: the file cannot be read.

    Source:
        github.com/songhan/SqueezeNet-Deep-Compression; Han, Mao, Dally, Deep Compression (2015).
    """
    return load_deep_compression(SqueezeNet("1.0"), path).eval()


def load_deep_compression(model: Model, path: str | PathLike[str]) -> Model:
    """Gives model the weights of a published .net file, as plain dense tensors, in place; returns it.

    Args:
        model: its convolutional and linear layers, in the order of definition, are those of the file (the zoo's
            SqueezeNet 1.0 and AlexNet are), each with a float32 weight and bias.
        path: the file.

    Raises:
        TypeError: model is no nn.Module, or path no path.
        ValueError: model has no such layer, or one whose weight or bias is no plain float32 parameter (it has none, or
            is being pruned or shared), or the file does not fit the layers (see
            tersetorch.storage.read_deep_compression). The model is as it was then.
        OSError: the file cannot be read.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"load_deep_compression: model must be a torch.nn.Module, got {type(model).__name__}; pass SqueezeNet()"
        )
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    if not layers:
        raise ValueError(
            "load_deep_compression: model must have convolutional or linear layers, got none; pass SqueezeNet()"
        )
    for name, layer in layers.items():
        for part in ("weight", "bias"):
            tensor = layer._parameters.get(part)
            if tensor is None or tensor.dtype != torch.float32 or tensor.is_meta:
                got = "none" if tensor is None else f"{tensor.dtype} on {tensor.device}"
                raise ValueError(
                    f"load_deep_compression: {name or 'model'}.{part} must be a plain float32 parameter, got {got}; "
                    "pass a new network"
                )
    shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
    found = read_deep_compression(path, shapes)
    with torch.no_grad():
        for name, layer in layers.items():
            layer.weight.copy_(found[name].to_dense())
            layer.bias.copy_(found[name].bias)  # type: ignore[union-attr]
    return model
