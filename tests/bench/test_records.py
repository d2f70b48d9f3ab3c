import json

import pytest
import torch

from tersetorch.bench import records
from tersetorch.bench.cases import Linear
from tersetorch.bench.options import Options
from tersetorch.bench.records import Run, table
from tersetorch.bench.suites import sparse
from tersetorch.bench.suites.sparse import Group, Sparse


@pytest.fixture
def two_groups(monkeypatch):
    monkeypatch.setattr(sparse, "SECONDS", 1e-4)
    found = [Group(Linear("small", 16, 24), batch, (0.5,)) for batch in (1, 2)]
    monkeypatch.setitem(records.SUITES, "sparse", (lambda options: found, Sparse))


def test_records_are_stored_after_every_group(two_groups, measured, tmp_path):
    path = tmp_path / "out.json"
    before = torch.get_num_threads()
    run = Run(["sparse"], Options(threads=before + 1, implementations=("csr",)), measured, path)
    assert json.loads(path.read_text())["records"] == []
    steps = run.steps()
    next(steps)
    assert torch.get_num_threads() == before + 1
    stored = json.loads(path.read_text())
    assert stored["records"] and {record["batch"] for record in stored["records"]} == {1}
    assert stored["machine"]["rates"]["threads"] == 1 and stored["machine"]["torch"] == torch.__version__
    steps.close()  # an interruption
    assert torch.get_num_threads() == before
    assert json.loads(path.read_text()) == stored and [f.name for f in tmp_path.iterdir()] == ["out.json"]


def test_the_table_marks_the_fastest(two_groups, measured):
    run = Run(["sparse"], Options(implementations=("csr",)), measured)
    list(run.steps())
    shown = table(run.records)
    assert shown.row_count == len(run.records) > 0
    assert list(shown.columns[-1].cells).count("fastest") == 2
