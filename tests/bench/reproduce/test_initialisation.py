import json

import pytest
import torch

from tersetorch.bench.reproduce import initialisation
from tersetorch.bench.reproduce.initialisation import INITS, draw, run, table
from tersetorch.bench.reproduce.runs import How
from tersetorch.zoo import load


@pytest.fixture
def record(monkeypatch):
    monkeypatch.setattr(initialisation, "load_data", lambda name, seed: load("digits", seed=seed))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run(How([0], quick=True))
    torch.set_num_threads(before)


def test_the_curves_are_whole(record, tmp_path):
    json.dumps(record)
    (row,) = record["seeds"]
    assert set(row["curves"]) == set(INITS)
    for curve in row["curves"].values():
        assert all(len(curve[kind]) == 2 for kind in ("error", "trained", "distortion"))
        assert curve["distortion"][0] > curve["distortion"][1]
    exact = row["curves"]["exact"]["distortion"]
    assert all(exact[index] <= curve["distortion"][index] for curve in row["curves"].values() for index in (0, 1))
    assert table(record).row_count == 2
    pytest.importorskip("matplotlib")
    draw(record, tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").stat().st_size > 1000
