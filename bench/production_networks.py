"""The networks that the suite `production` runs: small ones and AlexNet's linear layers, pruned as published."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from tersetorch import zoo

from .cases import Linear, weight_of
from .suites import codebook

STACK = (9216, 4096, 4096, 1000)


@dataclass(frozen=True)
class Network:
    """A network whose layers have drawn weights: speed and bytes do not depend on what was learned.

    Attributes:
        name: what records call it.
        build: the network.
        densities: of each layer that is pruned, as published.
        input_shape: of one sample.
    """

    name: str
    build: Callable[[], nn.Module]
    densities: Mapping[str, float]
    input_shape: tuple[int, ...]

    def pruned(self) -> nn.Module:
        """In evaluation mode; each layer's non-zeros are of 31 values, lengths of rows and columns vary as trained."""
        return self._with_weights(lambda layer, density: weight_of(layer, density, "trained"))

    def coded(self, bits: int) -> nn.Module:
        """In evaluation mode; not pruned, each layer's weights are of 2^bits values."""
        return self._with_weights(lambda layer, density: codebook.weight_of(layer, bits).to_dense())

    def samples(self, batch: int) -> Tensor:
        """What goes in, float32 [batch, *input_shape]."""
        return torch.randn(batch, *self.input_shape, generator=torch.Generator().manual_seed(1))

    def _with_weights(self, draw: Callable[[Linear, float], Tensor]) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.build().eval()
        for name, density in self.densities.items():
            weight = model.get_parameter(f"{name}.weight")
            matrix = Linear(name, weight.shape[0], math.prod(weight.shape[1:]))
            weight.data.copy_(draw(matrix, density).view_as(weight))
        return model


def _stack() -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (columns, rows) in enumerate(pairwise(STACK), 6):
        layers[f"fc{number}"] = nn.Linear(columns, rows)
        if number < 8:
            layers[f"relu{number}"] = nn.ReLU()
    return nn.Sequential(layers)


# Densities: Han, Mao, Dally, Deep Compression (2016), tables 2 to 4.
LENET_300_100 = Network("LeNet-300-100", zoo.LeNet300100, {"fc1": 0.08, "fc2": 0.09, "fc3": 0.26}, (784,))
LENET_5 = Network("LeNet-5", zoo.LeNet5, {"conv1": 0.66, "conv2": 0.12, "fc1": 0.08, "fc2": 0.19}, (1, 28, 28))
ALEXNET_STACK = Network("AlexNet FC stack", _stack, {"fc6": 0.09, "fc7": 0.09, "fc8": 0.25}, STACK[:1])
NETWORKS = (LENET_300_100, LENET_5, ALEXNET_STACK)
