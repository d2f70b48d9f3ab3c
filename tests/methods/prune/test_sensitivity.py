import copy
import json
import math

import pytest
import torch
from rich.progress import Progress

from tersetorch.methods import prune
from tersetorch.methods.parametrization import is_live
from tersetorch.methods.prune import Sensitivity


def size_left(model):
    """A score that each layer's pruning lowers by what it takes away."""
    return sum(float(model[index].weight.detach().abs().sum()) for index in (0, 2))


def test_each_layer_alone_at_each_sparsity(mlp):
    before = copy.deepcopy(mlp.state_dict())
    found = prune.sensitivity(mlp, size_left, (0.5, 0.9))
    assert found.baseline == size_left(mlp)
    assert list(found.layers) == ["0", "2"]
    for name, scores in found.layers.items():
        for sparsity, score in scores.items():
            assert score == size_left(prune.magnitude(copy.deepcopy(mlp), sparsity, targets=name))
        assert list(scores) == [0.5, 0.9]
    assert not is_live(mlp)
    assert all(torch.equal(tensor, before[name]) for name, tensor in mlp.state_dict().items())


def test_a_pruned_model_is_scanned_from_where_it_stands(mlp):
    prune.magnitude(mlp, {"0": 0.8})
    mlp(torch.randn(3, 20)).sum().backward()
    found = prune.sensitivity(mlp, size_left, (0.5, 0.9), targets="0")
    assert found.layers["0"][0.5] == found.baseline > found.layers["0"][0.9]


def test_evaluate_may_change_what_it_is_given(mlp):
    def spoil(model):
        value = size_left(model)
        model[0].weight.data.zero_()
        return value

    assert prune.sensitivity(mlp, spoil, (0.5,)) == prune.sensitivity(mlp, size_left, (0.5,))


def test_an_interrupted_scan_goes_on(mlp):
    stored = []
    calls = []

    def evaluate(model):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return size_left(model)

    with pytest.raises(KeyboardInterrupt):
        prune.sensitivity(mlp, evaluate, (0.5, 0.9), on_score=stored.append)
    assert len(stored) == 3
    known = Sensitivity.from_dict(json.loads(json.dumps(stored[-1].to_dict())))
    assert known == stored[-1]
    calls.clear()
    whole = prune.sensitivity(mlp, size_left, (0.5, 0.9))
    assert prune.sensitivity(mlp, lambda model: calls.append(1) or size_left(model), (0.5, 0.9), known=known) == whole
    assert len(calls) == 2


def test_blocks(mlp):
    seen = []

    def evaluate(model):
        seen.append((model[0].weight.detach().unflatten(1, (5, 4)) == 0).sum(-1).unique().tolist())
        return 0.0

    prune.sensitivity(mlp, evaluate, (0.5,), pattern="1x4", targets="0")
    assert seen == [[0], [0, 4]]


def test_the_largest_sparsity_up_to_a_drop():
    found = Sensitivity(
        0.9,
        {
            "a": {0.5: 0.9, 0.7: 0.89, 0.9: 0.5},
            "b": {0.5: 0.8, 0.7: 0.95},
            "c": {0.5: 0.9, 0.9: math.nan},
            "d": {},
        },
    )
    assert found.sparsities(0.02) == {"a": 0.7, "b": 0.0, "c": 0.5, "d": 0.0}
    assert found.sparsities(1)["a"] == 0.9
    with pytest.raises(ValueError, match=r"max_drop must be finite and at least 0, got -1"):
        found.sparsities(-1)


def test_it_shows_progress(mlp):
    with Progress(disable=True) as progress:
        prune.sensitivity(mlp, size_left, (0.5, 0.9), progress=progress)
        assert [(task.completed, task.total) for task in progress.tasks] == [(5, 5)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"evaluate": 3}, TypeError, "evaluate must be callable, got int"),
        ({"evaluate": lambda model: None}, TypeError, "evaluate must give a number, got NoneType"),
        ({"sparsities": 0.5}, TypeError, "sparsities must be a list, got float"),
        ({"sparsities": []}, ValueError, "sparsities must hold at least one"),
        ({"sparsities": [1.2]}, ValueError, r"sparsities must be in \[0, 1\), got 1.2"),
        ({"targets": "fc"}, ValueError, "targets must match"),
        ({"pattern": "2:4"}, ValueError, "pattern must be None or 'RxC'"),
    ],
)
def test_bad_arguments_are_refused(mlp, arguments, error, message):
    with pytest.raises(error, match=f"prune.sensitivity: {message}"):
        prune.sensitivity(mlp, **{"evaluate": size_left, **arguments})
    assert not is_live(mlp)


@pytest.mark.parametrize("record", [None, {}, {"baseline": 1, "layers": 3}, {"baseline": "x", "layers": {}}])
def test_a_record_of_something_else_is_refused(record):
    with pytest.raises(ValueError, match="record must be what to_dict gave"):
        Sensitivity.from_dict(record)
