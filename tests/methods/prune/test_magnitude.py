import re

import pytest
import torch
from torch import nn

from tersetorch.methods import finalize, prune
from tersetorch.methods.parametrization import is_live


def reference_keep(weight, pruned):
    """All but the first `pruned` of a stable sort by magnitude."""
    order = weight.detach().double().abs().flatten().sort(stable=True).indices
    keep = torch.ones(weight.numel(), dtype=torch.bool)
    keep[order[:pruned]] = False
    return keep.view(weight.shape)


def linear(outputs, inputs, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (13, 31), (100, 300)])
@pytest.mark.parametrize("sparsity", [0, 0.3, 0.5, 0.9, 0.999])
def test_the_smallest_go_and_the_count_is_exact(dtype, shape, sparsity):
    model = linear(*shape, dtype)
    dense = model.weight.detach().clone()
    keep = reference_keep(dense, round(sparsity * dense.numel()))
    assert prune.magnitude(model, sparsity) is model
    assert torch.equal(model.weight, torch.where(keep, dense, 0))
    assert is_live(model)


def test_equal_magnitudes_go_in_order():
    model = linear(2, 4)
    model.weight.data = torch.tensor([[1.0, -1.0, 1.0, 2.0], [-1.0, 2.0, 1.0, 0.5]])
    prune.magnitude(model, 4 / 8)
    assert model.weight.tolist() == [[0, 0, 0, 2], [-1, 2, 1, 0]]


def test_a_layer_without_weights_is_left_as_it_is():
    model = nn.Sequential(nn.Linear(0, 3), nn.Linear(3, 0))
    prune.magnitude(model, 0.5)
    prune.magnitude(model, 0.5, scope="global")
    prune.magnitude(model, threshold_std=1.0)
    assert model(torch.ones(2, 0)).shape == (2, 0)


