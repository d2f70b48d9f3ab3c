import gc
import itertools
import time

import pytest

from tersetorch.conversion.timing import AGAIN, ROUNDS, Contest, Score, contest, time_calls


def script(**times):
    """A timer that answers from one list of seconds a form, after the call that says how often to repeat it."""
    streams = {}

    def timer(label, run, repeats):
        values = times[label]
        stream = streams.setdefault(label, itertools.chain(values[:1], itertools.cycle(values)))
        return next(stream)

    return timer


def nothing():
    pass


def run(dense, candidate, packed=None, again=None, seed=0):
    times = {"dense": dense, AGAIN: again or dense, "csr": candidate}
    forms = {"dense": nothing}
    if packed is not None:
        times["packed"] = packed
        forms["packed"] = nothing
    return contest(forms, {"csr": nothing}, seed=seed, timer=script(**times))


@pytest.mark.parametrize(
    ("candidate", "passes"),
    [([0.9], True), ([0.95], True), ([0.951], False), ([1.0], False), ([2.0], False)],
)
def test_ratio_decides(candidate, passes):
    assert run([1.0], candidate).passes("csr") is passes


@pytest.mark.parametrize(("lost", "passes"), [(0, True), (2, True), (3, False)])
def test_wins_decide(lost, passes):
    result = run([1.0], [1.1] * lost + [0.5] * (ROUNDS - lost))
    assert result.scores["csr"].wins == (ROUNDS - lost if passes else 0)
    assert result.passes("csr") is passes


def test_ties_are_no_wins():
    result = run([1.0], [1.0])
    assert result.scores["csr"].wins == 0


def test_strongest_dense_form_decides():
    result = run([1.0], [0.5], packed=[0.4])
    assert result.dense_form == "packed"
    assert result.dense_ms == pytest.approx(400)
    assert result.scores["csr"].ratio == pytest.approx(0.5 / 0.4)
    assert not result.passes("csr")


def test_a_lost_round_to_one_dense_form_only_stops_nobody():
    assert run([1.0], [0.5], packed=[0.4]).scores["csr"].rounds == ROUNDS


def test_hopeless_candidate_stops_after_three_lost_rounds_and_ends_the_contest():
    asked = []

    def timer(label, run, repeats):
        asked.append(label)
        return 2.0 if label == "csr" else 1.0

    result = contest({"dense": nothing}, {"csr": nothing}, seed=0, timer=timer)
    assert result.scores["csr"].rounds == 3
    assert asked.count("dense") == 1 + 3


def test_hopeless_candidate_does_not_stop_the_others():
    def timer(label, run, repeats):
        return {"slow": 2.0, "fast": 0.5}.get(label, 1.0)

    result = contest({"dense": nothing}, {"slow": nothing, "fast": nothing}, seed=0, timer=timer)
    assert result.scores["slow"].rounds == 3
    assert result.scores["fast"] == Score(500.0, 0.5, ROUNDS, ROUNDS)


def test_noise_of_dense_against_itself_keeps_a_small_lead_from_passing():
    result = run([1.0], [0.9], again=[1.0, 1.3, 1.3])
    assert result.noise == pytest.approx(0.3)
    assert not result.passes("csr")
    assert result.too_noisy("csr")
    assert "too noisy to decide" in result.describe("csr")
    assert run([1.0], [0.5], again=[1.0, 1.3, 1.3]).passes("csr")


def test_order_is_random_and_follows_the_seed():
    def order(seed):
        asked = []

        def timer(label, run, repeats):
            asked.append(label)
            return 1.0 if label != "csr" else 0.5

        contest({"dense": nothing, "packed": nothing}, {"csr": nothing}, seed=seed, timer=timer)
        return asked

    assert order(0) == order(0)
    assert order(0) != order(1)
    rounds = [tuple(order(0)[i : i + 4]) for i in range(4, 4 + 4 * ROUNDS, 4)]
    assert all(sorted(names) == ["csr", "dense", AGAIN, "packed"] for names in rounds)
    assert len(set(rounds)) > 1


@pytest.mark.parametrize(("seconds", "repeats"), [(0.0, 10_000), (2**-20, 210), (1e-3, 1), (0.5, 1)])
def test_samples_are_long_enough(seconds, repeats):
    asked = []

    def timer(label, run, repeats):
        asked.append(repeats)
        return seconds

    contest({"dense": nothing}, {"csr": nothing}, seed=0, timer=timer)
    assert asked[:3] == [1] * 3
    assert set(asked[3:]) == {repeats}


@pytest.fixture
def clock(monkeypatch):
    """Stands still unless a test moves it."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def calls_taking(clock, durations):
    count = itertools.count()

    def run():
        clock[0] += durations[next(count)]

    return run, count


def test_a_long_call_is_timed_once(clock):
    run, count = calls_taking(clock, [0.5, 0.1])
    assert time_calls("label", run, 3) == 0.5
    assert next(count) == 1


def test_a_short_call_is_warmed_up_and_the_best_stretch_counts(clock):
    run, count = calls_taking(clock, [2**-7, 2**-8, 2**-9, 2**-10, 2**-10, 2**-6, 2**-10])
    assert time_calls("label", run, 2) == 2**-10
    assert next(count) == 7


def test_garbage_collection_is_given_back():
    def failing(label, run, repeats):
        assert not gc.isenabled()
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        contest({"dense": nothing}, {"csr": nothing}, seed=0, timer=failing)
    assert gc.isenabled()


def test_describe_gives_the_figures():
    result = Contest("dense", 2.0, 0.01, {"csr": Score(1.0, 0.5, 15, 15)})
    assert result.describe("csr") == "faster: 1 ms against 2 ms (dense), ratio 0.50, won 15 of 15"
