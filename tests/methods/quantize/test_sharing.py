import copy

import numpy as np
import pytest
import torch
from torch import nn

from tersetorch.methods import finalize, prune, quantize
from tersetorch.methods.parametrization import live_weight
from tersetorch.methods.quantize.kmeans_1d import cluster
from tersetorch.methods.quantize.sharing import share_values, to_bfloat16

# Blocks of 7 columns: those of 20 columns end with one of 6, those of 17 with one of 3.
PER = ["tensor", "row", 7]


def compressed(module):
    return live_weight(module, "weight").compressed


def groups_of(matrix, per):
    if per == "tensor":
        return [matrix]
    return list(matrix) if per == "row" else list(matrix.split(per, 1))


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("bits", [1, 3])
def test_each_group_is_clustered_on_its_own(mlp, per, pruned, bits):
    if pruned:
        prune.magnitude(mlp, 0.4)
    dense = [mlp[index].weight.detach().clone() for index in (0, 2)]
    quantize.kmeans(mlp, bits, per=per)
    for index, before in zip((0, 2), dense, strict=True):
        after, shared = mlp[index].weight.detach(), compressed(mlp[index])
        groups = list(zip(groups_of(before, per), groups_of(after, per), strict=True))
        assert shared.codebook.shape[0] == len(groups)
        for row, (old, new) in zip(shared.codebook.detach(), groups, strict=True):
            assert torch.equal(old == 0, new == 0)
            assert not pruned or row[0] == 0
            found = cluster(old[old != 0].numpy(), 2**bits - int(pruned))
            expected = torch.from_numpy(found.centroids[found.codes(old[old != 0].numpy())]).float()
            assert torch.equal(new[old != 0], expected)
            assert (row[int(pruned) :].diff() >= 0).all()


@pytest.mark.parametrize("per", PER)
def test_groups_train_by_the_sum_of_their_members_gradients(mlp, train, per):
    quantize.kmeans(prune.magnitude(mlp, 0.4), 2, per=per)
    dense = finalize(copy.deepcopy(mlp))
    x = torch.randn(16, 20, generator=torch.Generator().manual_seed(0))
    mlp(x).square().mean().backward()
    dense(x).square().mean().backward()
    shared = compressed(mlp[0])
    gradients = groups_of(dense[0].weight.grad, per)
    for row, gradient, code, mask in zip(
        shared.codebook.grad, gradients, groups_of(shared.codes, per), groups_of(shared.mask, per), strict=True
    ):
        expected = torch.zeros(4).index_add_(0, code[mask].int(), gradient[mask])
        torch.testing.assert_close(row, expected)
    codes, before = shared.codes.clone(), shared.codebook.detach().clone()
    train(mlp)
    assert torch.equal(shared.codes, codes) and not torch.equal(shared.codebook, before)
    trained = mlp[0].weight.detach().clone()
    assert torch.equal(finalize(mlp)[0].weight, trained)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("bfloat16", [False, True])
def test_states_of_groups_load_both_ways(make_mlp, train, per, bfloat16):
    source = quantize.kmeans(prune.magnitude(make_mlp(), 0.4), 2, per=per, bfloat16=bfloat16)
    train(source)
    for start in (
        lambda model: prune.magnitude(model, 0.0),
        lambda model: quantize.kmeans(model, 5),
        lambda model: quantize.kmeans(model, 2, per=5, bfloat16=True),
        lambda model: quantize.kmeans(model, 2, per="row"),
    ):
        other = start(make_mlp(seed=1))
        other.load_state_dict(source.state_dict())
        assert torch.equal(other[0].weight, source[0].weight)
        one, two = copy.deepcopy(source), other
        train(one)
        train(two)
        assert torch.equal(one[0].weight, two[0].weight)
        back = quantize.kmeans(make_mlp(seed=2), 3, per=4)
        back.load_state_dict(two.state_dict())
        assert torch.equal(finalize(back)[0].weight, two[0].weight)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("bfloat16", [False, True])
