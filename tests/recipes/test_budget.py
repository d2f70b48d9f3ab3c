import copy
import json

import pytest
import torch
from rich.progress import Progress
from safetensors.torch import save_file
from torch import nn

import tersetorch as tt
from tersetorch.methods.parametrization import is_live
from tersetorch.methods.selection import select
from tersetorch.recipes import budget
from tersetorch.recipes.cost_curves import CostCurves, cost_curves

GRID = (0.0, 0.5, 0.8, 0.9, 0.95)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_task():
    """A network that fits random labels of few inputs, and its data."""
    torch.manual_seed(0)
    x = torch.randn(400, 16)
    y = (x[:, :3].sum(1) > 0).long()
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2))
    train(model, x, y, 60)
    return model, x, y


def train(model, x, y, steps):
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.fixture(scope="module")
def task():
    return make_task()


@pytest.fixture
def accuracy(task):
    _, x, y = task

    def score(model):
        with torch.no_grad():
            return float((model(x).argmax(1) == y).double().mean())

    return score


@pytest.fixture
def model(task):
    return copy.deepcopy(task[0])


def retrainer(task):
    return lambda model: train(model, task[1], task[2], 15)


def file_bytes(model, path):
    tt.save(tt.finalize(copy.deepcopy(model)), path)
    return path.stat().st_size


def test_a_budget_of_bytes_is_kept(model, task, accuracy, tmp_path):
    dense = file_bytes(model, tmp_path / "dense.terse")
    found = tt.prune_to_budget(
        model, accuracy, max_drop=0.05, budget=dense / 3, retrain=retrainer(task), sparsities=GRID
    )
    assert found.chosen == len(found.trials) - 1
    for name, layer in tt.prune.density(model).items():
        assert layer.total - layer.kept == round(found.sparsities[name] * layer.total)
    assert accuracy(model) == found.trials[-1].score >= found.floor
    assert is_live(model)
    assert file_bytes(model, tmp_path / "small.terse") == found.trials[-1].cost <= dense / 3
    assert "chosen" in str(found)
    json.dumps(found.to_dict())


def make_convolutions():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 9, 3, padding=1), nn.BatchNorm2d(9), nn.ReLU(),
        nn.Conv2d(9, 9, 3, padding=1, groups=3), nn.BatchNorm2d(9), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(36, 5),
    )  # fmt: skip


def make_mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 50), nn.ReLU(), nn.Linear(50, 4))


def shift_values(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.37).add_(parameter.sin() * 0.1)


@pytest.mark.parametrize("retrain", [None, shift_values])
@pytest.mark.parametrize(
    ("make", "budgets"),
    [(make_convolutions, range(2500, 3900, 350)), (make_mlp, range(5200, 16000, 3000))],
)
def test_the_saved_file_is_within_each_budget(make, budgets, retrain, tmp_path):
    layers = [target.name for target in select("here", make(), None, None)]
    losses = {name: {sparsity: sparsity for sparsity in budget.SPARSITIES} for name in layers}
    again = 0
    for allowed in budgets:
        model = make()
        arguments = {"max_drop": 0, "budget": allowed, "retrain": retrain, "losses": losses}
        arguments["folder"] = tmp_path / str(allowed)
        found = tt.prune_to_budget(model, lambda model: 1.0, **arguments)
        assert file_bytes(model, tmp_path / "m.terse") == found.trials[found.chosen].cost <= allowed
        again += len(found.trials) > 1
        resumed = make()
        assert tt.prune_to_budget(resumed, lambda model: 1 / 0, **arguments) == found
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in resumed.state_dict().items())
    assert again or retrain  # the curves alone would not have kept every one


