import dataclasses
import json

import pytest
import torch

from tersetorch.bench.reproduce import ROWS, trade_off
from tersetorch.bench.reproduce.runs import How
from tersetorch.zoo import load


@pytest.fixture
def small_digits(monkeypatch):
    def loaded(name, seed):
        data = load("digits", seed=seed)
        parts = {"train_images": data.train_images[:512], "train_labels": data.train_labels[:512]}
        return dataclasses.replace(data, **parts)

    monkeypatch.setattr(trade_off, "load_data", loaded)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_record_holds_the_five_curves(small_digits):
    record = trade_off.run(How([0], quick=True))
    json.dumps(record)
    (row,) = record["seeds"]
    sparsities = record["plan"]["sparsities"]
    assert list(row["curves"]) == sorted(trade_off.CURVES, key=list(row["curves"]).index)
    for curve in row["curves"].values():
        assert [sparsity for sparsity, _ in curve] == sparsities
        assert all(0 <= error <= 100 for _, error in curve)
    assert len(trade_off.table(record).rows) == len(sparsities)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.draw is not None])
def test_every_stored_record_that_has_a_picture_is_drawn(name, tmp_path):
    pytest.importorskip("matplotlib")
    from tersetorch.bench.tables import RESULTS

    path = RESULTS / f"{name}.json"
    if not path.exists():
        pytest.skip(f"no stored record of {name}")
    ROWS[name].draw(json.loads(path.read_text()), tmp_path / "drawn.svg")
    assert "<svg" in (tmp_path / "drawn.svg").read_text()
