import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import tersetorch as tt
from tersetorch.methods.factorize import rank_within, truncated
from tersetorch.methods.factorize.ranks import Curve, joint_ranks, lost_shares, rank_of_energy
from tersetorch.nn import LowRankConv2d, LowRankLinear


def convolutions(seed=0):
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(12 * 7 * 7, 30), nn.ReLU(), nn.Linear(30, 10))


def images(count=2, seed=0):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def error_of(model, before, name):
    return (model.get_submodule(name).weight - before.get_submodule(name).weight).detach().double()


# ---- the decomposition


@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_error_is_that_of_the_singular_values_left_out(rank, dtype):
    weight = torch.randn(9, 7, 1, 1, generator=torch.Generator().manual_seed(0), dtype=dtype)
    left, right = truncated(weight, rank)
    assert left.shape == (9, rank) and right.shape == (rank, 7) and left.dtype == right.dtype == dtype
    values = np.linalg.svd(weight.flatten(1).double().numpy(), compute_uv=False)
    error = float((left.double() @ right.double() - weight.flatten(1).double()).square().sum())
    assert error == pytest.approx(float(np.square(values[rank:]).sum()), rel=1e-5, abs=1e-10)


def test_signs_do_not_depend_on_how_the_weight_came():
    weight = torch.randn(9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, right = truncated(weight, 4)
    assert bool((left.gather(0, left.abs().argmax(0, keepdim=True)) > 0).all())
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(truncated(weight[:, order], 4)[0], left)
    assert torch.equal(truncated(weight.clone(), 4)[1], right)


def test_rank_within():
    assert rank_within(300, 784, 300 * 784 // 16) == 13
    assert rank_within(10, 20, 29) == 0 and rank_within(10, 20, 30) == 1 and rank_within(3, 4, 10**6) == 3


@pytest.mark.parametrize(("rank", "error"), [(0, ValueError), (8, ValueError), (2.0, TypeError)])
def test_ranks_that_do_not_exist_are_refused(rank, error):
    with pytest.raises(error, match=r"factorize.truncated: rank must be"):
        truncated(torch.ones(9, 7), rank)
    with pytest.raises(ValueError, match=r"factorize.truncated: weight must hold numbers, got shape \(0, 7\)"):
        truncated(torch.ones(0, 7), 1)
    with pytest.raises(ValueError, match=r"factorize.truncated: weight must hold numbers, got a tensor on meta"):
        truncated(torch.ones(9, 7, device="meta"), 1)


# ---- whole models


@pytest.mark.parametrize("form", ["filters", "separable"])
def test_a_convolutions_error_is_that_of_its_unfoldings_tail(form):
    model, before = convolutions(), convolutions()
    assert tt.factorize.svd(model, 5, form=form, targets=[nn.Conv2d]) is model
    for name in ("0", "2"):
        layer = model.get_submodule(name)
        assert type(layer) is LowRankConv2d and layer.rank == 5 and layer.form == form
        weight = before.get_submodule(name).weight.detach().double().numpy()
        filters, channels, kh, kw = weight.shape
        matrix = weight.reshape(filters, -1)
        if form == "separable":
            matrix = weight.transpose(0, 3, 1, 2).reshape(filters * kw, channels * kh)
            assert layer.first.kernel_size == (kh, 1) and layer.second.kernel_size == (1, kw)
        tail = float(np.square(np.linalg.svd(matrix, compute_uv=False)[5:]).sum())
        assert float(error_of(model, before, name).square().sum()) == pytest.approx(tail, rel=1e-5)
        x = torch.randn(2, channels, 16, 15)
        sizes = {name: getattr(layer, name) for name in ("stride", "padding", "dilation")}
        torch.testing.assert_close(
            layer(x), functional.conv2d(x, layer.weight, layer.bias, **sizes), atol=1e-5, rtol=1e-4
        )
    assert type(model[5]) is nn.Linear


def test_ranks_by_layer_and_what_carries_over():
    model = convolutions().eval()
    model[5].bias.requires_grad_(False)
    model[7].weight.requires_grad_(False)
    bias = model[5].bias
    tt.factorize.svd(model, {"0": 2, "5": 7, nn.Linear: 3})
    assert [model[i].rank for i in (0, 5, 7)] == [2, 7, 3] and type(model[2]) is nn.Conv2d
    assert model[5].bias is bias and not model[5].second.bias.requires_grad and model[5].first.weight.requires_grad
    assert not model[7].first.weight.requires_grad and model[7].second.bias.requires_grad
    assert not any(module.training for module in model.modules())


def test_energy_keeps_the_least_rank_that_is_enough():
    model, before = convolutions(), convolutions()
    tt.factorize.svd(model, energy={"5": 0.7, nn.Conv2d: 0.99})
    values = np.square(np.linalg.svd(before[5].weight.detach().double().numpy(), compute_uv=False))
    share = np.cumsum(values) / values.sum()
    assert share[model[5].rank - 1] >= 0.7 > share[model[5].rank - 2]
    # Factors that keep so much of 8 x 75 would be larger than it.
    assert type(model[0]) is nn.Conv2d


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_energy_1_keeps_all_but_what_rounding_left(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30, dtype=dtype))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(30, 4, dtype=dtype) @ torch.randn(4, 40, dtype=dtype))
    weight = model[0].weight
    assert tt.factorize.svd(model, energy=1)[0].rank == 4
    torch.testing.assert_close(model[0].weight, weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["filters", "separable"])
