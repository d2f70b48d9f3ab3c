"""An example of every layer and what it takes, for tests of where layers run: each of them goes through all layers."""

import torch
from torch import nn as dense

import tersetorch as tt
from tersetorch import nn

FORMATS = {"weight_format": "<2,6>", "input_format": "<3,5>", "output_format": "<6,10>"}


def linear():
    return dense.Linear(40, 12)


def conv(kind=dense.Conv2d):
    return kind(6, 8, 3, padding=1)


def pruned(module):
    module.weight.data *= torch.rand_like(module.weight) < 0.3
    return module


def shared(module):
    module.weight.data = torch.randint(9, module.weight.shape) / 8
    return module


def summed(module):
    return tt.finalize(tt.quantize.residual(module, 2, 5))


def binary(module):
    module.weight.data = module.weight.sign() / 4
    return module


LAYERS = {
    "SparseLinear": lambda: nn.SparseLinear.from_dense(pruned(linear())),
    "SparseCodebookLinear": lambda: nn.SparseCodebookLinear.from_dense(pruned(shared(linear()))),
    "SparseConv1d": lambda: nn.SparseConv1d.from_dense(pruned(conv(dense.Conv1d))),
    "SparseCodebookConv1d": lambda: nn.SparseCodebookConv1d.from_dense(pruned(shared(conv(dense.Conv1d)))),
    "SparseConv2d": lambda: nn.SparseConv2d.from_dense(pruned(conv())),
    "SparseCodebookConv2d": lambda: nn.SparseCodebookConv2d.from_dense(pruned(shared(conv()))),
    "CodebookLinear": lambda: nn.CodebookLinear.from_dense(shared(linear())),
    "CodebookConv2d": lambda: nn.CodebookConv2d.from_dense(shared(conv())),
    "CodebookEmbedding": lambda: nn.CodebookEmbedding.from_dense(shared(dense.Embedding(30, 12))),
    "ProductLinear": lambda: nn.ProductLinear.from_dense(linear()),
    "ProductConv2d": lambda: nn.ProductConv2d.from_dense(conv()),
    "ResidualLinear": lambda: nn.ResidualLinear.from_dense(summed(linear())),
    "ResidualConv2d": lambda: nn.ResidualConv2d.from_dense(summed(conv())),
    "LowRankLinear": lambda: nn.LowRankLinear.from_dense(linear(), rank=3),
    "LowRankConv2d": lambda: nn.LowRankConv2d.from_dense(conv(), rank=3),
    "ClusteredConv2d": lambda: nn.ClusteredConv2d(6, 8, 3, 2, in_clusters=3, out_clusters=2, padding=1),
    "FlattenedConv2d": lambda: nn.FlattenedConv2d(6, 8, 3, padding="same", stages=2),
    "BinaryLinear": lambda: nn.BinaryLinear.from_dense(binary(linear())),
    "BinaryConv2d": lambda: nn.BinaryConv2d.from_dense(binary(conv())),
    "SignMaxPool2d": lambda: nn.SignMaxPool2d(2, flips=torch.tensor([37])),
    "FixedPointLinear": lambda: nn.FixedPointLinear.from_dense(linear(), **FORMATS),
    "FixedPointConv2d": lambda: nn.FixedPointConv2d.from_dense(conv(), **FORMATS),
}


def build(kind, batch=3):
    """A layer in evaluation mode, always the same, and so many samples for it."""
    torch.manual_seed(0)
    return LAYERS[kind]().eval(), inputs(batch)[input_of(kind)]


def inputs(batch):
    """By name what layers take."""
    torch.manual_seed(1)
    return {
        "rows": torch.randn(batch, 40),
        "signals": torch.randn(batch, 6, 9),
        "images": torch.randn(batch, 6, 9, 9),
        "indices": torch.randint(30, (batch,)),
        "packed_images": torch.randint(-(2**63), 2**63 - 1, (batch, 9, 9, 1)),
    }


def input_of(kind):
    """The name of what this layer takes."""
    others = {"CodebookEmbedding": "indices", "SignMaxPool2d": "packed_images"}
    return others.get(kind, {"2d": "images", "1d": "signals"}.get(kind[-2:], "rows"))


def layouts(layer):
    """Those of a layer that has a choice, the plain one first; otherwise None alone."""
    if isinstance(layer, nn.CodebookLinear | nn.CodebookConv2d):
        return ["codebook", "codebook_bfloat16", "codebook_int8"]
    if not hasattr(layer, "pack"):
        return [None]
    return list(dict.fromkeys((getattr(layer, "plain_layout", None), *getattr(layer, "layouts", {}))))


# Layers whose arithmetic is chosen when they are made.
OTHER_MODES = [
    ("ProductLinear", lambda: nn.ProductLinear.from_dense(linear(), mode="int8")),
    ("ResidualLinear", lambda: nn.ResidualLinear.from_dense(summed(linear()), mode="int8")),
    *(("BinaryLinear", lambda i=i: nn.BinaryLinear.from_dense(binary(linear()), inputs=i)) for i in ("real", "pixels")),
    *(("BinaryConv2d", lambda i=i: nn.BinaryConv2d.from_dense(binary(conv()), inputs=i)) for i in ("real", "pixels")),
]


class EveryLayer(dense.Module):
    """All layers in all of their layouts and modes: takes inputs() by position, returns an output of each."""

    def __init__(self):
        super().__init__()
        self.kinds, self.layers = [], dense.ModuleList()
        for kind in LAYERS:
            for layout in layouts(build(kind)[0]):
                layer = build(kind)[0]
                self.kinds.append(kind)
                self.layers.append(layer if layout is None else layer.pack(layout))
        for kind, make in OTHER_MODES:
            self.kinds.append(kind)
            self.layers.append(make())
        self.eval()

    def forward(self, rows, signals, images, indices, packed_images):
        given = dict(zip(inputs(1), (rows, signals, images, indices, packed_images), strict=True))
        return [layer(given[input_of(kind)]) for kind, layer in zip(self.kinds, self.layers, strict=True)]
