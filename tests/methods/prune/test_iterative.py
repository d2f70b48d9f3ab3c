import pytest
import torch

from tersetorch.methods import prune
from tersetorch.methods.parametrization import is_live


def test_each_round_prunes_then_retrains(mlp, train):
    seen = []

    def retrain(model, index):
        seen.append((index, prune.density(model)["0"].kept))
        train(model)

    assert prune.iterative(mlp, [0.5, 0.8, 0.8, 0.9], retrain) is mlp
    assert seen == [(1, 170), (2, 68), (3, 68), (4, 34)]


def test_mappings_and_scope(mlp):
    prune.iterative(mlp, [{"0": 0.5}, {"0": 0.8, "2": 0.2}], lambda model, index: None)
    assert [layer.kept for layer in prune.density(mlp).values()] == [68, 68]
    prune.iterative(mlp, [0.9], lambda model, index: None, scope="global")
    assert sum(layer.kept for layer in prune.density(mlp).values()) == 43


def test_blocks(mlp):
    prune.iterative(mlp, [0.5, 0.8], lambda model, index: None, pattern="1x4", targets="0")
    blocks = mlp[0].weight.unflatten(1, (5, 4)) == 0
    assert torch.equal(blocks.all(-1), blocks.any(-1))
    assert int(blocks.all(-1).sum()) == 68


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sparsities": 0.5}, TypeError, "sparsities must be a list, got float"),
        ({"sparsities": []}, ValueError, "sparsities must hold at least one"),
        ({"sparsities": [0.5, 1.0]}, ValueError, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"sparsities": [0.5, 0.4]}, ValueError, "sparsities must not fall, got 0.4 after 0.5 for '0' in round 2"),
        ({"retrain": 3}, TypeError, "retrain must be callable, got int"),
        ({"targets": "fc"}, ValueError, "targets must match"),
        ({"pattern": "2:4"}, ValueError, "pattern must be None or 'RxC' where sparsity rises, got '2:4'"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_round(mlp, arguments, error, message):
    def retrain(model, index):
        pytest.fail("a round was run")

    with pytest.raises(error, match=f"prune.iterative: {message}"):
        prune.iterative(mlp, **{"sparsities": [0.5], "retrain": retrain, **arguments})
    assert not is_live(mlp)
