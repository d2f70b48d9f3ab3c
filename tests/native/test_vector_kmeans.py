import numpy as np
import pytest

from tersetorch import _native


def points(problems=2, count=70, width=4):
    return np.random.default_rng(0).standard_normal((problems, count, width)).astype(np.float32)


def test_codes_name_the_centres_that_the_errors_are_of():
    x = points()
    codes, centres, errors = _native.vector_kmeans(x, np.full((2, 9), 0.5), 50, 12)
    assert codes.shape == (2, 70) and centres.shape == (2, 9, 4) and codes.min() >= 0 and codes.max() < 9
    for problem in range(2):
        apart = np.square(x[problem] - centres[problem][codes[problem]]).sum()
        assert apart == pytest.approx(errors[problem], rel=1e-5)


def test_lloyd_starts_from_given_centres_and_leaves_them():
    x = points()
    start = np.ascontiguousarray(x[:, :5])
    before = start.copy()
    none, some = (_native.vector_lloyd(x, start, rounds) for rounds in (0, 30))
    assert np.array_equal(start, before) and np.array_equal(none[1], before) and (some[2] < none[2]).all()


@pytest.mark.parametrize("clusters", [0, 71])
def test_clusters_that_do_not_fit_are_refused(clusters):
    with pytest.raises(ValueError, match=f"at most the number of points.*got {clusters} for 70 points of 4 numbers"):
        _native.vector_kmeans(points(), np.zeros((2, clusters)), 1, 1)


def test_arrays_that_do_not_fit_each_other_are_refused():
    with pytest.raises(ValueError, match="points must have 3 dimensions, got 2"):
        _native.vector_kmeans(points()[0], np.zeros((2, 3)), 1, 1)
    with pytest.raises(ValueError, match="draws must have 2 dimensions, got 1"):
        _native.vector_kmeans(points(), np.zeros(3), 1, 1)
    with pytest.raises(ValueError, match="for as many problems"):
        _native.vector_kmeans(points(), np.zeros((3, 3)), 1, 1)
    with pytest.raises(ValueError, match="for as many problems"):
        _native.vector_lloyd(points(), np.zeros((2, 3, 5), np.float32), 1)
    for draw in (1.0, -0.5, np.nan):
        with pytest.raises(ValueError, match=r"draws must lie in \[0, 1\)"):
            _native.vector_kmeans(points(), np.full((2, 3), draw), 1, 1)


def test_points_that_are_no_numbers_end_without_harm():
    codes, centres, _ = _native.vector_kmeans(np.full((1, 70, 3), np.nan, np.float32), np.full((1, 7), 0.9), 9, 3)
    assert codes.min() >= 0 and codes.max() < 7 and centres.shape == (1, 7, 3)
