"""factorize.flatten: filters that are products are found again, others as near as can be, and models train."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import tersetorch as tt
from tersetorch.methods.factorize import nearest_filters
from tersetorch.nn import FlattenedConv2d


def convolutions(seed=0):
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2, bias=False), nn.ReLU()
    return nn.Sequential(*layers, nn.Conv2d(12, 6, 1), nn.Flatten(), nn.Linear(6 * 49, 10))


def images(count=2, seed=0):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def sums_of_products(filters, channels, kernel, rank, seed=0):
    g = torch.Generator().manual_seed(seed)
    factors = [torch.randn(filters, rank, n, generator=g) for n in (channels, *kernel)]
    return torch.einsum("frc,fri,frj->fcij", *factors)


def rebuilt(filters, rank):
    parts = [t.double().unflatten(0, (rank, -1)) for t in filters[:3]]
    return torch.einsum("rfc,rfi,rfj->fcij", *parts)


@pytest.mark.parametrize("kernel,rank", [((3, 3), 1), ((5, 3), 2), ((5, 5), 3), ((1, 4), 1), ((3, 1), 3)])
def test_sums_of_products_are_found_again(kernel, rank):
    weight = sums_of_products(7, 11, kernel, rank)
    found = nearest_filters(weight, rank)
    assert found.errors.shape == (7,) and float(found.errors.max()) < 2e-3 and float(found.errors.median()) < 1e-4
    errors = (rebuilt(found.filters, rank) - weight).flatten(1).norm(dim=1) / weight.flatten(1).norm(dim=1)
    torch.testing.assert_close(errors, found.errors, rtol=1e-2, atol=1e-5)
    norms = torch.stack([t.norm(dim=1) for t in found.filters[:3]])
    torch.testing.assert_close(norms, norms[:1].expand_as(norms))


def test_a_product_is_as_near_as_power_iteration_finds():
    """For one product of a matrix-like filter, the error is that of its singular values."""
    weight = torch.randn(6, 10, 1, 5, generator=torch.Generator().manual_seed(1))
    for rank in (1, 2):
        values = torch.linalg.svdvals(weight.squeeze(2).double())
        want = (values[:, rank:].square().sum(1) / values.square().sum(1)).sqrt()
        torch.testing.assert_close(nearest_filters(weight, rank).errors, want, rtol=1e-4, atol=1e-6)


def test_more_products_leave_less_and_enough_leave_nothing():
    weight = torch.randn(5, 6, 3, 2, generator=torch.Generator().manual_seed(2))
    errors = [float(nearest_filters(weight, rank).errors.max()) for rank in (1, 2, 4, 6)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3
    again = nearest_filters(weight, 2, seed=0)
    assert all(
        torch.equal(a, b) for a, b in zip(again.filters[:3], nearest_filters(weight, 2).filters[:3], strict=True)
    )


def test_zeros_and_scales():
    weight = sums_of_products(3, 4, (3, 3), 1)
    weight[1] = 0
    for scale in (1e-12, 1e12):
        found = nearest_filters(weight * scale, 2)
        assert all(t.isfinite().all() for t in found.filters[:3]) and float(found.errors.max()) < 1e-4
        assert not rebuilt(found.filters, 2)[1].any()


def test_layers_are_replaced_and_train():
    model = convolutions()
    model[0].weight.data = sums_of_products(8, 3, (5, 5), 2) / 10
    before, errors = copy.deepcopy(model), {}
    want = model(images())
    assert tt.factorize.flatten(model, {"0": 2, "2": 9}, errors=errors) is model
    assert isinstance(model[0], FlattenedConv2d) and model[0].rank == 2 and model[2].rank == 9
    assert isinstance(model[4], nn.Conv2d) and set(errors) == {"0", "2"} and errors["0"] < 1e-3
    was = before[2].weight.detach()
    assert errors["2"] == pytest.approx(float((model[2].weight - was).norm() / was.norm()), abs=1e-4)
    torch.testing.assert_close(model(images()), want, rtol=1e-2, atol=1e-2)
    assert torch.equal(model[0].bias_0, before[0].bias) and model[2].bias_0 is None
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    x, y = images(16), torch.arange(16) % 10
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(functional.cross_entropy(model(x), y))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2


def test_energy_takes_the_least_rank_and_leaves_dense_what_would_not_shrink():
    model = convolutions()
    model[0].weight.data = sums_of_products(8, 3, (5, 5), 2)
    model[2].weight.data = torch.randn(12, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    errors = {}
    tt.factorize.flatten(model, energy=0.9999, errors=errors)
    assert model[0].rank == 2 and isinstance(model[2], nn.Conv2d) and set(errors) == {"0"}


def test_bad_input_is_refused_and_changes_nothing():
    model = convolutions()
    before = copy.deepcopy(model).state_dict()
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 2, padding="same"), nn.Conv2d(4, 4, 3))
    for arguments, error, sentence in (
        ({}, ValueError, "exactly one of rank and energy"),
        ({"rank": 1, "energy": 0.5}, ValueError, "exactly one of rank and energy"),
        ({"rank": 0}, ValueError, "rank of '0' must be from 1 to 15, got 0"),
        ({"rank": {"2": 10}}, ValueError, "rank of '2' must be from 1 to 9, got 10"),
        ({"rank": 1.5}, TypeError, "rank of '0' must be an int"),
        ({"energy": 1.5}, ValueError, "energy of '0' must be in"),
        ({"rank": 1, "seed": -1}, ValueError, "seed must be from 0 to 9223372036854775807, got -1"),
        ({"rank": 1, "seed": 2**63}, ValueError, "seed must be from 0 to 9223372036854775807"),
        ({"rank": 1, "errors": []}, TypeError, "errors must be a dict"),
        ({"rank": 1, "targets": "6"}, ValueError, r"be that of an nn\.Conv2d, got Linear"),
        ({"rank": {"0": 1}, "targets": "0"}, ValueError, "rank must be one number where targets is given"),
    ):
        with pytest.raises(error, match=sentence):
            tt.factorize.flatten(model, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match="of one group, got 2"):
        tt.factorize.flatten(grouped, 1, targets="0")
    with pytest.raises(ValueError, match=r"padding 'same' for the even kernel \(2, 2\)"):
        tt.factorize.flatten(grouped, 1, targets="1")
    assert isinstance(tt.factorize.flatten(grouped, 1)[2], FlattenedConv2d) and isinstance(grouped[1], nn.Conv2d)
    model[0].weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="weight of '0' must be finite"):
        tt.factorize.flatten(model, 1)
    with pytest.raises(ValueError, match=r"larger than 1x1, got none; '0': .* got torch.float64"):
        tt.factorize.flatten(convolutions().double(), 1)
    with pytest.raises(ValueError, match=r"weight must be \[F, C, kh, kw\]"):
        nearest_filters(torch.ones(3, 4), 1)
