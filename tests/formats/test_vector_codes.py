"""Codes that a plain weight keeps beside it: in copies and pickles, not in states, and while it is what they say."""

import copy
import pickle

import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch.formats.vector_codes import VectorCodes, decode, note_codes, noted_codes


@pytest.fixture
def layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30))
    return tt.finalize(tt.quantize.residual(model, 5, 4))[0]


def test_stages_are_added_one_after_the_other():
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(6, (37, 7 * 3), generator=g, dtype=torch.uint8)
    books = torch.randn(7, 3, 4, 6, generator=g)
    expected = torch.zeros(37, 12)
    for stage in range(7):
        places = codes[:, 3 * stage : 3 * stage + 3].long()
        expected += torch.stack([books[stage, s].T[places[:, s]] for s in range(3)], 1).reshape(37, 12)
    for columns in (12, 11, 9):
        assert torch.equal(decode(codes, books, columns), expected[:, :columns])


def test_copies_and_pickles_keep_them_and_states_do_not(layer):
    found = noted_codes(layer, "weight")
    assert found.codes.shape == (30, 5) and found.codebooks.shape == (5, 1, 20, 4)
    assert torch.equal(decode(*found, 20), layer.weight)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        again = noted_codes(twin, "weight")
        assert torch.equal(again.codes, found.codes) and again.codes is not found.codes
    assert list(layer.state_dict()) == ["weight", "bias"]
    other = nn.Linear(20, 30)
    other.load_state_dict(layer.state_dict())
    assert noted_codes(other, "weight") is None and noted_codes(layer, "bias") is None


def test_a_changed_weight_is_not_what_they_say(layer):
    with torch.no_grad():
        layer.weight[3, 4] += 1e-3
        assert noted_codes(layer, "weight") is None
        layer.weight.copy_(decode(*vars(layer)["_tersetorch_vector_codes"]["weight"], 20))
    assert noted_codes(layer, "weight") is not None
    assert noted_codes(copy.deepcopy(layer).to("meta"), "weight") is None
    layer.weight = nn.Parameter(layer.weight.detach()[:29])
    assert noted_codes(layer, "weight") is None
    del layer.weight
    assert noted_codes(layer, "weight") is None


def test_rounded_sums_are_what_they_say(layer):
    assert noted_codes(layer.bfloat16(), "weight") is not None
    assert noted_codes(layer.float(), "weight") is None


def test_numbers_that_are_not_finite_are_refused(layer):
    found = noted_codes(layer, "weight")
    books = found.codebooks.clone()
    books[0, 0, 0] = float("nan")
    note_codes(layer, "weight", VectorCodes(found.codes, books))
    with torch.no_grad():
        layer.weight.copy_(decode(found.codes, books, 20))
    assert noted_codes(layer, "weight") is None


def test_what_made_another_weight_takes_them_away(layer):
    model = nn.Sequential(layer)
    for change in (lambda: tt.quantize.product(model, 4), lambda: tt.prune.magnitude(model, 0.5)):
        tt.finalize(tt.quantize.residual(model, 2, 4))
        assert noted_codes(layer, "weight") is not None
        change()
        tt.finalize(model)
        assert "_tersetorch_vector_codes" not in vars(layer)


def test_a_mask_over_sums_leaves_no_codes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30))
    tt.prune.magnitude(tt.quantize.residual(model, 2, 4), 0.5)
    assert noted_codes(tt.finalize(model)[0], "weight") is None
