import json
from dataclasses import replace

import pytest
import torch

from tersetorch.bench.reproduce import binary_networks
from tersetorch.bench.reproduce.binary_networks import Images, run, table
from tersetorch.bench.reproduce.binary_training import Checkpoint, Plan, Variant, train
from tersetorch.bench.reproduce.runs import How
from tersetorch.methods import finalize
from tersetorch.zoo import BinaryMLP, load


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def digits(seed):
    """Digits as bytes have them, k / 255."""
    data = load("digits", seed=seed)
    parts = (
        ((images.flatten(1) * 255).round() / 255, labels)
        for images, labels in (
            (data.train_images, data.train_labels),
            (data.validation_images, data.validation_labels),
            (data.test_images, data.test_labels),
        )
    )
    return Images(*parts)


def noise(seed):
    drawn = torch.Generator().manual_seed(seed)
    shape = (40, 3, 32, 32)
    parts = [(torch.randint(256, shape, generator=drawn) / 255, torch.arange(40) % 10) for _ in range(3)]
    return Images(*parts)


@pytest.fixture
def small(monkeypatch):
    """Both rows as small as they come."""
    monkeypatch.setattr(binary_networks, "IMAGES", {"mnist": digits, "cifar": noise})
    plans = {
        "mnist": replace(binary_networks.full_plan("mnist"), epochs=6, batch_size=50, width=64),
        "cifar": replace(binary_networks.full_plan("cifar"), epochs=1, batch_size=20, width=2),
    }
    monkeypatch.setattr(binary_networks, "full_plan", plans.__getitem__)


def test_the_mlps_learn_and_without_real_values_no_sign_turns(small):
    record = run("mnist", How([0]))
    json.dumps(record)
    (row,) = record["seeds"]
    assert row["float"] < 10 and row["connect"] < 20 and row["bnn"] < 30
    assert row["bnn_no_copy"] > row["bnn"] and row["connect_no_copy"] > row["connect"]
    changed = row["changed"]
    assert changed["float"] is None and changed["connect_no_copy"] == changed["bnn_no_copy"] == 0
    assert all(0.02 < changed[name] < 0.6 for name in ("connect", "connect_stochastic", "bnn", "bnn_shift"))
    for name, converted in row["converted"].items():
        if name in ("float", "dropout", "connect_stochastic"):
            assert converted is None
        else:
            assert converted["other_decisions"] == 0 and 8 * converted["bytes"] < converted["bytes_float32"]
    shown = table(record)
    assert shown.row_count == 9
    assert next(shown.columns[1].cells) == "1.30 ± 0.04 %" and next(shown.columns[5].cells) == "-"


def test_the_vggs_row_is_whole(small):
    record = run("cifar", How([3]))
    json.dumps(record)
    assert record["seeds"][0]["held_out"].keys() == {"float", "connect", "bnn"}
    assert record["seeds"][0]["converted"]["bnn"]["other_decisions"] == 0
    assert record["plan"]["width"] == 2 and table(record).row_count == 3


@pytest.mark.parametrize("name", ["connect_stochastic", "bnn_shift", "dropout"])
def test_a_training_that_was_cut_off_ends_as_another(name, tmp_path):
    full = binary_networks.full_plan("mnist")
    plan = replace(full, variants={name: full.variants[name]}, epochs=3, batch_size=50, width=32)
    images, labels = digits(0).train

    def result(path):
        torch.manual_seed(0)
        model = binary_networks._mlp(plan, plan.variants[name], images)
        changed = train(model, name, plan, images, labels, 0, None, Checkpoint(path, plan))
        return finalize(model.eval()).state_dict(), changed

    want, changed = result(None)
    stop = Checkpoint.keep

    def cut_off(self, name, **state):
        stop(self, name, **state)
        if state["epoch"] == 2:
            raise KeyboardInterrupt

    path = tmp_path / "notes"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoint, "keep", cut_off)
        result(path)
    assert Checkpoint(path, plan).training(name)["epoch"] == 2
    found, again = result(path)
    assert again == changed and all(torch.equal(found[key], want[key]) for key in want)


def test_notes_of_networks_that_are_done_are_taken_and_then_removed(small, tmp_path, monkeypatch):
    plan = binary_networks.full_plan("cifar")
    notes = tmp_path / "binary_cifar.json.notes"
    kept = Checkpoint(tmp_path / "binary_cifar.json.notes.3", plan)
    for name in plan.variants:
        kept.finish(name, {"held_out": 1.0, "test": 2.0, "changed": None, "converted": None})
    monkeypatch.setattr(binary_networks, "train", None)
    row = run("cifar", How([3], notes=notes))["seeds"][0]
    assert row["bnn"] == 2.0 and row["held_out"]["bnn"] == 1.0
    assert not (tmp_path / "binary_cifar.json.notes.3").exists()
    other = Checkpoint(None, replace(plan, epochs=2))
    assert other.rows == {} and other.training("bnn") is None


def test_notes_of_another_plan_are_not_taken(tmp_path):
    plan = Plan({"float": Variant("float", "float", lr=0.1)}, epochs=1, batch_size=10, fall=0.1, width=4)
    Checkpoint(tmp_path / "notes", plan).finish("float", {"test": 1.0})
    assert Checkpoint(tmp_path / "notes", plan).rows == {"float": {"test": 1.0}}
    assert Checkpoint(tmp_path / "notes", replace(plan, epochs=2)).rows == {}


def test_rounding_keeps_signs_where_changes_stay_below_one():
    images, labels = digits(0).train
    plan = Plan(
        {"bnn": Variant("BNN", "bnn", lr=1.0, keep=False)}, epochs=1, batch_size=50, fall=0.5, width=8, images=None
    )
    torch.manual_seed(0)
    model = BinaryMLP(64, width=8)
    # Adam's steps are lr times the Glorot factor here: signs turn after all.
    changed = train(model, "bnn", plan, images, labels, 0, None, Checkpoint(None, plan))
    assert changed > 0.05
    assert set(finalize(model).fc2.weight.detach().unique().tolist()) == {-1.0, 1.0}
