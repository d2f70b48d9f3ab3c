import json

import torch

from tersetorch.bench.reproduce import low_rank_regularisation
from tersetorch.bench.reproduce.runs import How
from tersetorch.zoo import load


def test_a_row_is_whole(monkeypatch, tmp_path):
    monkeypatch.setattr(low_rank_regularisation, "load_data", lambda name, seed: load("digits", seed=seed))
    monkeypatch.setattr(low_rank_regularisation, "WIDTH", 64)
    record = low_rank_regularisation.run(How([0], quick=True))
    json.dumps(record)
    (row,) = record["seeds"]
    shares, ranks = record["plan"]["wrong"], list(record["plan"]["ranks"])
    for share in shares:
        found = row["networks"][str(share)]
        assert [rank for rank, *_ in found["errors"]] == [*ranks, None]
        assert found["rank"] == min(found["errors"][:-1], key=lambda error: error[2])[0] and found["ratio"] > 0
    names = {
        low_rank_regularisation.figure(name, share) for share in shares for name in ("dense", "truncated", "decayed")
    }
    assert record["mean"].keys() == names and all(0 <= row[name] <= 100 for name in names)
    assert len(low_rank_regularisation.table(record).rows) == len(shares)
    low_rank_regularisation.draw(record, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000


def test_wrong_labels_are_wrong():
    labels = torch.arange(1000) % 10
    changed = (low_rank_regularisation._labels(labels, 0.4, 0) != labels).double().mean()
    assert 0.3 < changed < 0.5
    assert torch.equal(low_rank_regularisation._labels(labels, 0.0, 0), labels)