@pytest.mark.parametrize("unit", ["parameters", "bytes", "macs"])
def test_a_budget_is_kept_to_the_last_number(unit, form):
    model, x = convolutions(), images(1)
    whole = getattr(tt.costs.count(model, x), unit)
    budget = int(whole * 0.45)
    tt.factorize.svd(model, budget=budget, unit=unit, form=form, example_inputs=x)
    spent = getattr(tt.costs.count(model, x), unit)
    # Without one step more, which in the convolutions are many multiply-accumulates.
    assert (0.8 if unit == "macs" else 0.9) * budget < spent <= budget
    again = tt.factorize.svd(convolutions(), ratio=whole / budget, unit=unit, form=form, example_inputs=x)
    assert abs(getattr(tt.costs.count(again, x), unit) - spent) <= 0.01 * whole


def test_a_budget_goes_where_it_lowers_the_loss_most():
    """Against all choices of two layers' ranks."""
    generator = torch.Generator().manual_seed(0)
    for seed in range(20):
        shapes = [(6, 5), (4, 7)]
        curves = []
        for rows, columns in shapes:
            matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
            matrix *= torch.rand(columns, generator=generator, dtype=torch.float64) ** 3
            curves.append(
                Curve(lost_shares(torch.linalg.svdvals(matrix), rows, columns), rows + columns, rows * columns)
            )
        budget = 22 + seed
        found = joint_ranks(curves, budget)

        def cost(curve, rank):
            return curve.dense if rank is None else rank * curve.per_rank

        def loss(curve, rank):
            return 0.0 if rank is None else float(curve.lost[rank])

        choices = [[None, *range(1, curve.most + 1)] for curve in curves]
        best = min(
            (
                loss(curves[0], a) + loss(curves[1], b)
                for a in choices[0]
                for b in choices[1]
                if cost(curves[0], a) + cost(curves[1], b) <= budget
            ),
        )
        assert sum(map(cost, curves, found)) <= budget
        # What the hull leaves of a budget is less than a step: the best of a budget smaller by that is not better.
        smaller = budget - max(curve.dense - curve.most * curve.per_rank + curve.per_rank for curve in curves)
        bound = min(
            (
                loss(curves[0], a) + loss(curves[1], b)
                for a in choices[0]
                for b in choices[1]
                if cost(curves[0], a) + cost(curves[1], b) <= smaller
            ),
            default=2.0,
        )
        assert best - 1e-12 <= sum(map(loss, curves, found)) <= bound + 1e-12


def test_shares():
    lost = lost_shares(torch.tensor([2.0, 1.0, 1e-20]), 5, 3)
    assert lost.tolist() == [1.0, 0.2, 0.0, 0.0]
    assert [rank_of_energy(lost, each) for each in (0.1, 0.8, 0.81, 1.0)] == [1, 1, 2, 2]
    assert rank_of_energy(lost_shares(torch.zeros(3), 3, 3), 0.5) == 1


