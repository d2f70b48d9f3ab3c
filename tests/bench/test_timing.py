from tersetorch.bench.timing import MIN_ROUNDS, interleave


def test_every_candidate_runs_once_a_round_in_changing_order():
    calls = []
    candidates = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = interleave(candidates, seconds=1e-9)
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 1 + MIN_ROUNDS
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(map(tuple, rounds))) > 1
    assert list(times) == ["a", "b", "c"]
    for summary in times.values():
        assert 0 <= summary["min_ms"] <= summary["p30_ms"] <= summary["median_ms"]
        assert summary["spread_ms"] >= 0
