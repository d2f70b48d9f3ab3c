import copy
import math
import pickle
import re

import pytest
import torch
from torch import nn

from tersetorch.methods import finalize, prune


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(20, 20),
        nn.Dropout(0.5),
        nn.ReLU(),
        nn.Linear(20, 20),
        nn.Dropout(0.4),
        nn.BatchNorm1d(20),
        nn.AlphaDropout(0.2),
        nn.Linear(20, 10),
        nn.Dropout(0.3),
    )


def rates(model):
    return [module.p for module in model if isinstance(module, nn.Dropout | nn.AlphaDropout)]


def test_the_papers_rule():
    assert prune.dropout_rate(0.5, 25, 100) == 0.25
    assert prune.dropout_rate(0.5, 100, 100) == 0.5
    assert prune.dropout_rate(1.0, 0, 1) == 0.0


def test_each_dropout_goes_by_the_next_layer(net):
    prune.magnitude(net, {"0": 0.99, "3": 0.75, "7": 0.5})
    assert prune.rescale_dropout(net) is net
    assert rates(net) == pytest.approx([0.25, 0.4 * math.sqrt(0.5), 0.2 * math.sqrt(0.5), 0.3])


def test_it_is_idempotent_and_starts_from_the_dense_rate(net):
    dense = rates(net)
    prune.rescale_dropout(net)
    assert rates(net) == dense
    prune.magnitude(net, 0.75)
    for _ in range(3):
        prune.rescale_dropout(net)
        assert rates(net)[:3] == pytest.approx([0.25, 0.2, 0.1])
    net = pickle.loads(pickle.dumps(finalize(copy.deepcopy(net))))
    assert rates(net)[:3] == pytest.approx([0.25, 0.2, 0.1])
    prune.magnitude(net, 0.91)
    prune.rescale_dropout(net)
    assert rates(net)[:3] == pytest.approx([0.15, 0.12, 0.06])


def test_a_rate_set_by_hand_is_a_new_dense_rate(net):
    prune.magnitude(net, 0.75)
    prune.rescale_dropout(net)
    net[1].p = 0.8
    prune.rescale_dropout(net)
    prune.rescale_dropout(net)
    assert rates(net)[:2] == pytest.approx([0.4, 0.2])


def test_told_pairs_only(net):
    prune.magnitude(net, {"0": 0.75})
    prune.rescale_dropout(net, {"4": "0", "8": "0"})
    assert rates(net) == pytest.approx([0.5, 0.2, 0.2, 0.15])


def test_models_without_dropout_or_without_layers_after_it(mlp):
    prune.rescale_dropout(mlp)
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    prune.rescale_dropout(prune.magnitude(model, 0.5))
    assert model[1].p == 0.5
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(0, 3))
    prune.rescale_dropout(model)
    assert model[0].p == 0.5


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        (3, TypeError, "pairs must be a mapping, got int"),
        ({}, ValueError, "pairs must name at least one dropout"),
        ({"drop": "0"}, ValueError, "pairs must name dropout modules, got 'drop'; the model has ['1', '4', '6', '8']"),
        ({"0": "0"}, TypeError, "pairs must name dropout modules, got '0', a Linear"),
        ({"1": "fc"}, ValueError, "got 'fc', which matches none"),
        ({"1": "*"}, ValueError, "pairs['1'] must match one weight, got 0, 3, 7"),
        ({"1": "0", "4": "fc"}, ValueError, "got 'fc', which matches none"),
    ],
)
def test_bad_pairs_are_refused_and_change_nothing(net, pairs, error, message):
    prune.magnitude(net, 0.75)
    before = rates(net)
    with pytest.raises(error, match=f"prune.rescale_dropout: .*{re.escape(message)}"):
        prune.rescale_dropout(net, pairs)
    assert rates(net) == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1.5, 1, 2), ValueError, "rate must be"),
        ((float("nan"), 1, 2), ValueError, "rate must be"),
        (("0.5", 1, 2), TypeError, "rate must be a number"),
        ((0.5, 3, 2), ValueError, "kept must be from 0 to 2, got 3"),
        ((0.5, -1, 2), ValueError, "kept must be from 0 to 2, got -1"),
        ((0.5, 0, 0), ValueError, "original must be at least 1, got 0"),
    ],
)
def test_bad_rates_are_refused(arguments, error, message):
    with pytest.raises(error, match=f"prune.dropout_rate: {message}"):
        prune.dropout_rate(*arguments)
