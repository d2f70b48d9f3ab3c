import json

import pytest
from torch import nn

from tersetorch.bench.reproduce import layer_times
from tersetorch.bench.reproduce.runs import How


def small():
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 5)
    return nn.Sequential(*layers)


def test_a_row_is_whole(monkeypatch, tmp_path):
    monkeypatch.setattr(layer_times, "NETWORKS", {"small": (small, 8, (1, 128))})
    record = layer_times.run(How(quick=True))
    json.dumps(record)
    assert [row["batch"] for row in record["networks"]] == [1, 2]
    for row in record["networks"]:
        assert [each[:2] for each in row["layers"]] == [["0", "conv"], ["2", "conv"], ["4", "linear"]]
        assert sum(share for _, _, _, share in row["layers"]) == pytest.approx(100)
    assert len(layer_times.table(record).rows) == 2 + len(layer_times.PAPER)
    layer_times.draw(record, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000
