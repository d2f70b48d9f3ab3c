import numpy as np
import pytest

from tersetorch import _native


def test_one_run_and_as_many_as_points():
    weight = moment = square = np.arange(4.0)
    assert _native.optimal_runs(weight, moment, square, 1).tolist() == [0]
    assert _native.optimal_runs(weight, moment, square, 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("clusters", [0, 4, -1])
def test_clusters_that_do_not_fit_are_refused(clusters):
    sums = np.arange(4.0)
    with pytest.raises(ValueError, match=f"clusters must be at least 1 and at most .*, got {clusters} for 3 points"):
        _native.optimal_runs(sums, sums, sums, clusters)


def test_sums_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match="must have as many sums, got 4, 3 and 4"):
        _native.optimal_runs(np.arange(4.0), np.arange(3.0), np.arange(4.0), 2)
    with pytest.raises(ValueError, match="for -1 points"):
        _native.optimal_runs(np.zeros(0), np.zeros(0), np.zeros(0), 1)


def test_sums_that_are_no_numbers_end_without_harm():
    nothing = np.full(300, np.nan)
    starts = _native.optimal_runs(nothing, nothing, nothing, 17)
    assert ((starts >= 0) & (starts <= 299)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_codes_count_thresholds(dtype):
    values, thresholds = np.array([-1, 0, 0.5, 2], dtype), np.array([0, 0.5, 1], dtype)
    assert _native.threshold_codes(values, thresholds).tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="thresholds must be at most 255, got 256"):
        _native.threshold_codes(values, np.zeros(256, dtype))
