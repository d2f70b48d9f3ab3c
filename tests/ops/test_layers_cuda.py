"""Every layer on a CUDA device, in each layout: without gradients a graph can record its call."""

import contextlib
import os

import pytest
import torch
from torch import nn as dense

from tersetorch import nn

PRETEND = "TERSETORCH_PRETEND_CUDA" in os.environ
FORMATS = {"weight_format": "<2,6>", "input_format": "<3,5>", "output_format": "<6,10>"}
pytestmark = pytest.mark.parametrize("device", ["forward"], indirect=True)


def linear():
    return dense.Linear(40, 12)


def conv():
    return dense.Conv2d(6, 8, 3, padding=1)


def pruned(module):
    module.weight.data *= torch.rand_like(module.weight) < 0.3
    return module


def shared(module):
    module.weight.data = torch.randint(9, module.weight.shape) / 8
    return module


def binary(module):
    module.weight.data = module.weight.sign() / 4
    return module


LAYERS = {
    "SparseLinear": lambda: nn.SparseLinear.from_dense(pruned(linear())),
    "SparseCodebookLinear": lambda: nn.SparseCodebookLinear.from_dense(pruned(shared(linear()))),
    "SparseConv2d": lambda: nn.SparseConv2d.from_dense(pruned(conv())),
    "SparseCodebookConv2d": lambda: nn.SparseCodebookConv2d.from_dense(pruned(shared(conv()))),
    "CodebookLinear": lambda: nn.CodebookLinear.from_dense(shared(linear())),
    "CodebookConv2d": lambda: nn.CodebookConv2d.from_dense(shared(conv())),
    "CodebookEmbedding": lambda: nn.CodebookEmbedding.from_dense(shared(dense.Embedding(30, 12))),
    "ProductLinear": lambda: nn.ProductLinear.from_dense(linear()),
    "LowRankLinear": lambda: nn.LowRankLinear.from_dense(linear(), rank=3),
    "LowRankConv2d": lambda: nn.LowRankConv2d.from_dense(conv(), rank=3),
    "FlattenedConv2d": lambda: nn.FlattenedConv2d(6, 8, 3, padding="same", stages=2),
    "BinaryLinear": lambda: nn.BinaryLinear.from_dense(binary(linear())),
    "BinaryConv2d": lambda: nn.BinaryConv2d.from_dense(binary(conv())),
    "FixedPointLinear": lambda: nn.FixedPointLinear.from_dense(linear(), **FORMATS),
    "FixedPointConv2d": lambda: nn.FixedPointConv2d.from_dense(conv(), **FORMATS),
}


def layouts(layer):
    """Those of a layer that has a choice; the chain of a flattened one is PyTorch's own convolutions."""
    names = dict.fromkeys((getattr(layer, "plain_layout", None), *getattr(layer, "layouts", {})))
    return [name for name in names if name != "chain"] if hasattr(layer, "pack") else [None]


@pytest.mark.parametrize("kind", LAYERS)
def test_a_graph_can_record_it_in_every_layout(request, device, kind):
    torch.manual_seed(0)
    layer = LAYERS[kind]().eval()
    x = torch.randn(2, 6, 9, 9) if kind.endswith("2d") else torch.randn(5, 40)
    if kind == "CodebookEmbedding":
        x = torch.randint(30, (5,))
    recording = request.getfixturevalue("emulator").forbid_waiting if PRETEND else contextlib.nullcontext
    for layout in layouts(layer):
        with torch.no_grad():
            want = layer.cpu()(x)
            layer.to(device)
            if layout is not None:
                layer.pack(layout)
            moved = x.to(device)
            layer(moved)
            with recording():
                y = layer(moved)
        torch.testing.assert_close(y.cpu(), want, rtol=0.05, atol=0.05)
