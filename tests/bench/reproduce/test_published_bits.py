import json

import numpy as np
import pytest
import torch

from tersetorch.bench.reproduce import published_bits
from tersetorch.bench.reproduce.accounting import gap_counts
from tersetorch.bench.reproduce.published_bits import CONV_BITS, LINEAR_BITS, PUBLISHED_BITS, Bits, run, table
from tersetorch.bench.reproduce.runs import How
from tersetorch.zoo import LeNet5


def test_every_byte_is_counted(monkeypatch):
    four = (1.0, 2.0, 3.0, 4.0)
    small = Bits("here", LeNet5, (66, 12, 8, 19), 5, (7.2, 6.0, 3.9, 4.2), four, four, four, (33, 39), 44_000)
    monkeypatch.setattr(published_bits, "PUBLISHED_BITS", {"lenet_5": small})
    record = run(How([0]))
    json.dumps(record)
    network = record["networks"]["lenet_5"]
    conv1, conv2, fc1, fc2 = network["layers"]
    assert [row["weights"] for row in network["layers"]] == [500, 25_000, 400_000, 5_000]
    assert [row["value_bits"] for row in network["layers"]] == [CONV_BITS, CONV_BITS, LINEAR_BITS, LINEAR_BITS]
    assert fc1["kept"] == pytest.approx(32_000, rel=0.05)
    for row in (conv2, fc1, fc2):
        assert row["shared_bytes"] == (row["kept"] + row["fillers"]) * (row["value_bits"] + 5) / 8 + (
            4 << row["value_bits"]
        )
        coded = (row["kept"] + row["fillers"]) * (row["code_bits"] + row["position_bits"]) / 8 + (
            4 << row["value_bits"]
        )
        assert row["huffman_bytes"] == pytest.approx(coded)
    assert fc1["file_bytes"] < fc1["huffman_bytes"] < fc1["shared_bytes"] < fc1["dense_bytes"] / 20
    assert [row["code_bits"] for row in (conv2, fc1)] == pytest.approx([6.0, 3.9], abs=0.35)
    # What the paper prints for LeNet-5 (the two large layers): our accounting is its.
    percent = [100 * row["shared_bytes"] / row["dense_bytes"] for row in network["layers"]]
    assert percent[1:3] == pytest.approx([6.0, 2.7], rel=0.05)
    assert network["total"]["file_bytes"] == sum(row["file_bytes"] for row in network["layers"])
    assert conv1["published"] == {"code_bits": 7.2, "position_bits": 1, "shared_percent": 1, "percent": 1}
    assert len(table(record).rows) == 5


def test_fillers_are_as_many_as_chance_makes():
    rng = np.random.default_rng(0)
    density = 0.09
    _, fillers = gap_counts(np.flatnonzero(rng.random(1_000_000) < density), 4)
    none_in_16 = (1 - density) ** 16
    assert fillers / (density * 1_000_000) == pytest.approx(none_in_16 / (1 - none_in_16), rel=0.02)


def test_the_published_tables_fit_the_networks():
    for published in PUBLISHED_BITS.values():
        with torch.device("meta"):
            sizes = [p.numel() for name, p in published.network().named_parameters() if name.endswith("weight")]
        for column in ("kept", "code_bits", "position_bits", "shared_percent", "percent"):
            assert len(getattr(published, column)) == len(sizes)
        for column, ratio in zip(("shared_percent", "percent"), published.ratios, strict=True):
            of_all = sum(p * n for p, n in zip(getattr(published, column), sizes, strict=True)) / sum(sizes)
            # VGG-16's printed layers add up to 33x before Huffman coding, where its total says 31x.
            assert 100 / of_all == pytest.approx(ratio, rel=0.08)


def test_no_seed_is_refused():
    with pytest.raises(ValueError, match="seeds must hold a seed, got none"):
        run(How([]))
