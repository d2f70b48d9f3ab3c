import json

import pytest
import torch

from tersetorch.bench.reproduce import one_shot
from tersetorch.bench.reproduce.runs import How
from tersetorch.zoo import CifarResNet


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A network of two blocks a stage and noise for images."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)

    def read(part, per_class):
        generator = torch.Generator().manual_seed(int(part == "test"))
        labels = torch.arange(10).repeat_interleave(per_class)
        return torch.randint(256, (len(labels), 3, 8, 8), generator=generator, dtype=torch.uint8), labels

    torch.manual_seed(0)
    monkeypatch.setattr(one_shot, "ResNet20", lambda: CifarResNet(8))
    monkeypatch.setattr(one_shot, "read_cifar10", read)
    monkeypatch.setattr(one_shot, "load_file", lambda path: CifarResNet(8).state_dict())
    monkeypatch.setattr(one_shot, "SETTINGS", {"2:4": {"pattern": "2:4"}})
    yield
    torch.set_num_threads(before)


def test_the_record_is_whole():
    record = one_shot.run(How([3], quick=True))
    json.dumps(record)
    (row,) = record["seeds"]
    names = ["dense", *(f"2:4 {method}" for method in one_shot.METHODS)]
    assert {f"{name}{kind}" for name in names for kind in ("", ", batch norm anew")} == set(record["mean"])
    assert all(0 <= row[name] <= 100 for name in record["mean"])
    shown = one_shot.table(record)
    assert [str(cell) for cell in shown.columns[0].cells] == ["dense", *one_shot.METHODS]
    assert str(list(shown.columns[2].cells)[1]) == f"{row['2:4 magnitude, batch norm anew']:.1f} %"
