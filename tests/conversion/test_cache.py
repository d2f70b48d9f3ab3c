import json

import pytest

from tersetorch.conversion.cache import DecisionCache, directory

KEY = {"shape": [3, 2], "threads": 1}


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TERSETORCH_CACHE", str(tmp_path / "new"))
    return tmp_path / "new" / "decisions"


def test_round_trip(folder):
    cache = DecisionCache()
    assert cache.load(KEY) is None
    cache.store(KEY, {"chosen": "csr"})
    assert DecisionCache().load(KEY) == {"chosen": "csr"}
    assert cache.load(KEY | {"threads": 2}) is None
    assert cache.problem is None
    assert [path.suffix for path in folder.iterdir()] == [".json"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_text(""),
        lambda path: path.write_text("{"),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text('"text"'),
        lambda path: path.write_text(path.read_text().replace("csr", "dense")),
        lambda path: path.write_text(json.dumps({"key": KEY, "decision": 3, "digest": "0"})),
        lambda path: path.write_bytes(b"\xff\xfe"),
        lambda path: path.write_text("[" * 100_000),
        lambda path: (path.unlink(), path.mkdir()),
    ],
)
def test_a_spoilt_file_is_noted_and_ignored(folder, spoil):
    DecisionCache().store(KEY, {"chosen": "csr"})
    (path,) = folder.iterdir()
    spoil(path)
    cache = DecisionCache()
    assert cache.load(KEY) is None
    assert str(path) in cache.problem


def test_a_folder_that_cannot_be_made_is_noted(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TERSETORCH_CACHE", str(tmp_path / "file"))
    cache = DecisionCache()
    cache.store(KEY, {"chosen": "csr"})
    assert "must be writable" in cache.problem
    assert cache.load(KEY) is None


def test_nothing_is_left_behind_when_a_write_fails(folder, monkeypatch):
    cache = DecisionCache()
    cache.store(KEY, {"chosen": "csr"})

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    cache.store(KEY, {"chosen": "dense"})
    assert len(list(folder.iterdir())) == 1
    assert cache.load(KEY) == {"chosen": "csr"}
    assert "disk full" in cache.problem


def test_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("TERSETORCH_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert directory() == tmp_path / "tersetorch"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert directory() == tmp_path / ".cache" / "tersetorch"
