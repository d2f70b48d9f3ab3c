import time

from tersetorch.bench import timing
from tersetorch.bench.timing import MAX_SAMPLES, MIN_SAMPLES, MIN_SLOW_SAMPLES, interleave


def test_candidates_take_turns_and_are_warmed():
    calls = []

    def candidate(name):
        def run():
            calls.append(name)
            time.sleep(2e-4)

        return run

    times = interleave({name: candidate(name) for name in "abc"}, seconds=0.02)
    assert list(times) == ["a", "b", "c"]
    turns = calls[6:]  # after the pilot, two calls each
    assert turns[::2] == turns[1::2]  # one untimed, one timed
    assert turns[::2] != sorted(turns[::2])
    for summary in times.values():
        assert 2e-4 < 1e-3 * summary["min_ms"] <= 1e-3 * summary["p30_ms"] <= 1e-3 * summary["median_ms"]
        assert summary["spread_ms"] >= 0
        assert MIN_SLOW_SAMPLES <= summary["samples"] <= MAX_SAMPLES
    assert sum(summary["samples"] for summary in times.values()) == len(turns) / 2


def test_every_sample_follows_an_eviction_when_cold():
    calls = []
    interleave({name: lambda n=name: calls.append(n) for name in "ab"}, 1e-3, evict=lambda: calls.append("evict"))
    assert len(calls) > 20 and set(calls[-1:-20:-2]) <= {"a", "b"} and set(calls[-2:-21:-2]) == {"evict"}


def test_short_calls_are_repeated_and_slow_ones_get_few_samples(monkeypatch):
    clock = iter(range(10**9))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: 1e-5 * next(clock))
    assert interleave({"short": lambda: None}, seconds=1.0)["short"]["samples"] == MAX_SAMPLES
    monkeypatch.setattr(timing.time, "perf_counter", lambda: 1.0 * next(clock))
    assert interleave({"slow": lambda: None}, seconds=1.0)["slow"]["samples"] == MIN_SLOW_SAMPLES
    assert MIN_SLOW_SAMPLES < MIN_SAMPLES