def test_convolutions_of_every_dimension_and_layout():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Conv1d(2, 3, 3), nn.Conv2d(4, 6, 3, groups=2), nn.Conv3d(2, 2, 2)])
    model[1].to(memory_format=torch.channels_last)
    dense = [layer.weight.detach().clone() for layer in model]
    prune.magnitude(model, 0.5)
    for layer, weight in zip(model, dense, strict=True):
        assert torch.equal(layer.weight, torch.where(reference_keep(weight, weight.numel() // 2), weight, 0))


def test_global_scope_ranks_all_layers_together(mlp):
    flat = torch.cat([mlp[0].weight.detach().flatten(), mlp[2].weight.detach().flatten()])
    keep = reference_keep(flat, round(0.8 * len(flat)))
    prune.magnitude(mlp, 0.8, scope="global")
    mask = torch.cat([mlp[0].weight.flatten() != 0, mlp[2].weight.flatten() != 0])
    assert torch.equal(mask, keep)


def test_a_sparsity_for_each_pattern(mlp):
    prune.magnitude(mlp, {"0": 0.9})
    assert type(mlp[2]) is nn.Linear
    prune.magnitude(mlp, {nn.Linear: 0.2, "0": 0.95})
    assert [layer.kept for layer in prune.density(mlp).values()] == [340 - 323, 85 - 17]


def test_thresholds_in_standard_deviations(mlp):
    dense = [mlp[index].weight.detach().clone() for index in (0, 2)]
    prune.magnitude(mlp, threshold_std=0.7)
    for index, weight in zip((0, 2), dense, strict=True):
        limit = 0.7 * weight.double().std(correction=0)
        assert torch.equal(mlp[index].weight, torch.where(weight.abs() < limit, 0, weight))
    # Again: of what is alive.
    alive = mlp[0].weight.detach()[mlp[0].weight != 0]
    prune.magnitude(mlp, threshold_std=0.7, targets="0")
    kept = alive[alive.abs() >= 0.7 * alive.double().std(correction=0)]
    assert torch.equal(mlp[0].weight.detach()[mlp[0].weight != 0], kept)


def test_a_global_threshold_takes_one_deviation_for_all(mlp):
    dense = [mlp[index].weight.detach().clone() for index in (0, 2)]
    limit = torch.cat([weight.flatten() for weight in dense]).double().std(correction=0)
    prune.magnitude(mlp, threshold_std=1.0, scope="global")
    for index, weight in zip((0, 2), dense, strict=True):
        assert torch.equal(mlp[index].weight, torch.where(weight.abs() < limit, 0, weight))


def test_a_constant_layer_has_no_deviation_to_prune_by():
    model = linear(3, 3)
    nn.init.constant_(model.weight, 0.5)
    prune.magnitude(model, threshold_std=5.0)
    assert int(model.weight.count_nonzero()) == 9


def test_pruning_adds_up_and_a_lower_sparsity_changes_nothing(mlp, train):
    prune.magnitude(mlp, 0.5)
    first = mlp[0].weight == 0
    train(mlp)
    prune.magnitude(mlp, 0.8)
    second = mlp[0].weight == 0
    assert int(second.sum()) == round(0.8 * 340)
    assert bool(second[first].all())
    before = mlp[0].weight.detach().clone()
    prune.magnitude(mlp, 0.3)
    assert torch.equal(mlp[0].weight, before)
    finalize(mlp)
    prune.magnitude(mlp, 0.9)
    assert int((mlp[0].weight == 0).sum()) == round(0.9 * 340)
    assert bool((mlp[0].weight == 0)[second].all())


def test_a_weight_that_is_out_of_sight_may_hold_anything(mlp):
    prune.magnitude(mlp, 0.5)
    original = mlp[0].parametrizations.weight.original
    original.data[mlp[0].weight == 0] = float("nan")
    prune.magnitude(mlp, 0.8)
    finalize(mlp)
    assert bool(mlp[0].weight.isfinite().all())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {},
            ValueError,
            "exactly one of sparsity, threshold_std and a pattern 'N:M' must be given, got none; pass one",
        ),
        ({"sparsity": 0.5, "threshold_std": 1.0}, ValueError, "exactly one of .* got sparsity and threshold_std"),
        ({"sparsity": 0.5, "pattern": "1:2"}, ValueError, "exactly one of .* got sparsity and a pattern 'N:M'"),
        ({"pattern": "4x1"}, ValueError, "exactly one of .* got none"),
        ({"threshold_std": 1.0, "pattern": "4x1"}, ValueError, "pattern must be left out where threshold_std is given"),
        ({"pattern": "1:2", "scope": "global"}, ValueError, "scope must be 'layer' where the pattern is N:M"),
        ({"pattern": "2:4", "targets": "2"}, ValueError, "pattern 2:4 must divide the input channels, got 17 of '2'"),
        ({"sparsity": 1.0}, ValueError, "sparsity must be in [0, 1), got 1.0; pass a number in that range"),
        ({"sparsity": -0.1}, ValueError, "sparsity must be in [0, 1), got -0.1"),
        ({"sparsity": float("nan")}, ValueError, "sparsity must be in [0, 1), got nan"),
        ({"sparsity": "0.5"}, TypeError, "sparsity must be a number, got '0.5'"),
        ({"sparsity": True}, TypeError, "sparsity must be a number, got True"),
        ({"sparsity": {"0": 2}}, ValueError, "sparsity['0'] must be in [0, 1), got 2"),
        ({"sparsity": {}}, ValueError, "sparsity must name at least one layer"),
        ({"sparsity": {"fc": 0.5}}, ValueError, "sparsity must match weights of two or more dimensions, got 'fc'"),
        ({"sparsity": {"0": 0.5}, "targets": "0"}, ValueError, "sparsity must be one number where targets"),
        ({"sparsity": {"0": 0.5}, "scope": "global"}, ValueError, 'sparsity must be one number where scope="global"'),
        ({"threshold_std": -1}, ValueError, "threshold_std must be finite and at least 0, got -1"),
        ({"threshold_std": float("inf")}, ValueError, "threshold_std must be finite and at least 0, got inf"),
        ({"sparsity": 0.5, "scope": "model"}, ValueError, "scope must be one of layer, global, got 'model'"),
        ({"sparsity": 0.5, "targets": "fc"}, ValueError, "targets must match"),
    ],
)
def test_bad_arguments_are_refused_and_change_nothing(mlp, arguments, error, message):
    before = mlp[0].weight.detach().clone()
    if not message.startswith("exactly"):
        message = re.escape(message)
    with pytest.raises(error, match=f"prune.magnitude: {message}"):
        prune.magnitude(mlp, **arguments)
    assert not is_live(mlp)
    assert torch.equal(mlp[0].weight, before)
