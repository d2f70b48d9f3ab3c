import pytest
import torch
from torch import nn

from tersetorch.methods import finalize, prune, quantize


def test_live_and_finalized_models_count_alike(mlp):
    dense = prune.density(mlp)
    assert list(dense) == ["0", "2"]
    assert [layer.density for layer in dense.values()] == [1.0, 1.0]
    prune.magnitude(mlp, {"0": 0.9})
    expected = {"0": prune.LayerDensity(34, 340), "2": prune.LayerDensity(85, 85)}
    assert prune.density(mlp) == expected
    assert prune.density(quantize.kmeans(mlp, 3)) == expected
    assert prune.density(finalize(mlp)) == expected
    assert prune.density(mlp, targets="0") == {"0": expected["0"]}
    assert prune.density(mlp, ignore="0") == {"2": expected["2"]}
    assert expected["0"].density == pytest.approx(0.1)


def test_edges(tied):
    assert prune.density(nn.Linear(0, 3))["weight"] == prune.LayerDensity(0, 0)
    assert prune.LayerDensity(0, 0).density == 1.0
    assert list(prune.density(tied)) == ["embedding", "inner"]
    with pytest.raises(TypeError, match=r"prune\.density: model must be a torch\.nn.Module, got Tensor"):
        prune.density(torch.ones(3))
