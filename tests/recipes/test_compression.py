import copy
import importlib
import re
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch.recipes.compression import _digest, check_fit, compress, plan_compression
from tersetorch.recipes.compression_record import CompressionRecord
from tersetorch.recipes.trainer import trainer

RECIPE = {
    "prune": {"sparsity": {"fc1": 0.8, "fc2": 0.7}, "rounds": 2, "train": {"epochs": 1, "lr": 0.05}},
    "share": {"bits": {"fc*": 4}, "train": {"epochs": 1, "lr": 0.001, "optimizer": "adam"}},
}


def recipe(**changes):
    return tt.recipes.DeepCompressionRecipe.from_mapping({**RECIPE, **changes})


@pytest.fixture(scope="module")
def digits():
    return tt.zoo.load("digits")


@pytest.fixture(scope="module")
def trained(digits):
    torch.manual_seed(0)
    layers = {"flatten": nn.Flatten(), "fc1": nn.Linear(64, 48), "relu1": nn.ReLU()}
    layers |= {"fc2": nn.Linear(48, 24), "relu2": nn.ReLU(), "fc3": nn.Linear(24, 10)}
    network = nn.Sequential(OrderedDict(layers))
    return tt.zoo.fit(network, digits.train_images, digits.train_labels, epochs=6, batch_size=32)


@pytest.fixture
def network(trained):
    return copy.deepcopy(trained)


@pytest.fixture
def train(digits):
    return trainer(digits, batch_size=32, seed=0)


def untrained(model, stage):
    """A train that changes nothing."""


def interrupt(*arguments, **named):
    raise KeyboardInterrupt


def error(model, digits):
    return 100 * tt.zoo.error_rate(model, digits.validation_images, digits.validation_labels)


def test_a_plan_names_every_change_and_makes_none(network):
    before = copy.deepcopy(network.state_dict())
    plan = plan_compression(network, recipe())
    assert [(layer.name, layer.weights, layer.sparsity, layer.bits) for layer in plan.layers] == [
        ("fc1", 48 * 64, 0.8, 4),
        ("fc2", 24 * 48, 0.7, 4),
        ("fc3", 10 * 24, 0.0, 4),
    ]
    assert plan.trainings == (
        "prune and retrain, 1 epoch",
        "prune and retrain, 1 epoch",
        "share weights and train the shared values, 1 epoch",
    )
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    limited = plan_compression(network, recipe(), limited=True)
    assert limited.file_bytes is None and {layer.sparsity for layer in limited.layers} == {None}
    assert limited.trainings[0].endswith("for each trial") and len(limited.trainings) == 2
    assert plan.to_dict()["layers"][0]["name"] == "fc1"


def test_a_plans_sizes_are_those_of_files(network, tmp_path, digits):
    plan = plan_compression(network, recipe())
    tt.save(network, tmp_path / "dense.terse")
    assert plan.dense_bytes == (tmp_path / "dense.terse").stat().st_size
    compress(network, recipe(), digits, untrained, path=tmp_path / "small.terse")
    assert plan.file_bytes == pytest.approx((tmp_path / "small.terse").stat().st_size, rel=0.01)


def test_without_limits_the_recipe_is_followed(network, digits, train, tmp_path):
    before = error(network, digits)
    record = compress(network, recipe(), digits, train, path=tmp_path / "small.terse", batch_size=32)
    assert network.fc1.weight.count_nonzero() == round(0.2 * network.fc1.weight.numel())
    assert network.fc2.weight.unique().numel() == 16 and type(network.fc1) is nn.Linear
    assert record.before.error_percent == before and record.after.error_percent == error(network, digits)
    assert record.after.file_bytes == (tmp_path / "small.terse").stat().st_size
    assert [point.label for point in record.points] == ["pruned", "shared"]
    assert CompressionRecord.read(tmp_path / "small.record.json") == record
    loaded = tt.load(tmp_path / "small.terse")
    assert torch.equal(loaded(digits.test_images), network(digits.test_images))


def test_a_budget_is_kept_and_used(network, digits, train, tmp_path):
    budget = plan_compression(network, recipe()).dense_bytes // 6
    record = compress(network, recipe(), digits, train, path=tmp_path / "small.terse", budget=budget, batch_size=32)
    assert 0.7 * budget < record.after.file_bytes <= budget
    assert (tmp_path / "small.terse").stat().st_size == record.after.file_bytes
    assert set(record.sensitivity.layers) == {"fc1", "fc2", "fc3"}


