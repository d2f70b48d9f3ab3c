import json

import pytest
import torch

from tersetorch.recipes import demo
from tersetorch.recipes.deep_compression import DeepCompressionRecipe, Training
from tersetorch.recipes.demo import compute_demo
from tersetorch.recipes.lenet import LeNetPlan
from tersetorch.storage import load

TINY = {"fc6": (40, 50, 0.09), "fc7": (40, 40, 0.09), "fc8": (10, 40, 0.25)}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    recipe = {
        "prune": {"sparsity": 0.9, "ramp_epochs": 2, "train": {"epochs": 3, "lr": 0.1}},
        "share": {"bits": 3, "train": {"epochs": 1, "lr": 3e-4, "optimizer": "adam"}},
    }
    plan = LeNetPlan(32, 0.0, Training(epochs=4, lr=0.1), DeepCompressionRecipe.from_mapping(recipe))
    monkeypatch.setattr(demo, "quick_plan", lambda data: plan)
    monkeypatch.setattr(demo, "ALEXNET", TINY)


def test_figures_are_consistent_and_repeat(tmp_path):
    figures = compute_demo(0, tmp_path / "made", data="digits")
    json.dumps(figures)
    path = tmp_path / "made" / "lenet300100.terse"
    assert figures["path"] == str(path)
    assert figures["bytes"]["terse"] == path.stat().st_size < figures["bytes"]["gzip"] < figures["bytes"]["dense"]
    assert figures["data"] == {"name": "digits", "source": "scikit-learn", "test_images": 359}
    stored = sum(int(parameter.count_nonzero()) for parameter in load(path).parameters())
    assert figures["parameters"] == {"dense": 50_610, "compressed": stored}
    rows = {(row["network"], row["layer"], row["batch"]) for row in figures["latency"]}
    lenet, alexnet = ("fc1", "fc2", "fc3", "whole"), ("fc6", "fc7", "fc8", "whole")
    assert rows == {
        (network, layer, batch)
        for network, layers in (("LeNet-300-100", lenet), ("AlexNet FC", alexnet))
        for layer in layers
        for batch in (1, 64)
    }
    for row in figures["latency"]:
        # A layer that no candidate fits is not timed.
        assert row["runs_as"] == "dense" or row["ours_ms"] < row["dense_ms"]
        assert row["layer"] != "whole" or (row["dense_ms"] > 0 and row["ours_ms"] > 0)
    weights = figures["weights"]
    assert weights["pruned"] + sum(weights["shared_counts"]) == 19_200
    assert len(weights["shared_values"]) <= 7

    again = compute_demo(0, tmp_path, data="digits")
    for key in ("error", "parameters", "bytes", "weights"):
        assert again[key] == figures[key]
    assert sum(figures["file"]["parts"].values()) == figures["bytes"]["terse"]
    assert (tmp_path / "lenet300100.terse").read_bytes() == path.read_bytes()


def test_alexnet_layers_have_the_papers_density_and_values(monkeypatch):
    monkeypatch.setattr(demo, "ALEXNET", {"fc6": (400, 500, 0.09), "fc8": (100, 400, 0.25)})
    layers = demo._alexnet_layers(0)
    assert [type(layer).__name__ for layer in layers] == ["Linear", "ReLU", "Linear"]
    for layer, kept in ((layers.fc6, 0.09), (layers.fc8, 0.25)):
        density = (layer.weight != 0).float().mean()
        assert abs(density - kept) < 0.02
        assert layer.weight[layer.weight != 0].unique().numel() == 31
    assert torch.isfinite(layers(torch.rand(3, 500))).all()


def test_unknown_data_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="name must be one of"):
        compute_demo(0, tmp_path / "never", data="cifar")
    assert not (tmp_path / "never").exists()
