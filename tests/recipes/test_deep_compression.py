import copy

import pytest
import torch
from torch import nn

from tersetorch.methods import finalize
from tersetorch.methods.parametrization import is_live
from tersetorch.recipes import DeepCompressionRecipe, deep_compression
from tersetorch.zoo import LeNet300100, error_rate, fit, load, steps_per_epoch

TRAINING = {"epochs": 1, "lr": 0.1}


def network(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Dropout(dropout), nn.Linear(30, 10))


def zeros(model):
    finished = finalize(copy.deepcopy(model))
    return [int((layer.weight == 0).sum()) for layer in finished if isinstance(layer, nn.Linear)]


def distinct(model):
    finished = finalize(copy.deepcopy(model))
    return [layer.weight.unique().numel() for layer in finished if isinstance(layer, nn.Linear)]


def ignore(model, stage):
    pass


def test_rounds_follow_the_cubic_curve_with_training_after_each():
    seen = []

    def train(model, stage):
        seen.append((stage.name, stage.round, stage.rounds, stage.training.lr, zeros(model)))

    model = network()
    recipe = {"prune": {"sparsity": 0.8, "rounds": 2, "train": TRAINING}}
    assert deep_compression(model, recipe, train) is model
    # 0.8 * (1 - 1/8) = 0.7 of 600 and 300 weights, then 0.8 of them.
    assert seen == [("prune", 1, 2, 0.1, [420, 210]), ("prune", 2, 2, 0.1, [480, 240])]
    assert is_live(model)


def test_ramp_prunes_while_training():
    seen = []

    def train(model, stage):
        for _ in range(12):
            stage.after_step()
            seen.append(zeros(model)[0])

    model = network()
    recipe = {"prune": {"sparsity": 0.5, "ramp_epochs": 2, "frequency": 1, "train": TRAINING | {"epochs": 3}}}
    deep_compression(model, recipe, train, steps_per_epoch=4)
    assert seen == sorted(seen) and 0 < seen[0] < 300
    assert seen[8:] == [300] * 4


def test_a_training_that_does_not_step_is_said():
    recipe = {"prune": {"sparsity": 0.5, "ramp_epochs": 1, "train": TRAINING}}
    with pytest.raises(ValueError, match=r"train must call stage\.after_step\(\) at least 4 times, got 0"):
        deep_compression(network(), recipe, ignore, steps_per_epoch=4)


def test_sharing_leaves_few_values_and_trains_them():
    x, y = torch.randn(64, 20), torch.randint(0, 10, (64,))

    def train(model, stage):
        assert stage.name == "share"
        before = finalize(copy.deepcopy(model))[0].weight.clone()
        fit(model, x, y, **dict(stage.training), batch_size=16)
        after = finalize(copy.deepcopy(model))[0].weight
        assert not torch.equal(before, after)
        assert torch.equal(before == 0, after == 0)

    model = network()
    deep_compression(model, {"share": {"bits": {"0": 2, "3": 3}, "train": TRAINING}}, train)
    assert distinct(model) == [4, 8]


def test_both_stages_keep_zero_among_the_values():
    model = network()
    recipe = {
        "prune": {"sparsity": {"0": 0.9, "3": 0.5}, "rounds": 1, "train": TRAINING},
        "share": {"bits": 3, "train": TRAINING},
    }
    deep_compression(model, recipe, ignore)
    assert zeros(model) == [540, 150]
    assert distinct(model) == [8, 8]


@pytest.mark.parametrize(("rule", "rate"), [(True, 0.4 * 0.25**0.5), (False, 0.4)])
def test_dropout_rule(rule, rate):
    model = network(dropout=0.4)
    plan = {"sparsity": 0.75, "rounds": 3, "dropout_rule": rule, "train": TRAINING}
    deep_compression(model, {"prune": plan}, ignore)
    assert model[2].p == pytest.approx(rate)


