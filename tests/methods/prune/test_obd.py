import copy
import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

from tersetorch.methods import finalize, prune, quantize
from tersetorch.methods.parametrization import is_live
from tersetorch.recipes import prune_to_budget


def patterns(number=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 20, generator=generator)
    return x, torch.randint(0, 5, (number,), generator=generator)


def data(batch=16):
    x, labels = patterns()
    return list(zip(x.split(batch), labels.split(batch), strict=True))


def quadratic(rows=8, columns=3, patterns=32, seed=0):
    """A linear layer at the minimum of a squared error whose Hessian is diagonal."""
    torch.manual_seed(seed)
    x = torch.linalg.qr(torch.randn(patterns, columns, dtype=torch.float64)).Q * torch.tensor([1.0, 5.0, 20.0])
    target = torch.randn(patterns, rows, dtype=torch.float64)
    model = nn.Linear(columns, rows, bias=False).double()
    model.weight.data = torch.linalg.lstsq(x, target).solution.T.contiguous()
    return model, x, target


def error(model, x, target):
    with torch.no_grad():
        return float((model(x) - target).square().sum(1).mean())


@pytest.mark.parametrize("part", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("form", ["exact", "levenberg_marquardt"])
def test_deletions_on_a_quadratic_cost_what_was_predicted_and_least_of_all(part, form):
    model, x, target = quadratic()
    before = error(model, x, target)
    found = prune.saliencies(model, [(x, target)], "sse", form=form)
    assert found.loss == pytest.approx(before)
    history = []
    by_size = prune.magnitude(copy.deepcopy(model), part)
    assert prune.obd(model, [(x, target)], "sse", part, form=form, history=history) is model
    gone = round(part * 24)
    assert int((model.weight == 0).sum()) == gone
    rise = error(model, x, target) - before
    (deletion,) = history
    assert deletion.predicted_rise == pytest.approx(rise)
    assert float(found.curve()[gone]) == pytest.approx(rise)
    assert (deletion.round, deletion.deleted, deletion.kept) == (1, gone, 24 - gone)
    assert deletion.loss == pytest.approx(before)
    assert rise < 0.9 * (error(by_size, x, target) - before)


def test_saliencies_are_half_the_second_derivative_times_the_square(mlp):
    found = prune.saliencies(mlp, data(), "cross_entropy")
    second = prune.diagonal_hessian(mlp, data(), "cross_entropy")
    for name, saliency in found.saliency.items():
        weight = mlp.get_submodule(name).weight.detach()
        assert torch.equal(found.second[name], second[name])
        assert torch.allclose(saliency, second[name] * weight**2 / 2)
        assert torch.equal(found.alive[name], weight != 0)
    x, labels = patterns()
    assert found.loss == pytest.approx(functional.cross_entropy(mlp(x), labels).item(), rel=1e-5)
    assert not is_live(mlp)
    curve = found.curve()
    assert len(curve) == 340 + 85 + 1
    together = torch.cat([each.flatten() for each in found.saliency.values()]).double()
    assert torch.allclose(curve, torch.cat([torch.zeros(1), together.sort().values.cumsum(0)]))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_least_salient_go(mlp, scope):
    saliency = prune.saliencies(mlp, data(), "cross_entropy").saliency
    prune.obd(mlp, data(), "cross_entropy", 0.4, scope=scope)
    groups = [list(saliency)] if scope == "global" else [[name] for name in saliency]
    for names in groups:
        together = torch.cat([saliency[name].flatten() for name in names])
        limit = together.kthvalue(round(0.4 * len(together))).values
        for name in names:
            assert torch.equal(mlp.get_submodule(name).weight == 0, saliency[name] <= limit)


def test_losses_of_each_layer_by_sparsity(mlp):
    prune.magnitude(mlp, {"0": 0.3})
    found = prune.saliencies(mlp, data(), "cross_entropy")
    losses = found.losses([0.0, 0.3, 0.5, 0.9])
    for name, curve in losses.items():
        least = found.saliency[name][found.alive[name]].double().sort().values
        for sparsity, loss in curve.items():
            gone = max(0, round(sparsity * found.alive[name].numel()) - int((~found.alive[name]).sum()))
            assert loss == pytest.approx(float(least[:gone].sum()))
    assert losses["0"][0.3] == 0.0 < losses["0"][0.5] < losses["0"][0.9]
    assert losses["2"][0.3] > 0.0
    with pytest.raises(ValueError, match=r"Saliencies.losses: sparsities must be in \[0, 1\), got 1"):
        found.losses([1])
    report = prune_to_budget(
        mlp, lambda model: 1.0, max_drop=0, budget=1200, losses=losses, sparsities=[0.0, 0.3, 0.5, 0.9]
    )
    assert report.chosen == 0 and report.sparsities["2"] < 0.9


@pytest.mark.parametrize("pattern", ["2:4", "4x1"])
def test_patterns(mlp, pattern):
    saliency = prune.saliencies(mlp, data(), "cross_entropy", targets="0").saliency["0"]
    prune.obd(mlp, data(), "cross_entropy", None if pattern == "2:4" else 0.5, pattern=pattern, targets="0")
    zero = mlp[0].weight == 0
    if pattern == "2:4":
        least = saliency.view(17, 5, 4).argsort(-1)[..., :2]
        assert torch.equal(zero, torch.zeros(17, 5, 4, dtype=torch.bool).scatter_(2, least, True).view(17, 20))
    else:
        assert bool((zero[:16].view(4, 4, 20).float().mean(1) % 1 == 0).all())
        assert int(zero.sum()) == 170 or 167 <= int(zero.sum()) <= 170


def test_rounds_take_equal_parts_and_retraining_keeps_the_zeros(mlp, train):
    seen = []

    def retrain(model, index):
        assert model is mlp
        train(model, steps=3, seed=index)
        seen.append((index, int((model[0].weight == 0).sum())))

    history = []
    prune.obd(mlp, data(), "cross_entropy", 0.875, rounds=3, retrain=retrain, history=history, scope="layer")
    assert seen == [(index, round((1 - 0.5**index) * 340)) for index in (1, 2, 3)]
    assert [deletion.round for deletion in history] == [1, 2, 3]
    assert [deletion.kept for deletion in history] == [340 - zeros + 85 - round((1 - 0.5**i) * 85) for i, zeros in seen]
    assert sum(deletion.deleted for deletion in history) == 425 - history[-1].kept
    finalize(mlp)
    assert int((mlp[0].weight == 0).sum()) == round(0.875 * 340)


def test_each_round_sees_the_model_as_retrained(mlp):
    """The second round's saliencies are those of the model that the first retraining left."""
    x, labels = patterns()

    def retrain(model, index):
        for parameter in model.parameters():
            parameter.data.mul_(1.5)

    twin = copy.deepcopy(mlp)
    prune.obd(mlp, [(x, labels)], "cross_entropy", 0.75, rounds=2, retrain=retrain)
    prune.obd(twin, [(x, labels)], "cross_entropy", 0.5)
    retrain(twin, 1)
    prune.obd(twin, [(x, labels)], "cross_entropy", 0.75)
    retrain(twin, 2)
    assert all(torch.equal(a, b) for a, b in zip(mlp.state_dict().values(), twin.state_dict().values(), strict=True))


def test_what_was_pruned_stays_pruned(mlp):
    prune.magnitude(mlp, 0.5)
    zero = mlp[0].weight == 0
    prune.obd(mlp, data(), "cross_entropy", 0.8)
    assert bool((mlp[0].weight == 0)[zero].all())
    assert int((mlp[0].weight == 0).sum()) == round(0.8 * 340)
    before = mlp[0].weight.detach().clone()
    prune.obd(mlp, data(), "cross_entropy", 0.3)
    assert torch.equal(mlp[0].weight, before)


def test_a_sparsity_for_each_pattern(mlp):
    prune.obd(mlp, data(), "cross_entropy", {"0": 0.9, "2": 0.2}, rounds=2)
    assert [layer.kept for layer in prune.density(mlp).values()] == [34, 68]


def test_tied_narrow_and_shared_weights(tied, mlp):
    tokens, target = torch.randint(0, 12, (6, 4)), torch.randint(0, 12, (6, 4))
    tied.bfloat16()
    prune.obd(tied, [(tokens, target)], "cross_entropy", 0.5, targets=["embedding", "inner"])
    assert int((tied.head.weight == 0).sum()) == 48 and torch.equal(tied.head.weight, tied.twin.weight)
    assert int((tied.inner.weight == 0).sum()) == 32
    quantize.kmeans(mlp, bits=4)
    values = set(mlp[0].weight.flatten().tolist())
    prune.obd(mlp, data(), "cross_entropy", 0.7)
    assert set(mlp[0].weight.flatten().tolist()) <= values | {0.0}
    assert int((mlp[0].weight == 0).sum()) == 238


def test_negative_second_derivatives_rank_as_zeros():
    # E = (1 - tanh(w x))^2 has a negative second derivative far out, where tanh is flat.
    model = nn.Sequential(nn.Linear(1, 4, bias=False), nn.Tanh()).double()
    model[0].weight.data = torch.tensor([[-3.0], [-2.0], [0.1], [0.3]]).double()
    x, target = torch.ones(1, 1).double(), torch.ones(1, 4).double()
    found = prune.saliencies(model, [(x, target)], "sse", form="exact")
    assert bool((found.saliency["0"][:2] < 0).all())
    levenberg = prune.saliencies(model, [(x, target)], "sse")
    assert bool((levenberg.saliency["0"] >= 0).all())
    history = []
    prune.obd(model, [(x, target)], "sse", 0.5, form="exact", history=history)
    assert (model[0].weight == 0).flatten().tolist() == [True, True, False, False]
    assert history[0].predicted_rise == pytest.approx(float(found.saliency["0"][:2].sum()))
    assert float(found.curve()[2]) == pytest.approx(history[0].predicted_rise)


def test_the_same_data_gives_the_same_masks(make_mlp):
    first, second = make_mlp(), make_mlp()
    for model in (first, second):
        prune.obd(model, data(), "cross_entropy", 0.6, rounds=2)
    assert torch.equal(first[0].weight, second[0].weight)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sparsity": 1.2}, ValueError, "sparsity must be in [0, 1), got 1.2"),
        ({"sparsity": None}, ValueError, "exactly one of sparsity, "),
        ({"pattern": "2:4"}, ValueError, "exactly one of sparsity, "),
        ({"sparsity": None, "pattern": "2:3", "rounds": 1}, ValueError, "pattern 2:3 must divide the input channels"),
        ({"sparsity": None, "pattern": "2:4", "rounds": 2}, ValueError, "rounds must be 1 where the pattern is N:M"),
        ({"scope": "model"}, ValueError, "scope must be one of layer, global"),
        ({"form": "newton"}, ValueError, "form must be one of"),
        ({"rounds": 0}, ValueError, "rounds must be at least 1, got 0"),
        ({"rounds": 2.0}, TypeError, "rounds must be an int, got 2.0"),
        ({"retrain": 3}, TypeError, "retrain must be callable, got int"),
        ({"history": {}}, TypeError, "history must be a list, got dict"),
        ({"loss": "hinge"}, ValueError, "loss must be one of"),
        ({"data": []}, ValueError, "data must hold at least one pattern, got none"),
        ({"data": iter([]), "rounds": 2}, TypeError, "data must be readable once a round, got a list_iterator"),
        ({"targets": "fc"}, ValueError, "targets must match"),
        ({"data": [(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))]}, RuntimeError, ""),
    ],
)
def test_bad_arguments_are_refused_and_change_nothing(mlp, arguments, error, message):
    before = copy.deepcopy(mlp.state_dict())
    given = {"data": data(), "loss": "cross_entropy", "sparsity": 0.5, **arguments}
    with pytest.raises(error, match=f"prune.obd: {re.escape(message)}" if message else "shapes"):
        prune.obd(mlp, **given)
    assert not is_live(mlp) and mlp.training
    assert all(torch.equal(value, before[name]) for name, value in mlp.state_dict().items())


