import json
from dataclasses import replace

import pytest
import torch

from tersetorch.bench.reproduce import fixed_point
from tersetorch.bench.reproduce.runs import How
from tersetorch.methods.quantize.fixed_point import FixedActivations, FixedWeight


def images(data, count, seed):
    generator = torch.Generator().manual_seed(seed)
    size = (3, 32, 32) if data == "cifar_cnn" else (1, 28, 28)
    return torch.randn(count, *size, generator=generator), torch.randint(10, (count,), generator=generator)


def parts(data):
    return fixed_point.Images(images(data, 60, 0), images(data, 20, 1), images(data, 20, 2))


@pytest.fixture(params=fixed_point.PLANS)
def data(request, monkeypatch):
    monkeypatch.setattr(fixed_point, "IMAGES", {request.param: lambda seed, count: parts(request.param)})
    plan = replace(fixed_point.PLANS[request.param], width=4, epochs=2, batch_size=20)
    monkeypatch.setattr(fixed_point, "quick_plan", lambda name: plan)
    return request.param


def test_a_row_is_whole(data, tmp_path):
    record = fixed_point.run(data, How([0], quick=True))
    json.dumps(record)
    (row,) = record["seeds"]
    assert row["held_out"].keys() == record["mean"].keys() == set(fixed_point.names())
    assert all(0 <= row[name] <= 100 for name in fixed_point.names())
    shown = fixed_point.table(record)
    assert len(shown.rows) == 1 + len(fixed_point.FRACTION_BITS)
    fixed_point.draw(record, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000


def test_the_switch_leaves_the_other_run_alone(data):
    plan = fixed_point.quick_plan(data)
    train = parts(data).train
    alone, with_copy = (fixed_point.Run(data, plan, 0, "stochastic", 12) for _ in range(2))
    alone.train(train, range(2), None, "")
    with_copy.train(train, range(1), None, "")
    other = with_copy.switched()
    other.train(train, range(1, 2), None, "")
    with_copy.train(train, range(1, 2), None, "")
    ours, others, wanted = (list(each.model.parameters()) for each in (with_copy, other, alone))
    assert all(torch.equal(*pair) for pair in zip(ours, wanted, strict=True))
    assert any((tensor * 2**12 % 1 != 0).any() for tensor in others)
    weights = {str(m.values.format) for m in other.model.modules() if isinstance(m, FixedWeight)}
    outputs = {str(m.outputs.format) for m in other.model.modules() if isinstance(m, FixedActivations)}
    assert weights == {"<4,16>"} and outputs == {"<6,14>" if data == "mnist_cnn" else "<4,16>"}