def test_dense_checkpoints_load_into_groups(make_mlp, train, per, bfloat16):
    model = quantize.kmeans(prune.magnitude(make_mlp(), 0.4), 2, per=per, bfloat16=bfloat16)
    train(model)
    done = finalize(copy.deepcopy(model))
    train(model)
    model.load_state_dict(done.state_dict())
    assert torch.equal(model[0].weight, done[0].weight)
    mask = compressed(model[0]).mask.clone()
    dense = make_mlp(seed=1)
    model.load_state_dict(dense.state_dict())
    for old, new, kept in zip(
        groups_of(dense[0].weight.detach(), per),
        groups_of(model[0].weight.detach(), per),
        groups_of(mask, per),
        strict=True,
    ):
        found = cluster(old[kept].numpy(), 3, rounding=to_bfloat16 if bfloat16 else None)
        values = torch.from_numpy(found.centroids[found.codes(old[kept].numpy())]).float()
        assert torch.equal(new[kept], values)
        assert (new[~kept] == 0).all()


@pytest.mark.parametrize("per", PER)
def test_assignment_takes_the_mean_of_each_groups_members(mlp, per):
    quantize.kmeans(mlp, 2, per=per)
    codes = compressed(mlp[0]).codes.clone()
    given = torch.randn(17, 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mlp[0].weight = given
    for old, new, code in zip(
        groups_of(given, per), groups_of(mlp[0].weight.detach(), per), groups_of(codes, per), strict=True
    ):
        for value in code.unique():
            members = code == value
            torch.testing.assert_close(new[members], old[members].mean().expand(int(members.sum())))


@pytest.mark.parametrize("per", PER)
def test_pruning_half_and_compiling_groups(mlp, per):
    quantize.kmeans(mlp, 2, per=per)
    values = compressed(mlp[0]).codebook.detach().clone()
    prune.magnitude(mlp, 0.5)
    assert (mlp[0].weight == 0).float().mean() == 0.5
    x = torch.randn(3, 20)
    expected = mlp(x)
    torch.testing.assert_close(torch.compile(mlp, backend="aot_eager", fullgraph=True)(x), expected)
    assert torch.equal(compressed(copy.deepcopy(mlp).bfloat16()[0]).codebook, values)


def test_rows_of_convolutions_and_empty_weights():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last), nn.Linear(0, 3), nn.Linear(1, 1)])
    before = model[0].weight.detach().clone()
    for per in (*PER, 100):
        other = quantize.kmeans(copy.deepcopy(model), 2, per=per)
        assert compressed(other[0]).codebook.shape[0] == len(groups_of(before.flatten(1), per))
        assert all(len(each.unique()) <= 4 for each in groups_of(other[0].weight.flatten(1), per))
        other[0](torch.ones(1, 3, 5, 5)).sum().backward()
        finalize(other)


def test_bfloat16_values_are_kept_through_training(mlp, train):
    quantize.kmeans(mlp, 3, bfloat16=True)
    shared = compressed(mlp[0])
    for _ in range(2):
        weight = mlp[0].weight.detach()
        assert torch.equal(weight, weight.bfloat16().float())
        train(mlp)
    assert not torch.equal(
        shared.codebook, shared.codebook.bfloat16().float()
    )  # what trains is finer than what is used
    assert torch.equal(mlp[0].weight, finalize(copy.deepcopy(mlp))[0].weight)
    quantize.kmeans(mlp, 3)
    train(mlp)
    assert not torch.equal(mlp[0].weight, mlp[0].weight.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bfloat16_values_trained_past_its_range_become_its_largest(mlp, dtype):
    quantize.kmeans(mlp.to(dtype), 2, bfloat16=True)
    codebook, largest = compressed(mlp[0]).codebook, torch.finfo(torch.bfloat16).max
    past = torch.finfo(dtype).max
    codebook.data.copy_(torch.tensor([[-past, -1.0, 1.0, past]], dtype=dtype))
    assert set(mlp[0].weight.unique().tolist()) == {-largest, -1.0, 1.0, largest}
    mlp[0].weight.sum().backward()
    counts = torch.bincount(compressed(mlp[0]).codes.flatten(), minlength=4)
    assert torch.equal(codebook.grad[0], counts.to(dtype))


def test_bfloat16_values_are_nearest_to_their_weights(mlp):
    dense = mlp[0].weight.detach().clone()
    quantize.kmeans(mlp, 8, bfloat16=True)
    values = compressed(mlp[0]).codebook.detach()[0].unique().double()
    nearest = values[(dense.double()[..., None] - values).abs().argmin(-1)]
    assert torch.equal(mlp[0].weight.double(), nearest)


@pytest.mark.parametrize("per", PER)
def test_data_weights_the_errors_by_mean_squares_of_inputs(mlp, per):
    x = torch.randn(64, 20) * torch.logspace(-2, 2, 20)
    x[:, 3] = 0
    dense = mlp[0].weight.detach().clone()

    def error(model):
        return float((x.square().mean(0) * (model[0].weight.detach() - dense).square()).sum())

    plain = quantize.kmeans(copy.deepcopy(mlp), 2, per=per, targets="0")
    quantize.kmeans(mlp, 2, per=per, targets="0", data=[(x[:40], None), (x[40:], None)])
    assert error(mlp) < error(plain)
    h = x.double().square().mean(0).expand(17, 20)
    for old, new, weights in zip(
        groups_of(dense, per), groups_of(mlp[0].weight.detach(), per), groups_of(h, per), strict=True
    ):
        floor = np.maximum(weights.numpy(), float(weights.mean()) * 1e-6).ravel()
        best = cluster(old.flatten().numpy(), 4, weights=floor)
        ours = float((torch.from_numpy(floor).view(new.shape) * (new.double() - old).square()).sum())
        assert ours == pytest.approx(best.squared_error(old.flatten().numpy(), floor), rel=1e-4)


def test_data_of_grouped_convolutions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, padding=1, stride=2))
    x = torch.randn(5, 4, 8, 8) * torch.tensor([1.0, 10.0, 0.1, 3.0]).view(-1, 1, 1)
    from tersetorch.methods.prune.calibration import input_moments, input_squares
    from tersetorch.methods.selection import select

    (target,) = select("test", model, None, None)
    found = input_squares("test", model, [target], [x])[0]
    hessian = input_moments("test", model, target, [x]).hessian
    expected = (hessian.diagonal(dim1=1, dim2=2) / 2).repeat_interleave(3, 0).view(6, 2, 3, 3)
    torch.testing.assert_close(found, expected)
    quantize.kmeans(model, 2, data=[x], per="row")
    assert all(len(row.unique()) <= 4 for row in model[0].weight)