def test_weights_that_are_not_finite_are_refused(mlp):
    mlp[2].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"prune.obd: the weight of '2' must be finite, got NaN"):
        prune.obd(mlp, data(), "cross_entropy", 0.5)
    assert not is_live(mlp)


def test_a_later_round_that_fails_leaves_what_was_done(mlp):
    def retrain(model, index):
        model[2].weight = torch.full_like(model[2].weight, float("nan"))

    with pytest.raises(ValueError, match="must be finite"):
        prune.obd(mlp, data(), "cross_entropy", 0.75, rounds=2, retrain=retrain)
    assert int((mlp[0].weight == 0).sum()) == 170


RANK = """
import sys, torch
from torch import distributed, nn
from tersetorch.methods import prune

rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
given = torch.load(f"{folder}/given.pt")
model = nn.Sequential(nn.Linear(20, 17), nn.ReLU(), nn.Linear(17, 5))
model.load_state_dict(given["model"])
wrapped = nn.parallel.DistributedDataParallel(model)
history = []
prune.obd(wrapped, [given[f"data {rank}"]], "cross_entropy", 0.6, rounds=2, history=history)
torch.save({"weight": model[0].weight.detach(), "loss": history[0].loss}, f"{folder}/found {rank}.pt")
distributed.destroy_process_group()
"""


def test_every_rank_deletes_what_all_the_data_says(mlp, tmp_path):
    x, labels = patterns()
    given = {"model": mlp.state_dict(), "data 0": (x[:30], labels[:30]), "data 1": (x[30:], labels[30:])}
    torch.save(given, tmp_path / "given.pt")
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            _, problems = rank.communicate(timeout=200)
            assert rank.returncode == 0, problems
    finally:
        for rank in ranks:
            rank.kill()
    history = []
    prune.obd(mlp, [(x, labels)], "cross_entropy", 0.6, rounds=2, history=history)
    for rank in range(2):
        found = torch.load(tmp_path / f"found {rank}.pt")
        assert torch.equal(found["weight"], mlp[0].weight)
        assert found["loss"] == pytest.approx(history[0].loss)
