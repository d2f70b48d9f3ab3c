import copy
import json

import pytest
import torch

from tersetorch.bench.reproduce import optimal_brain_surgeon
from tersetorch.bench.reproduce.optimal_brain_surgeon import (
    METHODS,
    MONKS,
    TwoLayers,
    delete,
    examples,
    monks_table,
    run_monks,
    run_xor,
    train,
    xor_table,
)
from tersetorch.bench.reproduce.runs import How


@pytest.mark.parametrize(("name", "count"), [("monk1", 216), ("monk2", 142), ("monk3", 228)])
def test_the_problems_are_those_of_the_rules(name, count):
    x, labels = examples(MONKS[name])
    assert x.shape == (432, 17) and len(x.unique(dim=0)) == 432
    assert torch.equal(x.sum(1), torch.full((432,), 6.0).double())
    assert int(labels.sum()) == count


def test_gradients_are_autograds():
    net, x = TwoLayers(5, 3, 0), torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).double()
    y, j = net.gradients(x, net.weights())
    torch.testing.assert_close(y, net(x).detach())
    for row, each in zip(j, net(x), strict=True):
        expected = torch.autograd.grad(each, list(net.parameters()), retain_graph=True)
        torch.testing.assert_close(row, torch.cat([gradient.flatten() for gradient in expected]))


def test_each_method_deletes_its_least_salient_weight_and_training_keeps_it_out():
    x, labels = examples(MONKS["monk1"])
    dense = train(TwoLayers(17, 3, 0), x, labels, 1e-3, 20)
    w = dense.weights()
    j = dense.gradients(x, w)[1]
    hessian = j.T @ j / len(x) + 1e-4 * torch.eye(len(w)).double()
    saliency = {
        "magnitude": w.abs(),
        "obd": w.square() * j.square().mean(0),
        "obs": w.square() / torch.linalg.inv(hessian).diagonal(),
    }
    for method in METHODS:
        net = delete(copy.deepcopy(dense), x, method)
        gone = (net.weights() == 0).nonzero().flatten().tolist()
        assert gone == [int(saliency[method].argmin())]
        train(net, x, labels, 1e-3, 5)
        assert (net.weights() == 0).nonzero().flatten().tolist() == gone


def test_xor():
    record = run_xor(How([0, 1], quick=True))
    json.dumps(record)
    assert all(1 <= row["networks"] <= 4 for row in record["seeds"])
    assert record["worst"]["obs"] == 1
    assert len(xor_table(record).rows) == 4


def test_monks(monkeypatch):
    monkeypatch.setattr(optimal_brain_surgeon, "MONKS", {"monk3": MONKS["monk3"]})
    monkeypatch.setattr(optimal_brain_surgeon, "PAPER", {"monk3": optimal_brain_surgeon.PAPER["monk3"]})
    record = run_monks(How([3], quick=True))
    json.dumps(record)
    row = record["seeds"][0]["monk3"]
    for method in METHODS:
        assert 1 <= row[method]["left"] == record["worst"][f"monk3_{method}"] < 39
        assert row[method]["train"] >= row["dense"]["train"]
    cells = [str(cell) for column in monks_table(record).columns for cell in column.cells]
    assert {"monk3, paper: obs", "90 %", "97.2 %", f"{row['obs']['all']:.1f} %"} <= set(cells)
