import copy

import pytest
import torch

from tersetorch.methods import finalize
from tersetorch.recipes.deep_compression import DeepCompressionRecipe
from tersetorch.recipes.lenet import LeNetPlan, compress_lenet, full_plan, quick_plan, train_lenet
from tersetorch.zoo import LeNet300100, error_rate, load


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(scope="module")
def short():
    recipe = {
        "prune": {"sparsity": {"fc1": 0.9, "fc2": 0.8}, "ramp_epochs": 2, "train": {"epochs": 3, "lr": 0.1}},
        "share": {"bits": 3, "train": {"epochs": 1, "lr": 3e-4, "optimizer": "adam"}},
    }
    plan = quick_plan(load("digits"))
    dense = plan.dense.model_copy(update={"epochs": 3})
    return LeNetPlan(32, 0.3, dense, DeepCompressionRecipe.from_mapping(recipe))


def test_plans_round_trip_as_yaml(tmp_path, digits):
    for plan in (full_plan(), quick_plan(digits)):
        path = tmp_path / "plan.yaml"
        path.write_text(plan.recipe.to_yaml())
        assert DeepCompressionRecipe.from_yaml(path) == plan.recipe


def test_the_same_seed_gives_the_same_network(digits, short):
    def weights(seed):
        torch.manual_seed(torch.seed() % 1000)
        model = train_lenet(digits, short, seed=seed)
        compressed = finalize(compress_lenet(copy.deepcopy(model), digits, short, seed=seed))
        return torch.cat([tensor.flatten() for tensor in (*model.parameters(), *compressed.parameters())])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_compresses_as_planned(digits, short):
    model = train_lenet(digits, short)
    assert isinstance(model, LeNet300100) and model.in_features == 64
    dense = copy.deepcopy(model)
    compressed = finalize(compress_lenet(model, digits, short))
    assert compressed is model
    assert [int((layer.weight == 0).sum()) for layer in (model.fc1, model.fc2, model.fc3)] == [17280, 24000, 0]
    assert all(layer.weight.unique().numel() <= 8 for layer in (model.fc1, model.fc2, model.fc3))
    assert error_rate(model, digits.test_images, digits.test_labels) < 0.15
    assert dense.dropout1.p == 0.3 and model.dropout1.p < 0.3
