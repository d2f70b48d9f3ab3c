import json

import pytest
import torch

from tersetorch.bench.reproduce import han, trade_off
from tersetorch.bench.reproduce.runs import How
from tersetorch.recipes.deep_compression import Training
from tersetorch.zoo import LeNet5, LeNet300100, load


@pytest.fixture(autouse=True)
def digits(monkeypatch):
    def small(name, seed):
        return load("digits", seed=seed)

    monkeypatch.setattr(han, "load_data", small)
    monkeypatch.setattr(trade_off, "load_data", small)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_row_is_whole_and_as_sparse_as_planned(monkeypatch):
    short = Training(epochs=6, lr=0.1)
    plan = han.Plan(32, short, {"fc1": 0.08, "fc2": 0.09, "fc3": 0.26}, 2, short, short)
    monkeypatch.setattr(han, "full_plan", lambda network: plan)
    record = han.run("lenet_300_100", How([0]))
    json.dumps(record)
    (row,) = record["seeds"]
    assert [row["layers"][name][1] for name in ("fc1", "fc2", "fc3")] == pytest.approx([8, 9, 26], abs=0.05)
    assert all(kept * 1.0001 >= operations for _, kept, operations in row["layers"].values())
    assert row["error_rise"] == pytest.approx(row["error_pruned"] - row["error_dense"])
    assert row["ratio"] > 10 and row["error_pruned"] < 15
    text = [str(cell) for column in han.table(record).columns for cell in column.cells]
    assert {"paper", "seed 0", "mean", "worst", "1.64 %", f"{row['error_pruned']:.2f} %"} <= set(text)


def test_the_curves(monkeypatch):
    record = trade_off.run(How([0], quick=True))
    json.dumps(record)
    curves = record["seeds"][0]["curves"]
    assert set(curves) == set(trade_off.CURVES)
    assert all([point[0] for point in curve] == [0.5, 0.9] for curve in curves.values())
    assert len(trade_off.table(record).rows) == 2


@pytest.mark.parametrize("network", ["lenet_300_100", "lenet_5"])
def test_the_plans_reach_the_papers_ratio(network):
    made = LeNet300100() if network == "lenet_300_100" else LeNet5()
    kept = {f"{name}.weight": part for name, part in han.full_plan(network).kept.items()}
    left = sum(kept.get(name, 1.0) * tensor.numel() for name, tensor in made.named_parameters())
    assert set(kept) < {name for name, _ in made.named_parameters()}
    assert sum(tensor.numel() for tensor in made.parameters()) / left > 12
