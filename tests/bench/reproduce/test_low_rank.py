import json

import pytest
import torch

from tersetorch.bench.reproduce import low_rank
from tersetorch.bench.reproduce.runs import How
from tersetorch.nn import ClusteredConv2d
from tersetorch.zoo import LeNet300100, load


def images(count, seed, size=(3, 32, 32)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *size, generator=generator), torch.randint(10, (count,), generator=generator)


@pytest.mark.parametrize("network", ["linear", "convolutions"])
def test_a_row_is_whole(monkeypatch, tmp_path, network):
    monkeypatch.setattr(low_rank, "TIMED_SECONDS", 0.01)
    if network == "linear":
        monkeypatch.setattr(low_rank, "load_data", lambda name, seed: load("digits", seed=seed))
        monkeypatch.setattr(low_rank, "LeNet300100", lambda: LeNet300100(64))
    else:
        parts = low_rank.Images(images(140, 0), images(20, 1), images(20, 2))
        monkeypatch.setattr(low_rank, "cifar10", lambda seed: parts)
    record = getattr(low_rank, f"run_{network}")(How([0], quick=True))
    json.dumps(record)
    (row,) = record["seeds"]
    assert row["points"].keys() == row["chosen"].keys() == record["plan"]["settings"].keys()
    for form, settings in record["plan"]["settings"].items():
        assert [point["setting"] for point in row["points"][form]] == settings
        assert all(point["ratio"] > 1 for point in row["points"][form])
    assert len(low_rank.table(record).rows) == sum(map(len, record["plan"]["settings"].values()))
    low_rank.draw(record, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000


def test_settings_run_from_the_largest_to_the_smallest():
    dense = sum(parameter.numel() for parameter in low_rank._cnn(0).parameters())
    for form, settings in low_rank._convolution_forms(short=False).items():
        sizes = []
        for _, approximate in settings:
            if "outer" in form:  # takes a while: the layer it makes alone
                options = {"in_clusters": 4, "out_clusters": 2} if "clusters" in form else {}
                model = low_rank._cnn(0)
                model[3] = ClusteredConv2d(32, 64, 5, approximate.args[0], **options)
            else:
                model = low_rank._cnn(0)
                approximate(model)
            sizes.append(sum(parameter.numel() for parameter in model.parameters()))
        assert dense > sizes[0] and sizes == sorted(sizes, reverse=True), form
