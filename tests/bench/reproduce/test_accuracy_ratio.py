import json

import pytest
import torch
from torch import nn

from tersetorch.bench.reproduce import accuracy_ratio
from tersetorch.bench.reproduce.accuracy_ratio import CURVES, Plan, draw, run, table
from tersetorch.bench.reproduce.runs import How
from tersetorch.recipes.deep_compression import Training
from tersetorch.zoo import LeNet300100, load


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def record(monkeypatch):
    def small(name, seed):
        return load("digits", seed=seed)

    short = Training(epochs=4, lr=0.1)
    share = Training(epochs=1, lr=3e-4, optimizer="adam")
    plan = Plan(Training(epochs=6, lr=0.1), (0.5, 0.05), (4, 1), (0.5, 0.1), short, Training(epochs=2, lr=0.02), share)
    monkeypatch.setattr(accuracy_ratio, "BATCH", 32)
    monkeypatch.setattr(accuracy_ratio, "load_data", small)
    monkeypatch.setattr(accuracy_ratio, "full_plan", lambda: plan)
    monkeypatch.setattr(accuracy_ratio, "train_dense", dense)
    return run(How([0, 1]))


def dense(network, training, batch_size, data, seed, progress):
    torch.manual_seed(seed)
    model = LeNet300100(data.in_features, data.classes)
    accuracy_ratio.train(model, training, data, batch_size, seed, progress, "")
    return model


def test_the_curves_are_whole(record, tmp_path):
    json.dumps(record)
    for row in record["seeds"]:
        assert row["bytes"] == 4 * sum(p.numel() for p in LeNet300100(64).parameters())
        assert set(row["curves"]) == set(CURVES)
        for curve, points in row["curves"].items():
            assert len(points) == 2
            assert all(0 < coded < fixed + 1_500 and fixed < row["bytes"] for _, fixed, coded, _ in points), curve
            assert points[1][1] < points[0][1] and points[1][2] < points[0][2]
        # Codes of 4 bits in fixed width, 16 values and the biases of float32.
        weights = 300 * 64 + 30_000 + 1_000
        assert row["curves"]["share"][0][1] == weights / 2 + 4 * (3 * 16 + 410)
    shown = table(record)
    assert len(shown.rows) == 2 * len(CURVES)
    draw(record, tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").read_text().count("</svg>") == 1


def test_factors_multiply_to_the_nearest_matrix_of_their_rank():
    torch.manual_seed(0)
    model = LeNet300100()
    weight, bias = model.fc1.weight.detach().clone(), model.fc1.bias
    factored = accuracy_ratio._factored(model, 0.1)
    first, second = factored.fc1
    rank = int(0.1 * 300 * 784 / 1084)
    assert first.weight.shape == (rank, 784) and first.bias is None and second.bias is bias
    lost = torch.linalg.matrix_norm(second.weight @ first.weight - weight) ** 2
    assert float(lost.detach()) == pytest.approx(float(torch.linalg.svdvals(weight)[rank:].square().sum()), rel=1e-4)
    assert factored(torch.rand(3, 784)).shape == (3, 10)


def test_bytes_without_entropy_coding_follow_the_paper():
    # Entries at 2, 3 and 22 (EIE's column): gaps 2, 0, 18; 18 fits into 5 bits.
    layer = nn.Linear(40, 1, bias=False)
    layer.weight = nn.Parameter(torch.zeros(1, 40).index_fill_(1, torch.tensor([2, 3, 22]), 1.0))
    assert accuracy_ratio._fixed(layer, None) == 3 * (32 + 5) / 8
    assert accuracy_ratio._fixed(layer, 4) == 3 * (4 + 5) / 8 + 4 * 2