def test_a_largest_drop_takes_more_bits_until_it_holds(network, digits, tmp_path):
    """Every pruning is made to lose all, and so nothing is pruned; 1 bit loses too much."""
    plan = recipe(share={"bits": 1, "train": {"epochs": 0, "lr": 0.1}})

    def ruins_pruned(model, stage):
        if stage.name == "prune":
            with torch.no_grad():
                model.fc3.bias.add_(1000 * torch.arange(10))

    before = error(network, digits)
    record = compress(network, plan, digits, ruins_pruned, path=tmp_path / "small.terse", max_drop=2.0)
    assert [point.label for point in record.points] == ["shared"]
    assert record.after.error_percent == error(network, digits) <= before + 2.0
    assert bool(network.fc1.weight.all()) and 2 < network.fc1.weight.unique().numel() <= 256


def test_what_cannot_be_kept_leaves_no_file(network, digits, tmp_path):
    plan = recipe(share={"bits": 1, "train": {"epochs": 0, "lr": 0.1}})
    dense = plan_compression(network, plan).dense_bytes

    def ruins(model, stage):
        with torch.no_grad():
            for weight in model.parameters():
                weight.zero_()

    with pytest.raises(
        ValueError, match=r"must not rise by more than 0.5 points, half of the 1 that .* at the best of"
    ):
        compress(network, plan, digits, ruins, path=tmp_path / "a.terse", max_drop=1.0, budget=dense // 10)
    least = r"budget must be at least about \d+ bytes, what the layers take at their sparsest, and shared, got 300"
    with pytest.raises(ValueError, match=least):
        compress(network, plan, digits, untrained, path=tmp_path / "a.terse", budget=300)
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_run_goes_on_to_the_same_file(trained, digits, train, tmp_path):
    calls = []

    def counted(model, stage):
        if len(calls) == 2 and not resumed:
            raise KeyboardInterrupt
        calls.append(stage.name)
        train(model, stage)

    resumed, options = True, {"batch_size": 32}
    whole = compress(copy.deepcopy(trained), recipe(), digits, counted, path=tmp_path / "a.terse", **options)
    calls.clear()
    resumed, options = False, {**options, "folder": tmp_path / "run"}
    with pytest.raises(KeyboardInterrupt):
        compress(copy.deepcopy(trained), recipe(), digits, counted, path=tmp_path / "b.terse", **options)
    assert not (tmp_path / "b.terse").exists()
    resumed = True
    again = compress(copy.deepcopy(trained), recipe(), digits, counted, path=tmp_path / "b.terse", **options)
    assert calls == ["prune", "prune", "share"]
    assert (tmp_path / "a.terse").read_bytes() == (tmp_path / "b.terse").read_bytes()
    assert again.points == whole.points and again.before == whole.before


OBS = {"prune": {"method": "obs", "sparsity": {"fc1": 0.8, "fc2": 0.7}}, "share": {"bits": 4}}
by_obs = tt.recipes.DeepCompressionRecipe.from_mapping(OBS)


def test_obs_without_training_is_what_one_gets_by_hand(trained, network, digits, tmp_path):
    def fails(model, stage):
        raise AssertionError("nothing is to be trained")

    record = compress(network, by_obs, digits, fails, path=tmp_path / "small.terse", batch_size=64, seed=3)
    drawn = torch.randperm(len(digits.train_images), generator=torch.Generator().manual_seed(3))[:512]
    batches = digits.train_images[drawn].split(64)
    expected = tt.prune.obs(copy.deepcopy(trained), batches, {"fc1": 0.8, "fc2": 0.7}, refine=3)
    tt.finalize(tt.prune.obs(expected, batches, 0.0, bits=4, refine=3))
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in expected.state_dict().items())
    assert record.points == [] and record.after.error_percent == error(expected, digits)
    assert record.how_pruned == (
        "pruned by second derivatives, calibrated on up to 512 training examples, not retrained"
    )
    assert record.recipe["prune"]["method"] == "obs" and record.recipe["prune"]["calibration"] == 512


def test_obs_loses_less_than_magnitude_without_training(trained, digits):
    """Of all layers: 80 % pruned and 3 bits, where magnitude pruning loses much."""
    errors = {}
    for method in ("magnitude", "obs"):
        plan = {"prune": {"method": method, "sparsity": 0.8}, "share": {"bits": 3}}
        batches = digits.train_images[:512].split(128)
        model = tt.deep_compression(copy.deepcopy(trained), plan, calibration=batches)
        errors[method] = error(model, digits)
    assert errors["obs"] < errors["magnitude"] / 2


def test_a_plan_says_in_words_what_obs_would_do(network):
    plan = plan_compression(network, by_obs)
    assert plan.trainings == (
        "prune by second derivatives (calibrated on up to 512 training examples), without training",
        "share weights by second derivatives, without training",
    )
    training = {"epochs": 1, "lr": 0.1}
    stages = {"prune": OBS["prune"] | {"calibration": 1, "train": training}, "share": {"bits": 4, "train": training}}
    plan = plan_compression(network, tt.recipes.DeepCompressionRecipe.from_mapping(stages), limited=True)
    assert plan.trainings == (
        "prune by second derivatives (calibrated on up to 1 training example) and retrain, 1 epoch, for each trial",
        "share weights by second derivatives and train the shared values, 1 epoch",
    )


