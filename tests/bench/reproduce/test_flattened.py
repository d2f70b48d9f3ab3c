import json

import pytest
import torch

from tersetorch.bench.reproduce import flattened
from tersetorch.bench.reproduce.runs import How


def images(shape, count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator), torch.randint(10, (count,), generator=generator)


@pytest.mark.parametrize("data", flattened.PAPER)
def test_a_row_is_whole(monkeypatch, tmp_path, data):
    channels, size = flattened.SHAPES[data]
    parts = flattened.Images(*(images((channels, size, size), count, count) for count in (64, 20, 21)))
    monkeypatch.setitem(flattened.IMAGES, data, lambda seed, count: parts)
    monkeypatch.setattr(flattened, "PAPER_WIDTHS", (6, 8, 10))
    record = flattened.run(data, How([0], quick=True))
    record = json.loads(json.dumps(record))
    (row,) = record["seeds"]
    assert row["begun"] in row["flattened"] and row["flattened"].keys() == set(flattened.BEGINNINGS)
    assert [point["rank"] for point in row["converted"]] == record["plan"]["ranks"]
    first, second = row["converted"]
    assert first["weights"] < second["weights"] and all(
        first["left_out"][n] > second["left_out"][n] for n in first["left_out"]
    )
    assert len(record["times"]) == len(flattened.PARTS) * len(flattened.BATCHES)
    assert all(len(each["ms"]) == 6 for each in record["times"])
    assert len(flattened.table(record).rows) == 2 + len(flattened.BEGINNINGS) + len(record["plan"]["ranks"])
    flattened.draw(record, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000


def test_weights_of_the_papers_network():
    plan = flattened.full_plan("cifar")
    dense, flat = (flattened._network(plan, kind, widths=flattened.PAPER_WIDTHS) for kind in (False, True))
    # 75 * 96 of both; 25 C F against F (C + 10) and F (F + 10) of the two stages.
    assert flattened._weights(dense) == 7_200 + 25 * 96 * 128 + 25 * 128 * 256
    assert flattened._weights(flat) == 7_200 + 128 * (106 + 138) + 256 * (138 + 266)
    assert 7.9 < flattened._weights(dense) / flattened._weights(flat) < 8.1


@pytest.mark.parametrize(
    ("begun", "bounds"),
    [
        ("as nn.Conv2d's", {"lateral_0": 1 / 2, "lateral_1": 1 / 4, "vertical_0": 5**-0.5, "bias_1": 5**-0.5}),
        ("as the paper's code", {"lateral_0": 1 / 2, "lateral_1": 1 / 4, "vertical_0": 1 / 4, "bias_1": 1 / 4}),
    ],
)
def test_beginnings(begun, bounds):
    model = flattened._network(flattened.full_plan("mnist"), True, widths=(4, 16, 9))
    flattened._begin(model, begun, 0)
    for name, bound in bounds.items():
        largest = model.conv2.get_parameter(name).abs().max()
        assert 0.7 * bound < largest <= bound, name
