import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from tersetorch.bench.reproduce import published_squeezenet
from tersetorch.bench.reproduce.published_squeezenet import FILE, run, table
from tersetorch.bench.reproduce.runs import How

ROOT = Path(os.environ.get("TERSETORCH_DATA", ""))


def small(path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Flatten(), nn.Linear(8 * 9, 4, bias=False))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(torch.randint(-20, 21, layer.weight.shape) / 8.0)
            layer.weight[layer.weight.abs() < 1] = 0
    return model


def test_every_byte_and_answer_is_counted(tmp_path, monkeypatch):
    (tmp_path / FILE).parent.mkdir()
    (tmp_path / FILE).write_bytes(bytes(1000))
    monkeypatch.setenv("TERSETORCH_DATA", str(tmp_path))
    monkeypatch.setattr(published_squeezenet, "squeezenet_from_deep_compression", small)
    images = torch.randint(256, (12, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(published_squeezenet, "read_imagenet100", lambda: (images, torch.zeros(12, dtype=torch.int64)))
    monkeypatch.setattr(published_squeezenet, "caffe_input", lambda part: part.float())
    record = run(How())
    json.dumps(record)
    wide, narrow = record["networks"]
    assert wide["bytes_published"] == 1000 and wide["bytes"] == sum(wide["parts"].values())
    assert wide["agree"] == 12 == narrow["agree"]  # 41 values: 6 bits hold them all
    assert record["by_coder"]["codes"]["packed"] > 0 and record["by_coder"]["positions"]["bitmap"] == 27
    assert table(record).row_count == 10
    assert run(How(quick=True))["images"] == 10


def test_the_data_must_be_there(tmp_path, monkeypatch):
    monkeypatch.setenv("TERSETORCH_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="TERSETORCH_DATA must name a folder with models/squeezenet"):
        run(How())


@pytest.mark.skipif(not (ROOT / FILE).is_file(), reason=f"wants TERSETORCH_DATA with {FILE}")
def test_the_stored_record_is_of_this_code(tmp_path):
    import tersetorch as tt
    from tersetorch.zoo import squeezenet_from_deep_compression

    stored = json.loads((Path(tt.__file__).parents[2] / "bench/results/published_squeezenet.json").read_text())
    tt.save(squeezenet_from_deep_compression(ROOT / FILE), tmp_path / "m.terse")
    assert (tmp_path / "m.terse").stat().st_size == stored["networks"][0]["bytes"] <= 540_000
