import json

import pytest
import torch

from tersetorch.bench.reproduce import optimal_brain_damage as row
from tersetorch.bench.reproduce.runs import How
from tersetorch.methods import prune
from tersetorch.zoo import load


@pytest.fixture(autouse=True)
def digits(monkeypatch):
    """The 8 x 8 digits, enlarged to the network's 28 x 28, in the place of MNIST."""

    def small(name, seed):
        data = load("digits", seed=seed)
        for part in ("train", "validation", "test"):
            large = torch.nn.functional.interpolate(getattr(data, f"{part}_images")[:300], size=28)
            object.__setattr__(data, f"{part}_images", large)
            object.__setattr__(data, f"{part}_labels", getattr(data, f"{part}_labels")[:300])
        return data

    monkeypatch.setattr(row, "load_data", small)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_network_has_the_papers_parameters():
    net = row.Net()
    assert sum(parameter.numel() for parameter in net.parameters()) == row.PAPER["parameters"]
    assert sum(layer.total for layer in prune.density(net).values()) == 2520
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_the_curves_are_whole_and_every_point_is_as_sparse_as_it_says(monkeypatch):
    monkeypatch.setattr(row, "STEP", 0.15)
    record = row.run(How([3], quick=True))
    json.dumps(record)
    (seed,) = record["seeds"]
    for kind, parts in (("without", [0.15, 0.3, 0.45, 0.6, 0.75, 0.9]), ("with", [0.1 * i for i in range(1, 10)])):
        for method in row.METHODS:
            curve = seed["curves"][kind][method]
            assert curve["deleted"] == pytest.approx(parts)
            assert len(curve["train_error"]) == len(curve["validation_error"]) == len(parts)
    predicted = seed["curves"]["without"]["saliency"]["predicted_error"]
    assert predicted == sorted(predicted) and predicted[0] >= seed["dense"]["train_error"] - 1e-5
    assert set(seed["test"]) == {"dense", "not_retrained", *(f"retrained_{method}" for method in row.METHODS)}
    assert all(record["mean"][claim] == seed[claim] for claim in row.CLAIMS)
    shown = row.table(record)
    assert len(shown.rows) == 1 + 6 + len(row.CLAIMS)


def test_deletions_add_up_and_rank_all_layers_together():
    torch.manual_seed(0)
    net = row.Net()
    weights = {name: layer for name, layer in net.named_modules() if hasattr(layer, "weight")}
    scores = {name: torch.rand(layer.weight.shape) for name, layer in weights.items()}
    row._delete(net, scores, 0.3)
    limit = torch.cat([score.flatten() for score in scores.values()]).kthvalue(756).values
    for name, layer in weights.items():
        assert torch.equal(layer.weight == 0, scores[name] <= limit)
    row._delete(net, {name: -score for name, score in scores.items()}, 0.3)
    assert sum(layer.kept for layer in prune.density(net).values()) == 2520 - 756
