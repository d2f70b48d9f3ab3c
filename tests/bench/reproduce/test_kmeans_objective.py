import json

import numpy as np
import pytest

from tersetorch.bench.reproduce import kmeans_objective
from tersetorch.bench.reproduce.kmeans_objective import STUDIES, run, table
from tersetorch.bench.reproduce.runs import How


@pytest.mark.parametrize("study", STUDIES)
def test_ours_is_never_worse(study, monkeypatch):
    def drawn(values, clusters, seed):
        return np.random.default_rng(seed).choice(values, clusters, replace=False)  # of vectors, rows

    monkeypatch.setattr(kmeans_objective, "PACKAGES", {"numpy": "numpy", "nobody": "no_such_package"})
    monkeypatch.setitem(kmeans_objective.CENTROIDS, "numpy", drawn)
    record = run(study, How([0, 1], quick=True))
    json.dumps(record)
    assert list(record["plan"]["peers"]) == ["numpy"]
    assert 0 < record["worst"]["ratio numpy"] < 1
    assert len(record["seeds"][0]["cases"]) == 2 * len(STUDIES[study].distributions)
    assert table(record).row_count == 2


def test_scikit_learn_ends_no_better():
    pytest.importorskip("sklearn")
    values = np.random.default_rng(0).standard_normal(500).astype(np.float32)
    ours, theirs = (
        kmeans_objective._objective(values, found(values, 5, 0).astype(float))
        for found in (kmeans_objective._ours, kmeans_objective._scikit_learn)
    )
    assert ours <= theirs * (1 + 1e-12) and theirs < 1.1 * ours
