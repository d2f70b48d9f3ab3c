import pytest
import torch
from torch import nn

from tersetorch.costs import activation_density
from tersetorch.methods import prune
from tersetorch.nn import SparseLinear


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 2)
    )


def test_each_layer_by_what_it_is_handed(net):
    batches = [torch.randn(3, 1, 8, 8), torch.randn(2, 1, 8, 8)]
    batches[0][0] = 0
    net.train()
    found = activation_density(net, batches)
    x = torch.cat(batches)
    middle = net[:4](x)
    last = net[4:6](middle)
    for name, seen in (("0", x), ("4", middle), ("6", last)):
        assert (found[name].nonzeros, found[name].total) == (int(seen.count_nonzero()), seen.numel())
        assert found[name].density == pytest.approx(float((seen != 0).double().mean()))
    assert list(found) == ["0", "4", "6"]
    assert net.training and not net[0]._forward_pre_hooks


def test_tuples_dicts_pruned_and_sparse_layers():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = SparseLinear.from_dense(nn.Linear(4, 3))
            self.b = nn.Linear(4, 3)
            self.unused = nn.Linear(4, 3)

        def forward(self, x, y):
            return self.a(x) + self.b(input=y)

    model = Sum()
    prune.magnitude(model, 0.5, targets="b")
    found = activation_density(
        model, [(torch.ones(2, 4), torch.zeros(2, 4)), {"x": torch.ones(1, 4), "y": torch.eye(4)[:1]}]
    )
    assert {name: (each.nonzeros, each.total) for name, each in found.items()} == {
        "a": (12, 12),
        "b": (1, 12),
        "unused": (0, 0),
    }
    assert found["unused"].density == 1.0


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "data must hold at least one batch, got none"),
        (torch.ones(1, 4), TypeError, "data must hold batches, got Tensor"),
        (3, TypeError, "data must hold batches, got int"),
        ([{torch.ones(1, 4)}], TypeError, "each batch must be a tensor, a tuple of arguments or a dict"),
    ],
)
def test_bad_data_is_refused_and_leaves_no_hook(data, error, message):
    model = nn.Linear(4, 2)
    with pytest.raises(error, match=f"activation_density: {message}"):
        activation_density(model, data)
    assert not model._forward_pre_hooks and model.training


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"activation_density: model must be a torch.nn.Module, got int"):
        activation_density(3, [])
