import itertools

import numpy as np
import pytest

from tersetorch.methods.quantize import kmeans_1d
from tersetorch.methods.quantize.kmeans_1d import INITIAL, cluster, optimal_starts


def least_error(values, clusters):
    """The least sum of squares over every way to cut the sorted values into runs."""
    values = np.sort(np.asarray(values, np.float64))
    errors = []
    for cuts in itertools.combinations(range(1, len(values)), clusters - 1):
        runs = np.split(values, cuts)
        errors.append(sum(float(np.square(run - run.mean()).sum()) for run in runs))
    return min(errors)


@pytest.mark.parametrize("seed", range(60))
def test_exact_is_the_best_of_all_partitions(seed):
    random = np.random.default_rng(seed)
    values = random.standard_normal(random.integers(2, 12)).round(int(random.integers(1, 4)))
    clusters = int(random.integers(1, len(values) + 1))
    found = cluster(values, clusters)
    assert found.squared_error(values) == pytest.approx(least_error(values, clusters), abs=1e-12)


@pytest.mark.parametrize("count", [33, 64, 257, 1021])
@pytest.mark.parametrize("clusters", [1, 2, 3, 15, 16, 31])
def test_exact_is_no_worse_than_any_other_start(count, clusters):
    values = np.random.default_rng(count).standard_normal(count).astype(np.float32)
    errors = {init: cluster(values, clusters, init).squared_error(values) for init in INITIAL}
    assert errors["exact"] <= min(errors.values()) * (1 + 1e-12)


def test_divide_and_conquer_agrees_with_the_plain_recurrence():
    random = np.random.default_rng(0)
    for count, clusters in ((2, 2), (3, 2), (17, 4), (40, 9), (41, 40), (41, 41)):
        points, weights = np.sort(random.standard_normal(count)), random.integers(1, 9, count).astype(float)

        def cost(i, j, points=points, weights=weights):
            mean = np.average(points[i:j], weights=weights[i:j])
            return float((weights[i:j] * np.square(points[i:j] - mean)).sum())

        best = [np.inf] * (count + 1)
        best[0] = 0.0
        for _ in range(clusters):
            best = [np.inf] + [min(best[i] + cost(i, j) for i in range(j)) for j in range(1, count + 1)]
        bounds = [*optimal_starts(points, weights, clusters), count]
        assert len(set(bounds)) == clusters + 1
        assert sum(cost(i, j) for i, j in itertools.pairwise(bounds)) == pytest.approx(best[count], abs=1e-12)


def least_by_long_doubles(values, clusters):
    """The least sum of squares by the plain recurrence, O(clusters n^2), each run's around its own first value."""
    values = np.sort(values.astype(np.longdouble))
    count = len(values)
    costs = np.full((count + 1, count + 1), np.inf, np.longdouble)
    for i in range(count):
        offsets = values[i:] - values[i]
        moments = np.cumsum(offsets)
        costs[i, i + 1 :] = np.maximum(np.cumsum(offsets**2) - moments**2 / np.arange(1, count - i + 1), 0)
    best = costs[0]
    for _ in range(clusters - 1):
        best = (best[:, None] + costs).min(0)
    return float(best[count])


@pytest.mark.parametrize(
    "far", [[1e8], [-1e8], [1e6], [-1e6], [1e8, -1e8], [-1e8, -1e8 - 64, 3e7], [1e3, 1e5, -1e7], [3e4, 3e5, 3e6, 3e7]]
)
@pytest.mark.parametrize("clusters", [2, 16])
@pytest.mark.parametrize("weighted", [False, True])
def test_far_outliers_do_not_cost_the_others_their_optimum(far, clusters, weighted):
    values = np.random.default_rng(0).normal(0, 0.01, 300)
    values = np.append(values, far).astype(np.float32)
    found = cluster(values, clusters, weights=np.ones(len(values)) if weighted else None)
    assert found.squared_error(values) <= 1.0001 * least_by_long_doubles(values, clusters)


@pytest.mark.parametrize("init", INITIAL)
def test_every_result_is_a_fixed_point(init):
    values = np.random.default_rng(0).laplace(size=3001).astype(np.float32)
    found = cluster(values, 16, init)
    nearest = np.abs(values[:, None].astype(np.float64) - found.centroids).argmin(1)
    codes = found.codes(values)
    assert np.array_equal(codes, nearest)
    means = [values[codes == code].astype(np.float64).mean() for code in range(len(found.centroids))]
    np.testing.assert_allclose(found.centroids, means, rtol=1e-12)
    assert (np.diff(found.centroids) > 0).all()


@pytest.mark.parametrize("init", INITIAL)
@pytest.mark.parametrize("values", [[3.0], [0.1] * 50, [0.1, -0.7, 0.1, 1e-8, -0.7], np.linspace(-1, 1, 5)])
def test_few_distinct_values_are_kept_to_the_bit(init, values):
    values = np.asarray(values, np.float32)
    found = cluster(values, 5, init)
    assert np.array_equal(found.centroids[found.codes(values)].astype(np.float32), values)
    assert found.squared_error(values) == 0


def test_a_cluster_of_one_value_is_that_value_to_the_bit():
    values = np.concatenate((np.full(1000, 0.1), [1e6, -1e-7], np.full(7, 3e-5)))
    found = cluster(values, 3)
    assert found.centroids[1:].tolist() == [0.1, 1e6]