def test_a_budget_that_no_file_keeps_is_refused():
    model = make_convolutions()
    before = copy.deepcopy(model.state_dict())
    targets = select("here", model, None, None)
    curves = cost_curves(model, targets, (0.0, 0.9), "bytes")
    least = curves.total(dict.fromkeys(curves.layers, 0.9))

    def retrain(model):  # values that code worse
        with torch.no_grad():
            for module in model:
                if isinstance(module, nn.BatchNorm2d):
                    module.weight.normal_()

    with pytest.raises(
        ValueError, match=r"prune_to_budget: budget must be at least [0-9.]+, the least that was reached"
    ):
        tt.prune_to_budget(
            model, lambda model: 1.0, max_drop=0, budget=least, sparsities=(0.0, 0.9), retrain=retrain
        )  # fmt: skip
    assert not is_live(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_without_a_budget_it_is_the_sparsest_that_keeps_the_floor(model, task, accuracy):
    example = task[1][:1]
    found = tt.prune_to_budget(
        model, accuracy, max_drop=0.02, unit="operations", example_inputs=example, sparsities=GRID, trials=5,
        retrain=retrainer(task),
    )  # fmt: skip
    assert found.chosen is not None
    fitting = [trial.cost for trial in found.trials if trial.score >= found.floor]
    assert found.trials[found.chosen].cost == min(fitting) < found.dense_cost
    assert tt.costs.count(tt.finalize(copy.deepcopy(model)), example).effective_macs == pytest.approx(
        min(fitting), abs=3
    )


def test_a_floor_that_cannot_be_kept_leaves_the_model(model, task):
    before = copy.deepcopy(model.state_dict())
    scores = iter([1.0])
    found = tt.prune_to_budget(
        model, lambda model: next(scores, 0.0), max_drop=0.1, losses={name: dict.fromkeys(GRID, 0.0) for name in "024"},
        sparsities=GRID, trials=3,
    )  # fmt: skip
    assert found.chosen is None and found.sparsities is None and len(found.trials) == 3
    assert not is_live(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert "too low" in str(found)


def test_an_interrupted_run_goes_on_to_the_same_bits(model, task, accuracy, tmp_path):
    arguments = {"max_drop": 0.02, "sparsities": GRID, "trials": 4, "retrain": retrainer(task)}
    whole = copy.deepcopy(model)
    expected = tt.prune_to_budget(whole, accuracy, **arguments)
    calls = []

    def interrupted(after):
        calls.clear()

        def score(model):
            calls.append(1)
            if len(calls) > after:
                raise KeyboardInterrupt
            return accuracy(model)

        return score

    for after in (3, 14, 1):
        with pytest.raises(KeyboardInterrupt):
            tt.prune_to_budget(copy.deepcopy(model), interrupted(after), folder=tmp_path / "run", **arguments)
    found = tt.prune_to_budget(model, accuracy, folder=tmp_path / "run", **arguments)
    assert found == expected
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in model.state_dict().items())
    again = copy.deepcopy(task[0])
    assert tt.prune_to_budget(again, interrupted(0), folder=tmp_path / "run", **arguments) == expected
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in again.state_dict().items())
    (kept,) = (tmp_path / "run").glob("*.safetensors")
    kept.unlink()
    again = copy.deepcopy(task[0])
    tt.prune_to_budget(again, accuracy, folder=tmp_path / "run", **arguments)
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_a_run_goes_on_with_other_limits(model, task, accuracy, tmp_path):
    whole = file_bytes(model, tmp_path / "m.terse")
    arguments = {"sparsities": GRID, "folder": tmp_path / "run"}
    with pytest.raises(ValueError, match="budget must be at least"):
        tt.prune_to_budget(copy.deepcopy(model), accuracy, max_drop=1, budget=10, **arguments)
    first = tt.prune_to_budget(copy.deepcopy(model), accuracy, max_drop=1.0, budget=whole // 2, **arguments)
    calls = []

    def counted(tried):
        calls.append(tried)
        return accuracy(tried)

    fresh = tt.prune_to_budget(copy.deepcopy(task[0]), accuracy, max_drop=1.0, budget=whole // 3, sparsities=GRID)
    found = tt.prune_to_budget(model, counted, max_drop=1.0, budget=whole // 3, **arguments)
    assert found == fresh and found.sparsities != first.sparsities
    assert len(calls) == len(found.trials), "what each layer loses is known from the first call"


def test_trials_prune_by_a_method_of_the_callers(model, task, accuracy, tmp_path):
    asked = []

    def method(tried, sparsities):
        asked.append(sparsities)
        tt.prune.obs(tried, [task[1]], sparsities, refine=1)

    whole = file_bytes(model, tmp_path / "m.terse")
    arguments = {"max_drop": 1.0, "budget": whole // 2, "sparsities": GRID, "folder": tmp_path / "run"}
    found = tt.prune_to_budget(model, accuracy, method=method, **arguments)
    assert asked == [trial.sparsities for trial in found.trials] and sum(found.sparsities.values()) > 0
    expected = tt.prune.obs(copy.deepcopy(task[0]), [task[1]], found.sparsities, refine=1)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in expected.state_dict().items())
    with pytest.raises(ValueError, match="folder must hold a run with the same model and arguments, got another"):
        tt.prune_to_budget(copy.deepcopy(task[0]), accuracy, **arguments)


def test_a_method_that_makes_another_model_is_refused(model, accuracy):
    def method(tried, sparsities):
        tt.quantize.kmeans(tried)

    losses = {name: dict.fromkeys(GRID, 0.0) for name in "024"}
    with pytest.raises(ValueError, match="prune_to_budget: method must leave the model's modules, masks and shapes"):
        tt.prune_to_budget(model, accuracy, max_drop=1, losses=losses, sparsities=GRID, method=method)
    assert not is_live(model)


def replaces_a_layer(model):
    model[0] = nn.Linear(16, 64)


def narrows_a_layer(model):
    model[2], model[4] = nn.Linear(64, 8), nn.Linear(8, 2)


@pytest.mark.parametrize(
    "retrain", [replaces_a_layer, narrows_a_layer, tt.finalize, tt.quantize.kmeans, lambda model: model.half()]
)
def test_a_retraining_that_makes_another_model_is_refused(model, accuracy, retrain):
    before = copy.deepcopy(model.state_dict())
    losses = {name: dict.fromkeys(GRID, 0.0) for name in "024"}
    with pytest.raises(ValueError, match="prune_to_budget: retrain must leave the model's modules, masks and shapes"):
        tt.prune_to_budget(model, accuracy, max_drop=1, losses=losses, sparsities=GRID, retrain=retrain)
    assert not is_live(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_new_parameters_of_the_same_shapes_are_taken(model, accuracy):
    def retrain(model):
        for layer in (model[0], model[2], model[4]):
            layer.bias = nn.Parameter(layer.bias.detach() + 1)

    before = model[0].bias.detach().clone()
    losses = {name: dict.fromkeys(GRID, 0.0) for name in "024"}
    tt.prune_to_budget(model, accuracy, max_drop=1, losses=losses, sparsities=GRID, retrain=retrain)
    assert torch.equal(model[0].bias, before + 1)


def test_stored_weights_that_do_not_fit_are_refused(model, accuracy, tmp_path):
    losses = {name: dict.fromkeys(GRID, 0.0) for name in "024"}
    arguments = {"max_drop": 1, "losses": losses, "sparsities": GRID, "folder": tmp_path}
    tt.prune_to_budget(copy.deepcopy(model), accuracy, **arguments)
    (kept,) = tmp_path.glob("*.safetensors")
    save_file({"0.weight": torch.zeros(2)}, kept)
    with pytest.raises(ValueError, match=r"prune_to_budget: folder must hold each state as .*, got .*trial_"):
        tt.prune_to_budget(model, accuracy, **arguments)
    assert not is_live(model)


def test_a_frozen_layer_is_refused_before_anything_is_scored(model):
    model[2].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="prune_to_budget: the weight of '2' must not be frozen"):
        tt.prune_to_budget(model, lambda model: 1 / 0, max_drop=1)


def test_a_folder_of_another_run_is_refused(model, accuracy, tmp_path):
    losses = {name: dict.fromkeys(GRID, 0.0) for name in "024"}
    tt.prune_to_budget(model, accuracy, max_drop=1, losses=losses, sparsities=GRID, folder=tmp_path)
    with pytest.raises(ValueError, match=r"prune_to_budget: folder must hold a run with the same model"):
        tt.prune_to_budget(model, accuracy, max_drop=1, losses=losses, sparsities=GRID, folder=tmp_path)
    (tmp_path / "record.json").write_text("{")
    with pytest.raises(ValueError, match=r"prune_to_budget: folder must hold a run's record"):
        tt.prune_to_budget(model, accuracy, max_drop=1, losses=losses, sparsities=GRID, folder=tmp_path)


@pytest.mark.parametrize("seed", range(30))
def test_the_cheapest_choice_is_not_refused_for_rounding(model, monkeypatch, seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(4, 2, generator=generator, dtype=torch.float64).tolist()
    curves = CostCurves(drawn[3][0], {name: {0.0: 1 + a, 0.9: b} for name, (a, b) in zip("024", drawn, strict=False)})
    monkeypatch.setattr(budget, "cost_curves", lambda *arguments: curves)
    losses = {name: {0.0: 0.0, 0.9: 1.0} for name in "024"}
    found = tt.prune_to_budget(model, lambda model: 0.0, max_drop=1, losses=losses, sparsities=[0.0, 0.9])
    assert found.sparsities == dict.fromkeys("024", 0.9)


def test_other_losses_or_inputs_are_another_run(model, accuracy, tmp_path):
    def go(loss, batch):
        losses = {name: {0.0: 0.0, 0.5: loss} for name in "024"}
        return tt.prune_to_budget(
            copy.deepcopy(model), accuracy, max_drop=1, losses=losses, sparsities=[0.0, 0.5], folder=tmp_path,
            unit="operations", example_inputs=torch.randn(batch, 16),
        )  # fmt: skip

    first = go(1.0, 1)
    assert go(1.0, 1) == first
    for loss, batch in ((2.0, 1), (1.0, 2)):
        with pytest.raises(ValueError, match="folder must hold a run with the same model and arguments"):
            go(loss, batch)


def test_layers_with_one_weight_both_compute():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    model[2].weight = model[0].weight
    x = torch.randn(4, 32)
    curves = cost_curves(model, select("here", model, None, None), (0.0, 0.5), "operations", x)
    for sparsity in (0.0, 0.5):
        pruned = tt.finalize(tt.prune.magnitude(copy.deepcopy(model), sparsity))
        assert curves.total({"0": sparsity}) == tt.costs.count(pruned, x).effective_macs


def test_milliseconds_are_those_that_convert_measures():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 32))
    targets = select("here", model, None, None)
    curves = cost_curves(model, targets, (0.0, 0.9, 0.95), "milliseconds", torch.randn(1, 1024))
    for curve in curves.layers.values():
        assert curve[0.0] >= curve[0.9] >= curve[0.95] > 0
    assert curves.fixed >= 0
    # Ten times fewer weights: convert takes a sparse form, whatever the noise.
    assert curves.layers["0"][0.95] < curves.layers["0"][0.0]


def test_bytes_are_those_of_the_file(model, tmp_path):
    targets = select("here", model, None, None)
    curves = cost_curves(model, targets, (0.0, 0.9), "bytes")
    for sparsity in (0.0, 0.9):
        pruned = tt.prune.magnitude(copy.deepcopy(model), sparsity)
        # Only the header may differ a little from one choice of sparsities to another.
        assert curves.total(dict.fromkeys("024", sparsity)) == pytest.approx(
            file_bytes(pruned, tmp_path / "m.terse"), abs=64
        )


def test_blocks_and_progress(model, accuracy):
    with Progress(disable=True) as progress:
        tt.prune_to_budget(model, accuracy, max_drop=1, sparsities=(0.0, 0.5), pattern="1x4", progress=progress)
        assert all(task.finished or task.completed for task in progress.tasks)
    blocks = model[0].weight.unflatten(1, (4, 4)) == 0
    assert torch.equal(blocks.all(-1), blocks.any(-1)) and bool(blocks.any())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"evaluate": 3}, TypeError, "evaluate must be callable, got int"),
        ({"retrain": 3}, TypeError, "retrain must be callable, got int"),
        ({"method": "obs"}, TypeError, "method must be callable, got str"),
        ({"max_drop": -1}, ValueError, "max_drop must be finite and at least 0, got -1"),
        ({"budget": "1 MB"}, TypeError, "budget must be a number, got '1 MB'"),
        (
            {"budget": 10},
            ValueError,
            r"budget must be at least [0-9.]+, the cost at the largest sparsities, got 10; raise",
        ),
        ({"unit": "flops"}, ValueError, "unit must be one of bytes, operations, milliseconds, got 'flops'"),
        ({"unit": "operations"}, ValueError, "example_inputs must be given where unit is 'operations'"),
        ({"sparsities": []}, ValueError, "sparsities must be a list of numbers"),
        ({"sparsities": [1.2]}, ValueError, r"sparsities must be in \[0, 1\), got 1.2"),
        ({"trials": 0}, ValueError, "trials must be at least 1, got 0"),
        ({"pattern": "2:4"}, ValueError, "pattern must be None or 'RxC'"),
        ({"targets": "fc"}, ValueError, "targets must match"),
        (
            {"losses": {"0": {0.5: 1.0}}},
            ValueError,
            "losses must hold a finite number for each layer and sparsity, got none",
        ),
    ],
)
def test_bad_arguments_are_refused_and_change_nothing(model, arguments, error, message):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=f"prune_to_budget: {message}"):
        tt.prune_to_budget(model, **{"evaluate": lambda model: 1.0, "max_drop": 0.1, "sparsities": GRID, **arguments})
    assert not is_live(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
