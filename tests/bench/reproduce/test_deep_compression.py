import dataclasses
import json

import pytest
import torch
from torch.nn import functional

from tersetorch.bench.reproduce import deep_compression
from tersetorch.bench.reproduce.deep_compression import PAPER, ROWS, run, table
from tersetorch.bench.reproduce.runs import How, reproduce
from tersetorch.recipes import lenet, trainer
from tersetorch.recipes.deep_compression import DeepCompressionRecipe, Training
from tersetorch.recipes.lenet import LeNetPlan
from tersetorch.zoo import fit as zoo_fit
from tersetorch.zoo import load


def digits(name, seed):
    return load("digits", seed=seed)


def large_digits(name, seed):
    """A part of the digits, of MNIST's size."""
    data, parts = load("digits", seed=seed), {}
    for part, size in {"train": 320, "validation": 64, "test": 64}.items():
        parts[f"{part}_images"] = functional.interpolate(getattr(data, f"{part}_images")[:size], size=28)
        parts[f"{part}_labels"] = getattr(data, f"{part}_labels")[:size]
    return dataclasses.replace(data, **parts)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    recipe = {
        "prune": {"sparsity": 0.9, "ramp_epochs": 1, "train": {"epochs": 2, "lr": 0.1}},
        "share": {"bits": 3, "train": {"epochs": 1, "lr": 3e-4, "optimizer": "adam"}},
    }
    plan = LeNetPlan(32, 0.0, Training(epochs=2, lr=0.1), DeepCompressionRecipe.from_mapping(recipe))
    monkeypatch.setattr(deep_compression, "full_plan", lambda: plan)
    monkeypatch.setattr(deep_compression, "load_data", digits)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_stopped_run_goes_on_from_its_last_training(tmp_path, monkeypatch):
    trained = []

    def fit(model, *data, epochs, description, **rest):
        trained.extend([description] * (epochs > 0))
        if stopping and description.startswith("share"):
            raise KeyboardInterrupt
        return zoo_fit(model, *data, epochs=epochs, description=description, **rest)

    monkeypatch.setattr(lenet, "fit", fit)
    monkeypatch.setattr(trainer, "fit", fit)
    row = ROWS[0]
    stopping = True
    with pytest.raises(KeyboardInterrupt):
        reproduce(row, [0], record=tmp_path / "record.json")
    stopping = False
    record = reproduce(row, [0], record=tmp_path / "record.json")
    share = "share weights and train the shared values"
    assert trained == ["train the dense network", "prune and retrain", share, share]
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]
    whole = run("lenet_300_100", How([0]))
    assert [row["file"] for row in whole["seeds"]] == [row["file"] for row in record["seeds"]]
    assert whole["mean"] == record["mean"]


def test_record_is_whole_and_consistent():
    record = run("lenet_300_100", How([0, 1]))
    json.dumps(record)
    assert record["plan"]["recipe"]["share"]["bits"] == 3
    assert [row["seed"] for row in record["seeds"]] == [0, 1]
    for row in record["seeds"]:
        assert row["ratio"] == row["bytes_dense"] / row["bytes"]
        assert row["layers"]["fc1"]["kept"] == pytest.approx(10)
        assert row["layers"]["fc1"]["bits"] == 3
        assert set(row["layers"]["fc1"]) == {"weights", *record["paper"]["layers"]["fc1"]}
        assert sum(row["file"]["parts"].values()) == row["bytes"]
    pairs = [(row["test"]["dense"], row["test"]["compressed"]) for row in record["seeds"]]
    assert record["mean"]["error_compressed"] == pytest.approx(sum(after for _, after in pairs) / 2)
    assert record["worst"]["error_rise"] == max(after - before for before, after in pairs)
    assert record["worst"]["ratio"] == min(row["ratio"] for row in record["seeds"])


def test_lenet_5_is_pruned_shared_and_stored(monkeypatch):
    monkeypatch.setattr(deep_compression, "load_data", large_digits)
    record = run("lenet_5", How([0], quick=True))
    json.dumps(record)
    (row,) = record["seeds"]
    assert record["reproduction"] == "lenet_5" and record["plan"]["recipe"]["share"]["bits"] == {"conv*": 5, "fc*": 4}
    assert row["bytes_dense"] == 4 * 431_080 and row["ratio"] == row["bytes_dense"] / row["bytes"] > 39
    kept = {name: 1 - part for name, part in record["plan"]["recipe"]["prune"]["sparsity"].items()}
    assert {name: layer["kept"] / 100 for name, layer in row["layers"].items()} == pytest.approx(kept, abs=1e-3)
    assert [layer["bits"] for layer in row["layers"].values()] == [5, 5, 4, 4]
    assert "LeNet-5 on MNIST" in table(record).title


def test_lenet_5_keeps_fewer_weights_than_the_paper():
    prune = deep_compression.lenet_5_plan().recipe.prune
    paper = PAPER["lenet_5"]["layers"]
    assert prune.sparsity.keys() == paper.keys()
    assert all(100 * (1 - part) <= paper[name]["kept"] for name, part in prune.sparsity.items())


def test_it_prints_and_stores(tmp_path, capsys):
    reproduce(ROWS[0], [5], record=tmp_path / "record.json")
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["seeds"][0]["seed"] == 5 and record["machine"]["threads"] == 1
    assert "paper" in capsys.readouterr().out


def test_no_seeds_are_refused():
    with pytest.raises(ValueError, match="seeds must hold at least one seed, got none"):
        run("lenet_300_100", How([]))