def test_yaml_round_trip(tmp_path):
    recipe = DeepCompressionRecipe.model_validate(
        {
            "prune": {"sparsity": {"fc1": 0.9, "fc*": 0.5}, "ramp_epochs": 2, "train": {"epochs": 3, "lr": 0.1}},
            "share": {"bits": 5, "init": "linear", "train": {"epochs": 1, "lr": 1e-4, "optimizer": "adam"}},
        }
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert DeepCompressionRecipe.from_yaml(path) == recipe
    model = network()
    path.write_text("share: {bits: 1, train: {epochs: 1, lr: 0.1}}")
    deep_compression(model, path, ignore)
    assert distinct(model) == [2, 2]


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ({}, "at least one of prune and share"),
        ({"prune": {"sparsity": 1.0, "rounds": 1, "train": TRAINING}}, r"prune\.sparsity.* less than 1, got 1.0"),
        ({"prune": {"sparsity": {"0": -0.1}, "rounds": 1, "train": TRAINING}}, "greater than or equal to 0, got -0.1"),
        ({"prune": {"sparsity": "0.5", "rounds": 1, "train": TRAINING}}, "got '0.5'"),
        ({"prune": {"sparsity": float("nan"), "rounds": 1, "train": TRAINING}}, "got nan"),
        ({"prune": {"sparsity": 0.5, "train": TRAINING}}, "exactly one of rounds and ramp_epochs"),
        ({"prune": {"sparsity": 0.5, "rounds": 1, "ramp_epochs": 1, "train": TRAINING}}, "exactly one of rounds"),
        ({"prune": {"sparsity": 0.5, "ramp_epochs": 2, "train": TRAINING}}, "ramp_epochs must be at most .* got 2"),
        ({"prune": {"sparsity": 0.5, "rounds": 0, "train": TRAINING}}, r"prune\.rounds.* got 0"),
        ({"share": {"bits": 9, "train": TRAINING}}, "less than or equal to 8, got 9"),
        ({"share": {"bits": 4}}, r"share\.train: Field required"),
        ({"share": {"bits": 4, "train": TRAINING | {"lr": 0}}}, r"share\.train\.lr: .*greater than 0, got 0"),
        ({"shear": {}}, "shear: Extra inputs are not permitted"),
    ],
)
def test_bad_recipes_are_refused_before_anything_changes(recipe, sentence):
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=sentence):
        deep_compression(model, recipe, ignore, steps_per_epoch=1)
    assert not is_live(model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("stage", ["prune", "share"])
def test_a_pattern_without_a_layer_is_refused_before_anything_changes(stage):
    model = network()
    recipe = {
        "prune": {"sparsity": {"0": 0.5} | ({"fc9": 0.5} if stage == "prune" else {}), "rounds": 1, "train": TRAINING},
        "share": {"bits": {"0": 4} | ({"fc9": 4} if stage == "share" else {}), "train": TRAINING},
    }
    with pytest.raises(ValueError, match="fc9"):
        deep_compression(model, recipe, ignore)
    assert not is_live(model)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"model": "net"}, TypeError, "model must be an nn.Module, got str"),
        ({"recipe": 3}, TypeError, "recipe must be a DeepCompressionRecipe, a mapping or the path .* got int"),
        ({"train": None}, TypeError, r"train must be callable as train\(model, stage\), got NoneType"),
        ({"steps_per_epoch": None}, ValueError, "steps_per_epoch must be at least 1 .* got None"),
        ({"steps_per_epoch": 0}, ValueError, "steps_per_epoch must be at least 1 .* got 0"),
        ({"steps_per_epoch": 1.5}, TypeError, "steps_per_epoch must be an int, got 1.5"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, sentence):
    everything = {
        "model": network(),
        "recipe": {"prune": {"sparsity": 0.5, "ramp_epochs": 1, "train": TRAINING}},
        "train": ignore,
        "steps_per_epoch": 1,
    } | arguments
    with pytest.raises(error, match=sentence):
        deep_compression(everything.pop("model"), everything.pop("recipe"), everything.pop("train"), **everything)


def test_a_missing_or_broken_file_is_said(tmp_path):
    with pytest.raises(FileNotFoundError):
        deep_compression(network(), tmp_path / "none.yaml", ignore)
    path = tmp_path / "broken.yaml"
    path.write_text("prune: [")
    with pytest.raises(ValueError, match=r"broken\.yaml must be YAML"):
        deep_compression(network(), path, ignore)
    path.write_text("just words")
    with pytest.raises(ValueError, match=r"recipe must have valid fields, got .*'just words'"):
        deep_compression(network(), path, ignore)


def test_digits_lose_little():
    data = load("digits")
    model = LeNet300100(data.in_features)
    fit(model, data.train_images, data.train_labels, epochs=15, batch_size=32)

    def train(network, stage):
        fit(
            network,
            data.train_images,
            data.train_labels,
            **dict(stage.training),
            batch_size=32,
            after_step=stage.after_step,
        )

    recipe = {
        "prune": {"sparsity": 0.8, "ramp_epochs": 8, "train": {"epochs": 15, "lr": 0.1, "weight_decay": 1e-4}},
        "share": {"bits": 4, "train": {"epochs": 3, "lr": 3e-4, "optimizer": "adam"}},
    }
    before = error_rate(model, data.test_images, data.test_labels)
    steps = steps_per_epoch(len(data.train_images), 32)
    finalize(deep_compression(model, recipe, train, steps_per_epoch=steps))
    assert before < 0.05
    assert error_rate(model, data.test_images, data.test_labels) <= before + 0.01
    for layer in (model.fc1, model.fc2, model.fc3):
        assert (layer.weight == 0).sum() == round(0.8 * layer.weight.numel())
        assert layer.weight.unique().numel() <= 16
