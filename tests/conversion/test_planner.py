import pytest
import torch
from torch import nn

from tersetorch.conversion.cache import DecisionCache
from tersetorch.conversion.candidates import CANDIDATES, Candidate
from tersetorch.conversion.machine import machine_facts
from tersetorch.conversion.planner import Planner
from tersetorch.conversion.walk import find_sites


class Wrong(nn.Module):
    def __init__(self, layer, error):
        super().__init__()
        self.layer, self.error = layer, error

    def forward(self, x):
        if isinstance(self.error, Exception):
            raise self.error
        return self.layer(x) + self.error


def candidate(name, error=0.0):
    return Candidate(name, name, nn.Linear, Wrong, 1.0, lambda layer: None, lambda layer: Wrong(layer, error))


@pytest.fixture
def decide(timer, sparse_linear, generator):
    def run(layer=None, table=CANDIDATES, inputs=None, max_error=None, cache=None, seed=0):
        layer = sparse_linear(distinct=9) if layer is None else layer
        planner = Planner(table, max_error, seed, timer, machine_facts(), cache)
        if inputs is None:
            inputs = [torch.randn(4, layer.in_features, generator=generator)]
        return planner.decide(find_sites(layer, table), [inputs])

    return run


def trials(decision):
    return {trial.format: trial for trial in decision.trials}


def test_fastest_candidate_is_chosen(decide, timer):
    timer.seconds |= {"csr": 5e-4, "sparse_codebook": 4e-4}
    decision = decide()
    assert decision.chosen == "sparse_codebook"
    assert [type(layer) for layer in decision.layers] == [CANDIDATES["sparse_codebook"].layer]
    assert decision.ratio == pytest.approx(0.4)
    assert trials(decision)["csr"].ratio == pytest.approx(0.5)
    assert "won 15 of 15; on fresh rounds faster" in decision.reason
    assert "(the model): sparse_codebook" in timer.asked


def test_dense_stays_where_it_wins(decide, timer):
    timer.seconds |= {"dense packed": 4e-4}
    decision = decide()
    assert decision.chosen == "dense"
    assert decision.layers == []
    assert decision.reason.startswith("csr not faster")
    assert (decision.dense_form, trials(decision)["csr"].ratio) == ("dense packed", pytest.approx(1.25))


def test_winner_is_timed_again_and_the_next_best_gets_its_chance(decide, timer):
    calls = iter([4e-4] * 16)
    timer.seconds |= {"sparse_codebook": lambda: next(calls, 2e-3), "csr": 5e-4}
    decision = decide()
    assert decision.chosen == "csr"
    assert "on fresh rounds not faster" in trials(decision)["sparse_codebook"].reason


def test_fresh_rounds_can_bring_dense_back(decide, timer):
    calls = iter([4e-4] * 16)
    timer.seconds |= {"csr": lambda: next(calls, 2e-3), "sparse_codebook": 2e-3}
    decision = decide()
    assert decision.chosen == "dense"
    assert "on fresh rounds not faster" in decision.reason


def test_noise_keeps_dense_says_so_and_is_not_remembered(decide, timer):
    again = iter([1e-3, 5e-3] * 100)
    timer.seconds |= {"dense again": lambda: next(again), "csr": 9e-4, "sparse_codebook": 2e-3}
    for _ in range(2):
        decision = decide(cache=DecisionCache())
        assert decision.chosen == "dense"
        assert "too noisy to decide" in decision.reason
        assert not decision.cached


def test_a_busy_machines_decisions_are_not_remembered(decide, monkeypatch):
    inputs = [torch.ones(4, 40)]
    monkeypatch.setattr("os.getloadavg", lambda: (1e3, 0.0, 0.0))
    assert decide(inputs=inputs, cache=DecisionCache()).chosen == "csr"
    assert not decide(inputs=inputs, cache=DecisionCache()).cached


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (1.0, "refused: differs by 1, more than the allowed error"),
        (RuntimeError("broken"), "refused: RuntimeError: broken"),
        (ValueError("broken"), "refused: ValueError: broken"),
    ],
)
def test_candidate_is_verified_before_it_is_timed(decide, timer, error, reason):
    decision = decide(table={"wrong": candidate("wrong", error)})
    assert decision.chosen == "dense"
    assert decision.reason == f"wrong {reason}"
    assert timer.asked == []


def test_max_error_allows_more(decide, timer):
    timer.seconds["wrong"] = 5e-4
    table = {"wrong": candidate("wrong", 1e-2)}
    assert decide(table=table).chosen == "dense"
    decision = decide(table=table, max_error=0.5)
    assert decision.chosen == "wrong"
    assert trials(decision)["wrong"].max_difference == pytest.approx(1e-2, rel=1e-3)