def test_a_value_midway_goes_to_the_lower_centroid():
    values = np.array([0.0, 0.0, 1.0, 2.0, 2.0])
    for init in ("linear", "density"):
        assert cluster(values, 2, init, iterations=1).codes(values).tolist() == [0, 0, 0, 1, 1]


def test_initial_centroids():
    line, distinct = kmeans_1d._line(np.array([2.0, 1.0, 1.0, 9.0, 1.0, 0.0, 1.0, 1.0]), None)
    assert distinct == 4
    assert INITIAL["linear"](line, 4, 0).tolist() == [0, 3, 6, 9]
    assert INITIAL["density"](line, 4, 0).tolist() == [0, 1, 1, 2]
    drawn = INITIAL["random"](line, 3, 7)
    assert len(set(drawn)) == 3 and set(drawn) <= {0.0, 1.0, 2.0, 9.0}
    assert np.array_equal(drawn, INITIAL["random"](line, 3, 7))


def test_centroids_without_members_are_left_out():
    values = np.concatenate((np.linspace(0, 0.1, 50), [100.0]))
    found = cluster(values, 8, "linear")
    assert len(found.centroids) == 2
    assert np.bincount(found.codes(values)).min() > 0


def test_iterations_are_a_limit():
    values = np.random.default_rng(0).standard_normal(2000)
    few, many = (cluster(values, 16, "random", iterations=count).squared_error(values) for count in (1, 1000))
    assert many < few


DISTRIBUTIONS = {
    "normal": lambda random, n: random.standard_normal(n),
    "student": lambda random, n: random.standard_t(1.5, n),
    "two humps": lambda random, n: np.concatenate((random.normal(-1, 0.1, n // 2), random.normal(2, 0.3, n - n // 2))),
    "pruned": lambda random, n: (values := random.standard_normal(3 * n))[np.abs(values) > 1],
    "outlier": lambda random, n: np.append(random.standard_normal(n), 1e4),
}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("clusters", [2, 16, 255])
def test_more_values_than_the_exact_search_takes(monkeypatch, distribution, clusters):
    values = DISTRIBUTIONS[distribution](np.random.default_rng(0), 101_000).astype(np.float32)
    binned = cluster(values, clusters)
    monkeypatch.setattr(kmeans_1d, "EXACT_VALUES", 10**6)
    assert binned.squared_error(values) <= 1.0001 * cluster(values, clusters).squared_error(values)
    nearest = np.searchsorted((binned.centroids[1:] + binned.centroids[:-1]) / 2, values.astype(np.float64))
    assert np.array_equal(binned.codes(values), nearest)


@pytest.mark.parametrize("init", INITIAL)
def test_many_values_and_few_distinct_ones_take_the_same_paths(monkeypatch, init):
    values = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    few = cluster(values, 12, init, iterations=3)
    monkeypatch.setattr(kmeans_1d, "EXACT_VALUES", 1000)
    many = cluster(values, 12, init, iterations=3)
    if init != "random":
        np.testing.assert_allclose(many.centroids, few.centroids, rtol=1e-3 if init == "exact" else 1e-6)
    assert len(many.centroids) == 12
    assert many.squared_error(values) < 2 * cluster(values, 12).squared_error(values)


def test_weights_count_like_repeated_values():
    random = np.random.default_rng(0)
    values, weights = random.standard_normal(300).astype(np.float32), random.integers(1, 9, 300)
    for init in ("exact", "linear"):
        weighted = cluster(values, 7, init, weights=weights)
        repeated = cluster(np.repeat(values, weights), 7, init)
        np.testing.assert_allclose(weighted.centroids, repeated.centroids, rtol=1e-6)
        assert weighted.squared_error(values, weights) == pytest.approx(
            repeated.squared_error(np.repeat(values, weights))
        )


@pytest.mark.parametrize("seed", range(10))
def test_many_weighted_values_are_binned_too(monkeypatch, seed):
    random = np.random.default_rng(seed)
    values, weights = random.standard_normal(20_000).astype(np.float32), random.exponential(size=20_000)
    exact = cluster(values, 16, weights=weights).squared_error(values, weights)
    monkeypatch.setattr(kmeans_1d, "EXACT_VALUES", 1000)
    assert cluster(values, 16, weights=weights).squared_error(values, weights) <= 1.001 * exact


def to_eighths(values):
    return np.round(values * 8) / 8


def test_rounded_centroids_are_nearest_and_no_neighbour_is_better():
    values = np.random.default_rng(0).standard_normal(4000).astype(np.float32)
    found = cluster(values, 6, rounding=to_eighths)
    assert np.array_equal(found.centroids, to_eighths(found.centroids))
    assert np.array_equal(found.codes(values), np.abs(values[:, None] - found.centroids).argmin(1))
    error = found.squared_error(values)
    for place, step in itertools.product(range(6), (-0.125, 0.125)):
        moved = found.centroids.copy()
        moved[place] += step
        assert error <= np.square(values - moved[found.codes(values)]).sum()
    # Equal ones become one, also where each value could have had its own.
    assert cluster(np.array([0.1, 0.11, 0.5]), 3, rounding=to_eighths).centroids.tolist() == [0.125, 0.5]


def test_equal_steps_span_the_whole_of_float32():
    values = np.append(np.random.default_rng(0).standard_normal(100) * 1e38, [-3.4e38, 3.4e38]).astype(np.float32)
    found = cluster(values, 8, "linear")
    assert len(found.centroids) > 4 and np.isfinite(found.centroids).all()
    assert np.abs(values[:, None].astype(np.float64) - found.centroids).min(1).max() < 1e38
