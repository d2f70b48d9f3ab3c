import copy
import re

import pytest
import torch
from torch import nn

from tersetorch.methods import finalize, prune
from tersetorch.methods.parametrization import is_live


def zeros(model):
    return int((model[0].weight == 0).sum())


def curve(step, begin, end, initial, final, schedule):
    part = (step - begin) / (end - begin)
    return final + (initial - final) * ((1 - part) ** 3 if schedule == "cubic" else 1 - part)


@pytest.mark.parametrize("schedule", ["cubic", "linear"])
@pytest.mark.parametrize(("begin", "end", "frequency"), [(0, 12, 3), (2, 12, 5), (0, 7, 3), (3, 4, 10)])
def test_the_sparsity_follows_the_curve(mlp, schedule, begin, end, frequency):
    pruner = prune.GradualPruner(
        mlp,
        sparsity=0.9,
        begin_step=begin,
        end_step=end,
        frequency=frequency,
        initial_sparsity=0.2,
        schedule=schedule,
    )
    target = 0.2 if begin == 0 else 0.0
    for step in range(16):
        if step:
            pruner.step()
        if step == end or (begin <= step < end and (step - begin) % frequency == 0):
            target = curve(step, begin, end, 0.2, 0.9, schedule)
        assert pruner.sparsity == pytest.approx(target)
        assert zeros(mlp) == round(pruner.sparsity * 340)
    assert pruner.sparsity == 0.9


def test_n_calls_reach_the_end_at_n(mlp):
    pruner = prune.GradualPruner(mlp, sparsity=0.9, end_step=10, frequency=4)
    seen = []
    for _ in range(10):
        pruner.step()
        seen.append(zeros(mlp))
    assert seen == sorted(seen)
    assert len(set(seen)) == 4  # 0, and at steps 4, 8 and 10
    assert seen[-1] == 306


def test_a_sparsity_for_each_pattern_and_global_scope(make_mlp):
    model = make_mlp()
    pruner = prune.GradualPruner(model, sparsity={"0": 0.9, "2": 0.5}, end_step=2, frequency=1, schedule="linear")
    pruner.step()
    assert pruner.sparsity == {"0": pytest.approx(0.45), "2": 0.25}
    pruner.step()
    assert pruner.sparsity == {"0": 0.9, "2": 0.5}
    assert [layer.kept for layer in prune.density(model).values()] == [34, 43]
    model = make_mlp()
    pruner = prune.GradualPruner(model, sparsity=0.8, end_step=1, scope="global", ignore=[nn.ReLU])
    pruner.step()
    assert sum(layer.kept for layer in prune.density(model).values()) == 85


@pytest.mark.parametrize("optimizer_first", [False, True])
def test_a_resumed_run_gives_the_same_bits(make_mlp, train, optimizer_first):
    def begin():
        model = make_mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01) if optimizer_first else None
        pruner = prune.GradualPruner(model, sparsity=0.9, begin_step=1, end_step=9, frequency=2)
        return model, optimizer or torch.optim.Adam(model.parameters(), lr=0.01), pruner

    model, optimizer, pruner = begin()
    train(model, optimizer, steps=4, seed=1, after=pruner.step)
    states = copy.deepcopy([part.state_dict() for part in (model, optimizer, pruner)])
    train(model, optimizer, steps=8, seed=2, after=pruner.step)

    resumed, resumed_optimizer, resumed_pruner = begin()
    for part, state in zip((resumed, resumed_optimizer, resumed_pruner), states, strict=True):
        part.load_state_dict(state)
    train(resumed, resumed_optimizer, steps=8, seed=2, after=resumed_pruner.step)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), model.parameters(), strict=True))
    assert zeros(finalize(resumed)) == zeros(finalize(model)) == 306


def test_a_step_that_fails_is_not_counted(mlp):
    pruner = prune.GradualPruner(mlp, sparsity=0.9, end_step=2, frequency=1)
    good = mlp[0].parametrizations.weight.original.detach().clone()
    mlp[0].parametrizations.weight.original.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="must be finite, got NaN"):
        pruner.step()
    mlp[0].parametrizations.weight.original.data.copy_(good)
    pruner.step()
    pruner.step()
    assert zeros(mlp) == 306


def test_blocks_go_as_the_sparsity_rises(mlp):
    pruner = prune.GradualPruner(mlp, 0.9, end_step=4, frequency=1, pattern="1x4")
    for _ in range(4):
        pruner.step()
        blocks = mlp[0].weight.unflatten(1, (5, 4)) == 0
        assert torch.equal(blocks.all(-1), blocks.any(-1))
    assert int(blocks.sum()) == 304


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sparsity": 1.5}, ValueError, "sparsity must be in [0, 1), got 1.5"),
        ({"begin_step": -1}, ValueError, "begin_step must be at least 0, got -1"),
        ({"begin_step": 10}, ValueError, "end_step must be at least 11, got 10"),
        ({"end_step": 2.0}, TypeError, "end_step must be an int, got 2.0"),
        ({"frequency": 0}, ValueError, "frequency must be at least 1, got 0"),
        ({"initial_sparsity": 0.95}, ValueError, "initial_sparsity must be at most the final sparsity 0.9 of '0'"),
        ({"initial_sparsity": None}, TypeError, "initial_sparsity must be a number, got None"),
        ({"schedule": "step"}, ValueError, "schedule must be one of cubic, linear, got 'step'"),
        ({"scope": 3}, ValueError, "scope must be one of layer, global, got 3"),
        ({"targets": "fc"}, ValueError, "targets must match"),
        ({"pattern": "2:4"}, ValueError, "pattern must be None or 'RxC' where sparsity rises, got '2:4'"),
    ],
)
def test_bad_arguments_are_refused_and_change_nothing(mlp, arguments, error, message):
    with pytest.raises(error, match=f"prune.GradualPruner: {re.escape(message)}"):
        prune.GradualPruner(mlp, **{"sparsity": 0.9, "end_step": 10, **arguments})
    assert not is_live(mlp)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (3, TypeError, "state must be a dict, got int"),
        ({"steps": 3}, ValueError, r"state must hold just 'step', got \['steps'\]"),
        ({"step": "3"}, TypeError, r"state\['step'\] must be an int, got '3'"),
        ({"step": -1}, ValueError, r"state\['step'\] must be at least 0, got -1"),
    ],
)
def test_a_bad_state_is_refused(mlp, state, error, message):
    pruner = prune.GradualPruner(mlp, sparsity=0.9, end_step=10)
    with pytest.raises(error, match=message):
        pruner.load_state_dict(state)
    assert pruner.state_dict() == {"step": 0}
