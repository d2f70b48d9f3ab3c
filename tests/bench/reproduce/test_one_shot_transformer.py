import json
import math
import subprocess

import pytest
import torch

from tersetorch.bench.reproduce import one_shot, one_shot_transformer
from tersetorch.bench.reproduce.runs import How

TEXT = b"the quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture
def small(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(one_shot_transformer, "read_text", lambda: TEXT)
    for module in (one_shot, one_shot_transformer):
        monkeypatch.setattr(module, "SETTINGS", {"2:4": {"pattern": "2:4"}})
    yield
    torch.set_num_threads(before)


def test_the_record_is_whole(small):
    record = one_shot_transformer.run(How([3], quick=True))
    json.dumps(record)
    (row,) = record["seeds"]
    assert set(record["mean"]) == {"dense", *(f"2:4 {method}" for method in one_shot.METHODS)}
    uniform = math.log(len(set(TEXT)))
    assert 0 < row["held-out dense"] < uniform and all(0 < row[name] < 2 * uniform for name in record["mean"])
    assert len({row[name] for name in record["mean"]}) == len(record["mean"])
    shown = one_shot_transformer.table(record)
    assert [str(cell) for cell in shown.columns[0].cells] == ["dense", *one_shot.METHODS]
    loss, perplexity = (str(list(shown.columns[place].cells)[1]) for place in (1, 2))
    assert loss == f"{row['2:4 magnitude']:.3f}" and perplexity == f"{math.exp(row['2:4 magnitude']):.2f}"
    again = one_shot_transformer.run(How([3], quick=True))
    assert again["mean"] == record["mean"]


def test_the_loss_is_of_every_place_of_whole_passages():
    torch.manual_seed(0)
    model = torch.nn.Embedding(5, 5)  # what follows depends on the last symbol alone
    codes = torch.randint(5, (1000,))
    each = torch.nn.functional.cross_entropy(model(codes[:-1]), codes[1:], reduction="none").detach()
    assert one_shot_transformer._nats(model, codes, 9) == pytest.approx(float(each.mean()), rel=1e-5)  # 9 * 111 = 999


def test_a_text_that_is_another_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("TERSETORCH_DATA", str(tmp_path))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "botchan.txt").write_bytes(b"no novel")
    with pytest.raises(ValueError, match=r"botchan\.txt must have SHA-256 464bd53.*, got .*; take it from sentence"):
        one_shot_transformer.read_text()


def test_what_cannot_be_downloaded_has_its_sentence(monkeypatch, tmp_path):
    def refuse(command, **_):
        raise subprocess.CalledProcessError(1, command, stderr="a warning\nERROR: no matching distribution\n")

    monkeypatch.setenv("TERSETORCH_DATA", str(tmp_path))
    monkeypatch.setattr(one_shot_transformer.subprocess, "run", refuse)
    with pytest.raises(
        FileNotFoundError, match=r"got neither \(ERROR: no matching distribution\); connect to an index"
    ):
        one_shot_transformer.read_text()
