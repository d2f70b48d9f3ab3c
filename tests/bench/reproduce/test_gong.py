import json

import pytest
import torch

from tersetorch.bench.reproduce import gong
from tersetorch.bench.reproduce.runs import How
from tersetorch.zoo import load


def weight():
    return torch.randn(40, 30, generator=torch.Generator().manual_seed(0))


def test_bits_are_the_papers():
    found = {
        "KM": gong._scalars(2, weight(), 0),
        "PQ": gong._products(4, 16, False, False, weight(), 0),
        "PQ of inputs": gong._products(4, 16, False, True, weight(), 0),
        "PQ, one codebook": gong._products(4, 16, True, False, weight(), 0),
        "RQ": gong._residuals(2, 16, False, weight(), 0),
        "BIN": gong._signs("none", weight(), 0),
        "BIN, rows": gong._signs("row", weight(), 0),
        "MF": gong._factors(4, weight(), 0),
    }
    bits = {name: each.bits for name, each in found.items()}
    assert bits == {
        "KM": 2 * 1200 + 32 * 4,
        "PQ": 4 * 40 * 8 + 32 * 8 * 4 * 16,
        "PQ of inputs": 4 * 30 * 10 + 32 * 10 * 4 * 16,
        "PQ, one codebook": 4 * 40 * 8 + 32 * 4 * 16,
        "RQ": 2 * (4 * 40 + 32 * 30 * 16),
        "BIN": 1200,
        "BIN, rows": 1200 + 32 * 40,
        "MF": 32 * 4 * 71,
    }
    for name, each in found.items():
        lost = (each.weight - weight()).norm() / weight().norm()
        assert each.weight.shape == (40, 30) and (lost < 0.9 or name == "BIN"), name


def test_the_best_setting_that_fits_is_chosen():
    points = [[4.0, 1.0, "a"], [8.5, 3.0, "b"], [9.0, 2.0, "c"], [20.0, 9.0, "d"]]
    assert gong._best(points, 2) == 0 and gong._best(points, 8) == 2 and gong._best(points, 30) is None


def test_a_row_is_whole(monkeypatch):
    monkeypatch.setattr(gong, "load_data", lambda name, seed: load("digits", seed=seed))
    monkeypatch.setattr(gong, "NETWORKS", {"small": ((16, 12), 1)})
    record = gong.run("small", How([0], quick=True))
    json.dumps(record)
    (row,) = record["seeds"]
    assert row["points"].keys() == row["chosen"].keys() == record["plan"]["settings"].keys()
    for name, settings in record["plan"]["settings"].items():
        assert [point[2] for point in row["points"][name]] == settings
        assert all(
            chosen is None or chosen[1] * gong.FITS >= ratio
            for chosen, ratio in zip(row["chosen"][name], gong.RATIOS, strict=True)
        )
    assert len(gong.table(record).rows) == len(gong.RATIOS)


def test_table_and_picture(tmp_path):
    pytest.importorskip("matplotlib")
    chosen = {"KM": [["2 bits", 16.0, 2.5], None], "PQ": [["4 columns", 17.0, 3.5], ["4 columns", 33.0, 4.0]]}
    record = {
        "plan": {"hidden": [300, 100], "settings": {"KM": ["2 bits"], "PQ": ["4 columns"]}, "ratios": [16, 32]},
        "seeds": [{"dense_test": 2.0, "chosen": chosen}, {"dense_test": 2.2, "chosen": chosen}],
    }
    json.dumps(record)
    shown = gong.table(record)
    assert list(shown.columns[1].cells) == ["+0.40 (+0.50)", "-"]
    gong.draw(record, tmp_path / "gong.svg")
    assert (tmp_path / "gong.svg").stat().st_size > 1000
