import json

import pytest
import torch

import tersetorch as tt
from tersetorch.recipes.compression_record import CompressionRecord, Point, record_path


@pytest.fixture
def terse_file(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.ReLU(), torch.nn.Linear(30, 10))
    tt.prune.magnitude(model, sparsity=0.8)
    tt.save(model, tmp_path / "model.terse")
    return tmp_path / "model.terse"


def record(file):
    point = Point(label="dense", file_bytes=file.stat().st_size, error_percent=2.5)
    return CompressionRecord(data="digits", examples=300, before=point, after=point)


def test_report_measures_and_takes_the_record_beside_the_file(tersetorch, terse_file, tmp_path):
    record(terse_file).write(record_path(terse_file))
    done = tersetorch("report", terse_file, "-o", tmp_path / "report.html", "--input-shape", "2x40", "--json")
    assert done.returncode == 0, done.stderr
    page, plain = (tmp_path / "report.html").read_text(), json.loads(done.stdout)
    assert "2.50 %" in page and "2x40" in page
    assert plain["file"] == tt.inspect(terse_file).to_dict() and plain["record"] == record(terse_file).model_dump()
    assert plain["picojoules"]["before"] >= plain["picojoules"]["after"] > 0
    assert len(plain["conversion"]["layers"]) == 2
    assert [path.name for path in tmp_path.glob("report*")] == ["report.html"]


def test_report_without_measuring(tersetorch, terse_file, tmp_path):
    done = tersetorch("report", terse_file, "--output", tmp_path / "report.html")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and "not recorded" in (tmp_path / "report.html").read_text()


def test_report_refuses_what_it_cannot_use(tersetorch, terse_file, tmp_path):
    page = tmp_path / "report.html"
    missing = tersetorch("report", terse_file, "-o", tmp_path / "nowhere" / "report.html")
    assert missing.returncode == 1 and "report: path must lie in a folder that exists" in missing.stderr
    record_path(terse_file).write_text('{"format": 1, "data": "x", "examples": -1}')
    done = tersetorch("report", terse_file, "-o", page)
    assert done.returncode == 1 and "must be what 'tersetorch compress' writes beside its file" in done.stderr
    none = tersetorch("report", terse_file, "-o", page, "--record", tmp_path / "none.json")
    assert none.returncode == 1 and "none.json" in none.stderr and not page.exists()
    wrong = tersetorch("report", terse_file, "-o", page, "--input-shape", "1x41")
    assert wrong.returncode == 1 and not page.exists()


def test_report_takes_no_record_of_another_file_and_ends_no_input(tersetorch, terse_file, tmp_path):
    page, other = tmp_path / "report.html", tmp_path / "other.json"
    for wrong in (
        record(terse_file).model_copy(update={"sha256": "0" * 64}),
        record(terse_file).model_copy(update={"after": Point(label="", file_bytes=1, error_percent=0)}),
    ):
        wrong.write(record_path(terse_file))
        wrong.write(other)
        beside = tersetorch("report", terse_file, "-o", page)
        assert beside.returncode == 0 and "is of another file, and left out" in beside.stderr.replace("\n", " ")
        assert "not recorded" in page.read_text()
        named = tersetorch("report", terse_file, "-o", page, "--record", other)
        assert named.returncode == 2 and "--record must be of" in named.stderr.replace("\n", " ")
    before = terse_file.read_bytes()
    done = tersetorch("report", terse_file, "-o", terse_file)
    assert done.returncode == 2 and "must be none that is read" in done.stderr.replace("\n", " ")
    assert terse_file.read_bytes() == before