def test_limits_are_kept_by_the_recipes_method(trained, digits, tmp_path):
    """A layer that cannot be calibrated is left alone, and shared as without calibration."""

    class Reads(nn.Sequential):
        def forward(self, x):
            read = nn.functional.linear(x.flatten(1), self.read.weight)
            for layer in list(self)[:-1]:
                x = layer(x)
            return x + 0 * read

    network = Reads(OrderedDict([*copy.deepcopy(trained).named_children(), ("read", nn.Linear(64, 10))]))
    budget, asked, obs = plan_compression(network, by_obs).dense_bytes // 6, [], tt.prune.obs

    def noted(model, batches, sparsity, **options):
        asked.append((sum(map(len, batches)), options.get("bits")))
        return obs(model, batches, sparsity, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tt.prune, "obs", noted)
        record = compress(network, by_obs, digits, untrained, path=tmp_path / "small.terse", budget=budget)
    assert record.after.file_bytes == (tmp_path / "small.terse").stat().st_size <= budget
    assert [point.label for point in record.points] == ["pruned", "shared"]
    assert {examples for examples, _ in asked} == {512} and asked[0][1] is None
    bits = asked[-1][1]
    assert set(bits) == {"fc1", "fc2", "fc3"} and network.fc1.weight.unique().numel() <= 2 ** bits["fc1"]
    assert bool(network.read.weight.all()) and not bool(network.fc1.weight.all())
    assert network.read.weight.unique().numel() <= 256


def test_a_run_with_obs_goes_on_with_the_same_examples_alone(trained, digits, tmp_path):
    options = {"folder": tmp_path / "run", "path": tmp_path / "small.terse"}
    compress(copy.deepcopy(trained), by_obs, digits, untrained, **options)
    first = (tmp_path / "small.terse").read_bytes()
    compress(copy.deepcopy(trained), by_obs, digits, untrained, **options)
    assert (tmp_path / "small.terse").read_bytes() == first
    with pytest.raises(
        ValueError, match=r"same model and arguments, got another in .*record\.json, with other seed; pass"
    ):
        compress(copy.deepcopy(trained), by_obs, digits, untrained, seed=1, **options)


@pytest.mark.parametrize("bits", [1, 8])  # of which the one expects too little of the pruned file, the other too much
def test_every_budget_down_to_the_least_is_kept(network, digits, tmp_path, bits):
    plan = recipe(prune={"sparsity": 0.5, "rounds": 1, "train": {"epochs": 0, "lr": 0.1}}, share={"bits": bits})
    path = tmp_path / "a.terse"
    with pytest.raises(ValueError, match="budget must be at least about") as refused:
        compress(copy.deepcopy(network), plan, digits, untrained, path=path, budget=100)
    least = int(re.search(r"about (\d+)", str(refused.value))[1])
    for budget in (least, least + 10, least + 50, 2 * least):
        record = compress(copy.deepcopy(network), plan, digits, untrained, path=path, budget=budget)
        assert record.after.file_bytes == path.stat().st_size <= budget
    assert tt.load(path)[1].weight.count_nonzero() > 0


def test_a_budget_alone_allows_any_drop(network, digits, tmp_path):
    def ruins(model, stage):
        with torch.no_grad():
            for weight in model.parameters():
                weight.zero_()

    record = compress(network, recipe(), digits, ruins, path=tmp_path / "a.terse", budget=4000)
    assert record.after.error_percent > record.before.error_percent + 50


def test_a_run_goes_on_with_other_limits(trained, digits, train, tmp_path):
    whole = compress(copy.deepcopy(trained), recipe(), digits, train, path=tmp_path / "a.terse", budget=12_000)
    options = {"path": tmp_path / "b.terse", "folder": tmp_path / "run"}
    with pytest.raises(ValueError, match="budget must be at least about"):
        compress(copy.deepcopy(trained), recipe(), digits, train, budget=300, **options)
    record = compress(copy.deepcopy(trained), recipe(), digits, train, budget=12_000, **options)
    assert (tmp_path / "b.terse").read_bytes() == (tmp_path / "a.terse").read_bytes()
    assert record.points == whole.points and record.after.file_bytes <= 12_000
    with pytest.raises(ValueError, match="with other limited; pass another folder"):
        compress(copy.deepcopy(trained), recipe(), digits, train, **options)