def test_inputs_decide_which_outputs_are_kept():
    model = convolutions()
    spread = torch.linspace(0.01, 2, 3)[:, None, None]
    data = [images(8, seed) * spread for seed in range(3)]
    plain = tt.factorize.svd(copy.deepcopy(model), {"0": 3, "5": 6})
    seen = tt.factorize.svd(copy.deepcopy(model), {"0": 3, "5": 6}, data=data)

    def outputs(other, name):
        place = int(name)
        inputs = [model[:place](x) for x in data]
        return float(sum((other[place](x) - model[place](x)).square().sum() for x in inputs).detach())

    for name in ("0", "5"):
        assert outputs(seen, name) < 0.95 * outputs(plain, name)
        # No other product of that rank does better: that of the outputs' own singular values.
        inputs = torch.cat([model[: int(name)](x) for x in data]).detach().double()
        if name == "5":
            y = inputs @ model[5].weight.detach().double().T
            best = float(torch.linalg.svdvals(y)[6:].square().sum())
            assert outputs(seen, "5") == pytest.approx(best, rel=1e-3)


def test_importance_decides_which_weights_are_kept():
    model = convolutions()
    generator = torch.Generator().manual_seed(1)
    counts = {name: torch.rand(model.get_submodule(name).weight.shape, generator=generator) ** 3 for name in ("0", "5")}

    def weighted(other, name):
        return float((counts[name] * error_of(other, model, name)).square().sum())

    for form in ("filters", "separable"):
        plain = tt.factorize.svd(copy.deepcopy(model), {"0": 3, "5": 6}, form=form)
        found = tt.factorize.svd(copy.deepcopy(model), {"0": 3, "5": 6}, form=form, importance=counts)
        for name in ("0", "5"):
            assert weighted(found, name) < 0.8 * weighted(plain, name)
    even = {name: torch.full_like(count, 0.5) for name, count in counts.items()}
    same = tt.factorize.svd(copy.deepcopy(model), {"0": 3, "5": 6}, importance=even)
    torch.testing.assert_close(same[5].weight, tt.factorize.svd(copy.deepcopy(model), {"5": 6})[5].weight)


# ---- composition


def test_factors_train_prune_share_convert_and_save(tmp_path):
    model, x = convolutions(), images()
    tt.factorize.svd(model, ratio=2)
    assert type(model[5]) is LowRankLinear
    tt.prune.magnitude(model, 0.6, targets="5.*")
    tt.quantize.kmeans(model, 4, targets="0.*" if isinstance(model[0], LowRankConv2d) else "0")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = float(model(x).square().mean().detach())
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert float(model(x).square().mean().detach()) < before
    tt.finalize(model.eval())
    for plan in ("sparse", "codebook"):
        fast = tt.convert(model, plan=plan)
        torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-4)
        tt.save(fast, tmp_path / "m.terse")
        assert torch.equal(tt.load(tmp_path / "m.terse")(x), fast(x))
        assert torch.equal(tt.load(tmp_path / "m.terse", model=convolutions())(x), fast(x))


def test_encoder_layers_call_their_factors():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    before, x = copy.deepcopy(encoder), torch.randn(2, 5, 8)
    tt.factorize.svd(encoder, 8)
    called = []
    for module in encoder.modules():
        if isinstance(module, LowRankLinear):
            module.first.register_forward_hook(lambda *_: called.append(1))
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), before(x), atol=1e-5, rtol=1e-4)
    assert len(called) == 4 and type(encoder.layers[0].self_attn.out_proj) is not LowRankLinear


def test_factors_made_in_inference_mode_train_and_their_energy_counts():
    model, x = convolutions(), images()
    with torch.inference_mode():
        tt.factorize.svd(model, {"5": 4})
        tt.factorize.outer_product(model, 4, targets="2")
    model(x).sum().backward()
    assert model[5].first.weight.grad is not None and model[2].middle.weight.grad is not None
    multiplies = {layer.name: layer.operations["multiply float32"] for layer in tt.energy(model, x).layers}
    assert multiplies["5.first"] == 2 * 4 * 588 and multiplies["5.second"] == 2 * 4 * 30


def test_shared_modules_share_their_factors():
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    tt.factorize.svd(model, 2)
    assert type(model[0]) is LowRankLinear and model[0] is model[2]


# ---- bad input


def with_nan():
    model = convolutions()
    nn.init.constant_(model[0].weight, float("nan"))
    return model


def hooked():
    model = convolutions()
    model[0].register_forward_hook(lambda *_: None)
    return model


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