def test_a_layer_that_data_do_not_reach_is_refused():
    class First(nn.ModuleList):
        def forward(self, x):
            return self[0](x)

    model = First([nn.Linear(3, 3), nn.Linear(3, 3)])
    with pytest.raises(ValueError, match=r"data must reach the layer '1', got no input there"):
        quantize.kmeans(model, 2, data=[torch.ones(1, 3)])
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"per": "column"}, ValueError, "per must be one of tensor, row, got 'column'"),
        ({"per": 0}, ValueError, "per must be at least 1, got 0"),
        ({"per": 2.0}, TypeError, "per must be an int, got 2.0"),
        ({"bfloat16": 1}, TypeError, "bfloat16 must be True or False, got 1"),
        ({"data": torch.ones(2, 20)}, TypeError, "data must be an iterable of batches, got Tensor"),
        ({"data": []}, ValueError, "data must hold at least one batch, got none"),
        ({"data": [torch.full((2, 20), float("nan"))]}, ValueError, "data must give finite inputs"),
    ],
)
def test_bad_arguments_change_nothing(mlp, arguments, error, message):
    with pytest.raises(error, match=f"quantize.kmeans: {message}"):
        quantize.kmeans(mlp, **arguments)
    assert type(mlp[0]) is nn.Linear


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("column_block", torch.tensor(3), r"codebook must be \[7, entries\] with 1 <= entries <= 256, got \(3, 4\)"),
        ("column_block", torch.tensor(-7), "column_block must be at least 1, got -7"),
        ("column_block", torch.tensor(7.0), "column_block must be one whole number"),
        ("column_block", 7, "column_block must be one whole number, got 7"),
        ("column_block", None, r"codebook must be \[1, entries\] or \[17, entries\] with .*, got \(3, 4\)"),
        ("rounded", torch.zeros(2, dtype=torch.int64), "rounded must be one whole number"),
        ("codes", torch.full((17, 20), 4, dtype=torch.uint8), r"codes must lie in \[0, 4\), got 4"),
    ],
)
def test_a_state_whose_groups_do_not_fit_is_refused(mlp, key, value, message):
    quantize.kmeans(mlp, 2, per=7, targets="0")
    state = mlp.state_dict()
    state[f"0.parametrizations.weight.0.{key}"] = value
    if value is None:
        del state[f"0.parametrizations.weight.0.{key}"]
    before = mlp[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match=message):
        mlp.load_state_dict(state)
    assert torch.equal(mlp[0].weight, before)


def test_progress_counts_every_group():
    counted = []
    weight = torch.randn(9, 4)
    share_values(weight, weight != 0, 4, "row", advance=lambda: counted.append(1))
    assert len(counted) == 9