def test_layers_that_cannot_be_calibrated_are_named_at_once(digits, tmp_path):
    class Reads(nn.Sequential):
        def forward(self, x):
            return nn.functional.linear(x.flatten(1), self.read.weight)

    model = Reads(OrderedDict(read=nn.Linear(64, 10, bias=False)))
    plan = tt.recipes.DeepCompressionRecipe.from_mapping({"prune": {"method": "obs", "sparsity": 0.5}})
    with pytest.raises(ValueError, match=r"compress: recipe\.prune\.sparsity must name Linear .* got 'read'"):
        compress(model, plan, digits, untrained, path=tmp_path / "small.terse", folder=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.attention = nn.Linear(8, 16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.read = nn.Linear(16, 10)

    def forward(self, x):
        y = self.into(x.flatten(1).view(-1, 8, 8))
        return self.read(self.attention(y, y, y, need_weights=False)[0].mean(1))


def test_every_layer_is_every_one_that_calibration_reaches(digits, tmp_path):
    torch.manual_seed(0)
    model = Attending()
    plan = {"prune": {"method": "obs", "sparsity": 0.5}, "share": {"bits": 4}}
    plan = tt.recipes.DeepCompressionRecipe.from_mapping(plan)
    planned = {layer.name: layer.sparsity for layer in plan_compression(model, plan).layers}
    assert planned == {"into": 0.5, "attention.out_proj": 0, "read": 0.5}
    options = {"path": tmp_path / "a.terse", "folder": tmp_path / "run"}
    compress(copy.deepcopy(model), plan, digits, untrained, path=tmp_path / "b.terse")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(importlib.import_module("tersetorch.recipes.deep_compression"), "share_calibrated", interrupt)
        compress(copy.deepcopy(model), plan, digits, untrained, **options)
    compress(model, plan, digits, untrained, **options)
    assert (tmp_path / "a.terse").read_bytes() == (tmp_path / "b.terse").read_bytes()
    assert model.into.weight.count_nonzero() <= 64 and model.attention.out_proj.weight.unique().numel() <= 16
    named = {"prune": {"method": "obs", "sparsity": {"*": 0.5}}}
    with pytest.raises(ValueError, match=r"got 'attention\.(in_proj_weight|out_proj)'"):
        check_fit(model, digits, tt.recipes.DeepCompressionRecipe.from_mapping(named))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.of_image, self.of_other = nn.Linear(64, 10), nn.Linear(3, 10)

    def forward(self, image, other):
        return self.of_image(image.flatten(1)) + self.of_other(other)


class Named(nn.Sequential):
    def forward(self, image):
        return {"logits": super().forward(image)}


def flat(outputs, kind=nn.Sequential):
    return kind(nn.Flatten(), nn.Linear(64, outputs))


@pytest.mark.parametrize(
    "model,sentence",
    [
        (
            Two(),
            "model must take the images of digits, torch.float32 (2, 1, 8, 8), as its only argument, got TypeError",
        ),
        (flat(10).bfloat16(), "got RuntimeError: mat1 and mat2 must have the same dtype"),
        (flat(10, Named), "must give one tensor of logits [N, classes] for N images, got a dict for 2"),
        (nn.Sequential(nn.Linear(8, 10)), "got shape (2, 1, 8, 10) for 2"),
        (flat(1), "must give logits for the 10 classes of digits, got 1"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_told_so_at_once(model, sentence, digits, tmp_path):
    with pytest.raises(ValueError) as raised:
        compress(model, recipe(), digits, untrained, path=tmp_path / "small.terse", folder=tmp_path / "run")
    assert sentence in str(raised.value) and "compress: model must" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_checking_leaves_the_model_as_it_was(digits):
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(), nn.Linear(64, 12))
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    check_fit(model, digits)
    assert model.training and model[2].training and torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    check_fit(model.bfloat16(), replace(digits, validation_images=digits.validation_images.bfloat16()))


@pytest.mark.parametrize(
    "options,sentence",
    [
        ({"budget": 0}, "budget must be at least 1, got 0"),
        ({"max_drop": -1.0}, "max_drop must be in [0, 100), got -1.0"),
        ({"coders": "slow"}, "coders must be one of"),
        ({"recipe": recipe(prune=None), "max_drop": 1.0}, "recipe must have a stage prune where budget or max_drop"),
        ({"recipe": recipe(share={**RECIPE["share"], "bits": {"conv*": 4}})}, "conv*"),
    ],
)
def test_wrong_arguments_get_a_sentence(network, digits, tmp_path, options, sentence):
    chosen = {"recipe": recipe(), "path": tmp_path / "small.terse", **options}
    with pytest.raises(ValueError) as raised:
        compress(network, chosen.pop("recipe"), digits, untrained, **chosen)
    assert sentence in str(raised.value)
    assert not (tmp_path / "small.terse").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_tell_data_apart_in_any_dtype(digits, dtype):
    one = replace(digits, train_images=digits.train_images.to(dtype))
    other = replace(one, train_images=one.train_images.clone())
    assert _digest(one) == _digest(other)
    other.train_images[-1, 0, 3, 3] += 1
    assert _digest(one) != _digest(other)
