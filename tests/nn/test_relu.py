"""Layers that compute the ReLU after them."""

import copy

import pytest
import torch
from torch import nn

from tersetorch.nn import (
    SparseCodebookConv1d,
    SparseCodebookConv2d,
    SparseCodebookLinear,
    SparseConv1d,
    SparseConv2d,
    SparseLinear,
)
from tersetorch.nn.layout import LAYOUTS
from tersetorch.storage.layers import config_of, make_layer


def pruned(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randint(-3, 4, parameter.shape, generator=torch.Generator().manual_seed(0)) / 4)
    return module


LINEAR = pruned(nn.Linear(40, 30))
CASES = [(kind, LINEAR, (batch, 40), layout) for kind in (SparseLinear, SparseCodebookLinear) for batch in (1, 9)
         for layout in ("csr", *LAYOUTS)] + [
    (SparseConv2d, pruned(nn.Conv2d(3, 5, 3, padding=1)), (2, 3, 7, 8), "direct"),
    (SparseCodebookConv2d, pruned(nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect")), (2, 3, 7, 8), "direct"),
    (SparseConv1d, pruned(nn.Conv1d(3, 5, 3)), (2, 3, 9), "direct"),
    (SparseCodebookConv1d, pruned(nn.Conv1d(3, 5, 3, padding="same")), (3, 9), "direct"),
]  # fmt: skip


@pytest.mark.parametrize("kind,dense,shape,layout", CASES)
def test_every_layout_computes_it(kind, dense, shape, layout):
    layer = kind.from_dense(dense).eval().pack(layout)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    plain = layer(x)
    with torch.no_grad():
        unrecorded = layer(x)
    layer.relu = True
    assert (plain < 0).any()
    assert torch.equal(layer(x), plain.relu())
    with torch.no_grad():
        assert torch.equal(layer(x), unrecorded.relu())
        assert torch.equal(copy.deepcopy(layer)(x), unrecorded.relu())
        # Without a layout.
        assert torch.equal(layer.train()(x), layer.train()(x).relu())


@pytest.mark.parametrize("kind,dense", [(SparseLinear, LINEAR), (SparseConv2d, CASES[-4][1])])
def test_it_is_of_the_layer_and_not_of_its_state(kind, dense):
    layer = kind.from_dense(dense)
    assert not layer.relu and "relu" not in repr(layer) and "relu" not in config_of(layer)
    state = set(layer.state_dict())
    layer.relu = True
    assert set(layer.state_dict()) == state
    assert "relu=True" in repr(layer)
    config = config_of(layer)
    assert config["relu"] is True
    name = f"tersetorch.{kind.__name__}"
    assert make_layer(name, layer.sparse_weight, layer.bias, config, False).relu
    assert type(layer.to_dense()) is type(dense)
    for wrong in (1, "yes", None):
        with pytest.raises(TypeError, match=f"{kind.__name__}: relu must be True or False"):
            sizes = {"kernel_size": 3} if kind is SparseConv2d else {}
            kind(layer.sparse_weight, relu=wrong, **sizes)


@pytest.mark.parametrize("kind,dense,shape", [(SparseCodebookLinear, LINEAR, (9, 40)), (SparseConv2d, *CASES[-4][1:3])])
def test_gradients_are_those_of_a_relu_after_it(kind, dense, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    after, fused = kind.from_dense(dense), kind.from_dense(dense)
    fused.relu = True
    ours = torch.autograd.grad(fused(x).square().sum(), (x, *fused.parameters()))
    want = torch.autograd.grad(after(x).relu().square().sum(), (x, *after.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(ours, want, strict=True))


def test_it_compiles():
    layer = SparseLinear.from_dense(LINEAR).eval().pack("csr16")
    layer.relu = True
    x = torch.randn(9, 40, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))
