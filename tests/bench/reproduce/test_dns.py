import dataclasses
import json

import pytest
import torch
from torch.nn import functional

from tersetorch.bench.reproduce import dns
from tersetorch.bench.reproduce.dns import PAPER, Cut, Plan
from tersetorch.bench.reproduce.runs import How
from tersetorch.recipes.deep_compression import Training
from tersetorch.zoo import load


@pytest.fixture(autouse=True)
def small_digits(monkeypatch):
    """A part of the digits, of MNIST's size."""

    def loaded(name, seed):
        data = load("digits", seed=seed)
        parts = {}
        for part, size in {"train": 320, "validation": 64, "test": 64}.items():
            parts[f"{part}_images"] = functional.interpolate(getattr(data, f"{part}_images")[:size], size=28)
            parts[f"{part}_labels"] = getattr(data, f"{part}_labels")[:size]
        return dataclasses.replace(data, **parts)

    monkeypatch.setattr(dns, "load_data", loaded)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("network", list(PAPER))
def test_a_row_is_whole(monkeypatch, network):
    groups = [["fc1", "fc2", "fc3"]] if network == "lenet_300_100" else [["conv1", "conv2"], ["fc1", "fc2"]]
    short = Training(epochs=2, lr=0.05)
    cuts = tuple(Cut(dict.fromkeys(group, 1.0), short) for group in groups)
    layers = PAPER[network]["layers"]
    plan = Plan(32, Training(epochs=4, lr=0.05), 1e-4, cuts, dict.fromkeys(layers, 300), short)
    monkeypatch.setattr(dns, "full_plan", lambda network: plan)
    record = dns.run(network, How([0]))
    json.dumps(record)
    assert record["reproduction"] == f"dns_{network}"
    (row,) = record["seeds"]
    assert row["layers"].keys() == layers.keys()
    assert all(weights <= 300 for weights, _ in row["layers"].values())
    assert row["nonzeros"] == sum(map(sum, row["layers"].values()))
    assert row["ratio"] == PAPER[network]["parameters"] / row["nonzeros"] > 100
    assert row["validation"]["dense"] < 50
    assert row["error_rise"] == pytest.approx(row["error_pruned"] - row["error_dense"])
    text = [str(cell) for column in dns.table(record).columns for cell in column.cells]
    assert {"paper", "seed 0", "mean", "worst", f"{row['error_pruned']:.2f} %", f"{row['nonzeros']:,}"} <= set(text)


def test_the_published_counts_are_those_of_the_released_models():
    for network in PAPER.values():
        assert sum(map(sum, network["layers"].values())) == network["nonzeros"]


@pytest.mark.parametrize("network", list(PAPER))
def test_the_plans_cut_every_layer_to_less_than_the_released_model(network):
    layers = set(PAPER[network]["layers"])
    assert dns.full_plan(network).kept.keys() == layers
    assert sum(dns.full_plan(network).kept.values()) < 0.97 * PAPER[network]["nonzeros"]
    for plan in (dns.full_plan(network), dns.quick_plan(network)):
        assert {name for cut in plan.cuts for name in cut.c_rate} == layers
    assert {cut.train.epochs for cut in plan.cuts} == {plan.dense.epochs} == {plan.last.epochs} == {1}
