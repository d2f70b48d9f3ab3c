import json

import pytest
import torch

from tersetorch.bench.reproduce import lenet_300_100
from tersetorch.bench.reproduce.lenet_300_100 import ROWS, run
from tersetorch.bench.reproduce.runs import How, reproduce
from tersetorch.recipes.deep_compression import DeepCompressionRecipe, Training
from tersetorch.recipes.lenet import LeNetPlan
from tersetorch.zoo import load


@pytest.fixture(autouse=True)
def short(monkeypatch):
    recipe = {
        "prune": {"sparsity": 0.9, "ramp_epochs": 1, "train": {"epochs": 2, "lr": 0.1}},
        "share": {"bits": 3, "train": {"epochs": 1, "lr": 3e-4, "optimizer": "adam"}},
    }
    plan = LeNetPlan(32, 0.0, Training(epochs=2, lr=0.1), DeepCompressionRecipe.from_mapping(recipe))
    monkeypatch.setattr(lenet_300_100, "full_plan", lambda: plan)
    monkeypatch.setattr(lenet_300_100, "load_data", lambda name, seed: load("digits", seed=seed))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_record_is_whole_and_consistent():
    record = run(How([0, 1]))
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


def test_it_prints_and_stores(tmp_path, capsys):
    reproduce(ROWS[0], [5], record=tmp_path / "record.json")
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["seeds"][0]["seed"] == 5 and record["machine"]["threads"] == 1
    assert "paper" in capsys.readouterr().out


def test_no_seeds_are_refused():
    with pytest.raises(ValueError, match="seeds must hold at least one seed, got none"):
        run(How([]))