def test_formats_larger_than_dense_are_not_timed(decide, sparse_linear):
    decision = decide(sparse_linear(density=0.7, distinct=9))
    assert trials(decision)["csr"].reason.startswith("not tried: larger than the dense weight at density 0.")
    assert trials(decision)["sparse_codebook"].ratio is not None


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ([], "not reached by example_inputs"),
        ([torch.zeros(0, 40)], "example_inputs gives it no rows to time it on"),
        ("it is called with something else", "it is called with something else"),
    ],
)
def test_without_usable_inputs_dense_stays(decide, inputs, reason, timer):
    decision = decide(inputs=inputs)
    assert (decision.chosen, decision.reason) == ("dense", reason)
    assert timer.asked == []


def test_all_calls_are_run(sparse_linear):
    layer = sparse_linear()
    rows = []

    def timer(label, run, repeats):
        if label.endswith(": dense"):
            handle = layer.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
            run()
            handle.remove()
        return 1e-3

    planner = Planner(CANDIDATES, None, 0, timer, machine_facts(), None)
    planner.decide(find_sites(layer, CANDIDATES), [[torch.ones(2, 40), torch.ones(3, 40)]])
    assert rows[:4] == [2, 3, 2, 3]


def test_cached_decision_skips_the_rounds_but_not_the_verification(decide, timer, sparse_linear, generator):
    layer = sparse_linear(distinct=9)
    first = decide(layer, cache=DecisionCache())
    asked = len(timer.asked)
    other = sparse_linear(distinct=9)
    with torch.no_grad():
        other.weight.copy_(layer.weight.flip(0))
    second = decide(other, cache=DecisionCache())
    assert len(timer.asked) == asked
    assert second.cached
    assert not first.cached
    assert (second.chosen, second.reason, second.ratio) == (first.chosen, first.reason, first.ratio)
    assert torch.equal(second.layers[0].weight, other.weight)
    assert trials(second)["csr"].median_ms == trials(first)["csr"].median_ms
    assert trials(second)["csr"].max_difference is not None


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": [torch.ones(5, 40)]},
        {"inputs": [torch.ones(40, 4).t()]},
        {"inputs": [torch.ones(4, 40)] * 2},
        {"max_error": 0.1},
        {"table": {"csr": CANDIDATES["csr"]}},
    ],
)
def test_cache_key_covers_what_matters(decide, timer, sparse_linear, change):
    layer = sparse_linear(distinct=9)
    base = {"layer": layer, "inputs": [torch.ones(4, 40)]}
    decide(**base, cache=DecisionCache())
    assert decide(**base, cache=DecisionCache()).cached
    assert not decide(**(base | change), cache=DecisionCache()).cached


@pytest.mark.parametrize("other", [{"outputs": 31}, {"density": 0.3}, {"bias": False}])
def test_cache_key_covers_the_layer(decide, sparse_linear, other):
    inputs = [torch.ones(4, 40)]
    decide(sparse_linear(distinct=9), inputs=inputs, cache=DecisionCache())
    assert not decide(sparse_linear(distinct=9, **other), inputs=inputs, cache=DecisionCache()).cached


def test_cache_key_covers_the_width_of_codes_and_their_tables(decide):
    torch.manual_seed(0)
    values, inputs = torch.randn(32), [torch.ones(4, 128)]
    places = torch.arange(64 * 128).view(64, 128)

    def layer(codes):
        linear = nn.Linear(128, 64)
        linear.weight.data = values[codes]
        return linear

    # 4 and 8 bits; then 4 bits with one table and with one for each row.
    layers = [layer(places * 7919 % count) for count in (16, 20)]
    layers.append(layer(places * 7919 % 16 + (torch.arange(64) % 2 * 16)[:, None]))
    for linear in layers:
        assert not decide(linear, inputs=inputs, cache=DecisionCache()).cached
    for linear in layers:
        assert decide(linear, inputs=inputs, cache=DecisionCache()).cached


def test_cache_key_covers_threads_and_machine(decide, sparse_linear, timer):
    layer, inputs = sparse_linear(distinct=9), [torch.ones(4, 40)]
    decide(layer, inputs=inputs, cache=DecisionCache())
    for field, value in (("threads", 77), ("isa", "other"), ("torch", "0"), ("caches", [])):
        facts = machine_facts() | {field: value}
        planner = Planner(CANDIDATES, None, 0, timer, facts, DecisionCache())
        assert not planner.decide(find_sites(layer, CANDIDATES), [inputs]).cached


def test_an_unknown_choice_in_the_cache_is_measured_again(decide, sparse_linear):
    layer, inputs = sparse_linear(distinct=9), [torch.ones(4, 40)]
    stored = []

    class Spoilt(DecisionCache):
        def load(self, key):
            return stored[0] | {"chosen": "gone"} if stored else None

        def store(self, key, decision):
            stored.append(decision)

    decide(layer, inputs=inputs, cache=Spoilt())
    cache = Spoilt()
    assert not decide(layer, inputs=inputs, cache=cache).cached
    assert "an unknown choice 'gone'" in cache.problem
