"""Models and checks that the storage tests share."""

import numpy as np
import pytest
import torch
from torch import nn

from tersetorch.nn import SparseCodebookLinear, SparseLinear
from tersetorch.storage import inspect, load, save

SUMMING = (nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


def bits_of(tensor):
    """Bit patterns, so that NaN equals NaN and -0.0 differs from 0.0."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return real.detach().contiguous().reshape(-1).view(integers[real.element_size()]).numpy()


def pruned(shape, density, seed=0, levels=None):
    """A weight with this share of non-zeros, of at most 2 * levels + 1 values where levels is given."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    if levels:
        weight = (weight.clamp(-2, 2) * levels / 2).round() / levels
    return torch.where(torch.rand(shape, generator=generator) < density, weight, 0)


def prune_(layer, density, seed=0, levels=None):
    """Prunes a layer's weight in place and returns the layer."""
    with torch.no_grad():
        layer.weight.copy_(pruned(layer.weight.shape, density, seed, levels))
    return layer


@pytest.fixture
def same_bits():
    """Asserts that two tensors have the same dtype, shape, strides and bits."""

    def check(a, b):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        np.testing.assert_array_equal(bits_of(a), bits_of(b))

    return check


@pytest.fixture
def same_state(same_bits):
    """Asserts that two models agree in everything that a file keeps."""

    def check(a, b):
        for (name, one), (other_name, other) in zip(a.named_modules(), b.named_modules(), strict=True):
            assert (name, type(one), one.training) == (other_name, type(other), other.training)
        state, other_state = a.state_dict(keep_vars=True), b.state_dict(keep_vars=True)
        assert list(state) == list(other_state)
        exact = {
            parameter for m in a.modules() if not isinstance(m, SUMMING) for parameter in m.parameters(recurse=False)
        }
        for name, tensor in state.items():
            weight = isinstance(tensor, nn.Parameter) and tensor.dim() > 1 and tensor.is_floating_point()
            # The sign of a zero is not kept in a weight that only enters sums.
            summed = weight and tensor not in exact
            same_bits(torch.where(tensor == 0, 0, tensor).detach() if summed else tensor, other_state[name])
            assert tensor.requires_grad == other_state[name].requires_grad, name
            assert isinstance(tensor, nn.Parameter) == isinstance(other_state[name], nn.Parameter), name
        tied = {(n, m) for n, t in state.items() for m, u in state.items() if t is u}
        assert tied == {(n, m) for n, t in other_state.items() for m, u in other_state.items() if t is u}

    return check


@pytest.fixture
def round_trip(tmp_path, same_state):
    """Saves and loads a model, checks state, outputs and the sum of the bytes, and returns what was loaded."""

    def run(module, *inputs, model=None):
        path = tmp_path / "model.terse"
        save(module, path)
        loaded = load(path, model=model)
        same_state(module, loaded)
        if inputs:
            module.eval()
            loaded.eval()
            with torch.no_grad():
                expected, found = module(*inputs), loaded(*inputs)
            for one, other in zip(_flat(expected), _flat(found), strict=True):
                np.testing.assert_array_equal(bits_of(one), bits_of(other))
        inspection = inspect(path)
        assert sum(inspection.parts.values()) == path.stat().st_size == inspection.file_bytes
        return loaded

    return run


@pytest.fixture
def small_model():
    """Every form of tensor and both sparse layers in a file of about a kilobyte."""
    first = prune_(nn.Linear(24, 16), 0.2, seed=1)
    second = prune_(nn.Linear(16, 12), 0.3, seed=2, levels=3)
    third = prune_(nn.Linear(12, 40), 0.9, seed=3, levels=2)
    model = nn.Sequential(
        SparseLinear.from_dense(first), nn.ReLU(), SparseCodebookLinear.from_dense(second), nn.Tanh(), third
    )
    with torch.no_grad():
        for seed, layer in enumerate(model[::2]):
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=torch.Generator().manual_seed(seed)))
    return model.eval()


def _flat(outputs):
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [tensor for output in outputs for tensor in _flat(output)]