REFUSED = [
    (convolutions, {"rank": 0}, ValueError, "rank of '0' must be from 1 to 8, got 0; pass a number in that range"),
    (convolutions, {"rank": 11, "targets": "7"}, ValueError, "rank of '7' must be from 1 to 10, got 11"),
    (convolutions, {"rank": {"5": 3, "7": 40}}, ValueError, "rank of '7' must be from 1 to 10, got 40"),
    (convolutions, {"rank": 2.5}, TypeError, "rank of '0' must be an int, got 2.5"),
    (convolutions, {"energy": 0.0}, ValueError, r"energy of '0' must be in \(0, 1\], got 0.0"),
    (convolutions, {"energy": 1.01}, ValueError, r"energy of '0' must be in \[0, 1\], got 1.01"),
    (convolutions, {"energy": float("nan")}, ValueError, "energy of '0' must be in"),
    (convolutions, {"budget": 100}, ValueError, "budget must be at least 885 parameters, what the model takes with"),
    (
        convolutions,
        {"ratio": 99},
        ValueError,
        r"ratio must be at most [\d.]+, .* 885 of \d+ parameters, got 99",
    ),
    (convolutions, {"budget": 1.5}, TypeError, "budget must be an int"),
    (convolutions, {"ratio": 0.5}, ValueError, "ratio must be finite and at least 1, got 0.5"),
    (convolutions, {"ratio": 2, "unit": "flop"}, ValueError, "unit must be one of parameters, bytes, macs, got 'flop'"),
    (convolutions, {"ratio": 2, "unit": "macs"}, TypeError, "example_inputs must be a tensor"),
    (convolutions, {}, ValueError, "exactly one of rank, energy, budget and ratio must be given, got none"),
    (convolutions, {"rank": 1, "energy": 0.5}, ValueError, "got rank and energy; pass one"),
    (convolutions, {"rank": {"5": 3}, "targets": "5"}, ValueError, "rank must be one number where targets is given"),
    (convolutions, {"rank": 1, "form": "cp"}, ValueError, "form must be one of filters, separable, got 'cp'"),
    (convolutions, {"rank": 1, "targets": "9"}, ValueError, "targets must match weights"),
    (convolutions, {"rank": 1, "data": [], "form": "separable"}, ValueError, "form must be 'filters' where data"),
    (convolutions, {"rank": 1, "data": [], "importance": {}}, ValueError, "data must be left out where importance"),
    (convolutions, {"rank": 1, "importance": [1]}, TypeError, "importance must map layers' names to tensors, got list"),
    (convolutions, {"rank": 1, "importance": {}}, ValueError, r"importance must hold \(8, 3, 5, 5\) for '0', got noth"),
    (
        convolutions,
        {"rank": 1, "targets": "7", "importance": {"7": torch.ones(10, 30, dtype=torch.complex64)}},
        ValueError,
        "importance must be finite and at least 0",
    ),
    (
        convolutions,
        {"rank": 1, "targets": "7", "importance": {"7": -torch.ones(10, 30)}},
        ValueError,
        "importance must be finite and at least 0",
    ),
    (with_nan, {"rank": 1}, ValueError, "the weight of '0' must be finite, got NaN or infinity"),
    (hooked, {"rank": 1, "targets": "0"}, ValueError, "the weight of '0' must be of a layer without hooks"),
    (tied, {"rank": 1, "targets": "0"}, ValueError, "must be of one layer alone, got one that layers share; untie"),
    (lambda: nn.Linear(3, 4), {"rank": 1}, ValueError, r"pass nn.Sequential\(model\)"),
    (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)),
        {"rank": 1, "targets": "0"},
        ValueError,
        "the weight of '0' must be of one group, got 2",
    ),
    (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3)),
        {"rank": 1, "targets": "0"},
        ValueError,
        "must be that of an nn.Linear or nn.Conv2d, got ConvTranspose2d",
    ),
    (
        lambda: tt.prune.magnitude(convolutions(), 0.5),
        {"rank": 1, "targets": "0"},
        ValueError,
        "must be plain, got one that another method compresses; call tt.finalize first",
    ),
    (lambda: None, {"rank": 1}, TypeError, "model must be a torch.nn.Module"),
]


@pytest.mark.parametrize(("make", "options", "error", "sentence"), REFUSED, ids=[case[3] for case in REFUSED])
def test_bad_input_is_refused_and_changes_nothing(make, options, error, sentence):
    model = make()
    before = list(model.modules()) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=sentence):
        tt.factorize.svd(model, **options)
    if before is not None:
        assert list(model.modules()) == before


def test_layers_that_no_factors_can_stand_in_for_are_passed_over_unless_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1), nn.Conv1d(2, 2, 3))
    tt.factorize.svd(model, 2)
    assert [type(layer) for layer in model] == [nn.Conv2d, LowRankConv2d, nn.Conv1d]
