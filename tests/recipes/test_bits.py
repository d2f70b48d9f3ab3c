import copy
import itertools
import json
import re

import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch.methods import finalize, quantize
from tersetorch.recipes.bits import share_to_budget


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 12), nn.ReLU(), nn.Linear(12, 5))
    model[2].weight.data = torch.distributions.StudentT(2.0).sample((12, 40))
    return model


def file_size(model, tmp_path):
    tt.save(model, tmp_path / "model.terse")
    return (tmp_path / "model.terse").stat().st_size


@pytest.mark.parametrize("nbytes", [1500, 1700, 2000])
def test_the_file_fits_and_no_choice_that_fits_errs_less(model, tmp_path, nbytes):
    dense = copy.deepcopy(model)
    report = share_to_budget(model, nbytes=nbytes, bits=(2, 4, 6))
    assert file_size(finalize(copy.deepcopy(model)), tmp_path) == report.nbytes <= nbytes
    assert [len(model[int(name)].weight.unique()) <= 2**width for name, width in report.bits.items()] == [True] * 3
    again = finalize(quantize.kmeans(copy.deepcopy(dense), report.bits))
    assert torch.equal(again[2].weight, model[2].weight)
    errors = {
        name: float((again[int(name)].weight.detach() - dense[int(name)].weight.detach()).square().sum())
        / float(dense[int(name)].weight.square().sum())
        for name in report.bits
    }
    assert report.error == pytest.approx(sum(errors.values()), rel=1e-4)
    for widths in itertools.product((2, 4, 6), repeat=3):
        choice = dict(zip(report.bits, widths, strict=True))
        if sum(report.errors[name][width] for name, width in choice.items()) < report.error * 0.999:
            assert file_size(finalize(quantize.kmeans(copy.deepcopy(dense), choice)), tmp_path) > nbytes - 10
    json.dumps(report.to_dict())


def test_a_budget_that_a_choice_meets_to_the_byte_is_used(model, tmp_path):
    for widths in ((2, 6, 4), (6, 2, 2), (4, 4, 6), (6, 6, 6), (2, 2, 2)):
        chosen = quantize.kmeans(copy.deepcopy(model), dict(zip(("0", "2", "4"), widths, strict=True)))
        nbytes = file_size(finalize(chosen), tmp_path)
        report = share_to_budget(copy.deepcopy(model), nbytes=nbytes, bits=(2, 4, 6))
        expected = sum(report.errors[name][width] for name, width in zip(report.bits, widths, strict=True))
        assert report.nbytes <= nbytes and report.error <= expected * (1 + 1e-9)


def test_the_smallest_file_within_an_error(model):
    dense = copy.deepcopy(model)
    loose = share_to_budget(model, error=0.1)
    tight = share_to_budget(dense, error=0.01)
    assert loose.error <= 0.1 and tight.error <= 0.01
    assert loose.nbytes < tight.nbytes
    for name, width in tight.bits.items():  # no layer alone could be smaller
        for fewer in range(1, width):
            if tight.layer_bytes[name][fewer] < tight.layer_bytes[name][width]:
                assert tight.error - tight.errors[name][width] + tight.errors[name][fewer] > 0.01 * 0.999


def test_data_moves_bits_to_the_layer_whose_inputs_weigh(model):
    x = torch.randn(64, 30) * torch.logspace(-2, 1, 30)
    report = share_to_budget(model, error=0.05, data=[x], per="row", bfloat16=True, targets=["0", "2"])
    h = x.double().square().mean(0)
    assert set(report.bits) == {"0", "2"}
    assert torch.equal(model[0].weight, model[0].weight.bfloat16().float())
    assert report.error <= 0.05 and float(h[0]) < float(h[-1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "exactly one of nbytes and error must be given, got none"),
        ({"nbytes": 9, "error": 1.0}, ValueError, "exactly one of nbytes and error must be given, got both"),
        ({"nbytes": 0}, ValueError, "nbytes must be at least 1, got 0"),
        ({"nbytes": 400}, ValueError, "nbytes must be at least .*, what the file takes at the best, got 400"),
        ({"error": 1e-12}, ValueError, "error must be at least .*, got 1e-12; raise it"),
        ({"error": 0}, ValueError, "error must be positive, got 0"),
        ({"error": float("nan")}, ValueError, "error must be finite and at least 0, got nan"),
        ({"error": 0.1, "bits": ()}, ValueError, "bits must hold at least one number, got none"),
        ({"error": 0.1, "bits": 5}, TypeError, "bits must be a sequence of ints, got 5"),
        ({"error": 0.1, "bits": (9,)}, ValueError, "bits must be from 1 to 8, got 9"),
        ({"error": 0.1, "data": iter([1])}, TypeError, "data must be iterable 10 times"),
    ],
)
def test_bad_arguments_change_nothing(model, arguments, error, message):
    with pytest.raises(error, match=f"share_to_budget: {message}"):
        share_to_budget(model, **arguments)
    assert type(model[0]) is nn.Linear


def test_the_least_that_is_named_is_enough(model):
    with pytest.raises(ValueError) as refused:
        tt.share_to_budget(copy.deepcopy(model), nbytes=10)
    least = int(re.search(r"at least (\d+)", str(refused.value))[1])
    assert tt.share_to_budget(copy.deepcopy(model), nbytes=least).nbytes == least
    with pytest.raises(ValueError, match=f"must be at least {least}, what the file takes at the best, got {least - 1}"):
        tt.share_to_budget(model, nbytes=least - 1)
