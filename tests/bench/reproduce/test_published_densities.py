import json

import pytest
import torch

from tersetorch.bench.reproduce import published_densities
from tersetorch.bench.reproduce.published_densities import PUBLISHED, Published, run, table
from tersetorch.bench.reproduce.runs import How
from tersetorch.zoo import VGG16, AlexNet, LeNet5


class OneChannel(LeNet5):
    """LeNet-5 as AlexNet is called: on three channels, of which it sees one."""

    def forward(self, images):
        return super().forward(images[:, :1])


@pytest.fixture
def small(monkeypatch):
    published = {
        "alexnet_small": Published("here", OneChannel, 28, (60, 10, 5, 20), (1, 2, 3, 4), (80, 50, 30, 100), 7)
    }
    monkeypatch.setattr(published_densities, "PUBLISHED", published)


def test_every_byte_and_operation(small):
    record = run(How([0]))
    json.dumps(record)
    network = record["networks"]["alexnet_small"]
    conv1, conv2, fc1, fc2 = network["layers"]
    assert [row["weights"] for row in network["layers"]] == [500, 25_000, 400_000, 5_000]
    assert conv2["operations"] == 2 * 64 * 25_000
    assert conv2["operations_left"] == pytest.approx(0.10 * 0.80 * conv2["operations"], abs=1)
    assert fc1["kept"] == pytest.approx(20_000, rel=0.05)
    assert 32 < fc1["bits"] < 42 and fc1["file_bytes"] < fc1["bitmap_bytes"]
    assert fc1["csr16_bytes"] == pytest.approx(6 * fc1["kept"] + 4 * 501, abs=64)
    assert network["total"]["file_bytes"] == sum(row["file_bytes"] for row in (conv1, conv2, fc1, fc2))
    assert len(table(record).rows) == 5


def test_the_published_tables_fit_the_networks():
    for published in PUBLISHED.values():
        with torch.device("meta"):
            model = published.network()
        weights = [p.numel() for name, p in model.named_parameters() if name.endswith("weight")]
        assert len(published.kept) == len(weights)
        assert published.operations is None or len(published.operations) == len(weights)
        assert published.activations is None or len(published.activations) == len(weights)
        left = sum(part * size for part, size in zip(published.kept, weights, strict=True)) / sum(weights)
        assert left == pytest.approx(published.total, abs=0.6)
    assert {published.network for published in PUBLISHED.values()} == {AlexNet, VGG16}


def test_no_seed_is_refused():
    with pytest.raises(ValueError, match="seeds must hold a seed, got none"):
        run(How([]))
