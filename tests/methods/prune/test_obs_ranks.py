import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tersetorch.methods.prune.obs_ranks import ALONE, Ranks

SCRIPT = Path(__file__).with_name("pruning_ranks.py")


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def found(request, tmp_path_factory):
    """What each rank got, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), str(request.param), folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(request.param)
    ]
    try:
        said = [process.communicate(timeout=300)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * request.param, "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.fixture
def alone(monkeypatch):
    """What the ranks run, in this process."""
    script = runpy.run_path(str(SCRIPT))
    monkeypatch.setattr(script["exact_obs"], "BATCH_BYTES", script["exact_obs"].BATCH_BYTES)
    return script


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_ranks_prune_by_the_data_of_all(found, alone):
    expected = alone["in_turn"]("blocked", alone["mlp"](), alone["batches"](shape=(20,))).state_dict()
    for state in found:
        assert same(state["in turn"], found[0]["in turn"])
        for name, value in expected.items():
            torch.testing.assert_close(state["in turn"][name], value)


@pytest.mark.parametrize("solver", ["exactobs", "layerwise"])
def test_rows_shared_out_over_ranks_come_to_the_bits_of_one_process(found, alone, solver):
    expected = alone["in_turn"](solver, alone["mlp"](5), alone["batches"](shape=(20,))[:1]).state_dict()
    assert all(same(state[solver], expected) for state in found)


@pytest.mark.parametrize("case", ["layerwise", "exactobs", "blocked", "pattern"])
def test_layers_shared_out_over_ranks_come_to_the_bits_of_one_process(found, alone, case):
    """Five batches of different sizes, so that one rank has more."""
    state, notes, kept = alone["one_pass"](alone["ONE_PASS"][case], alone["network"](), alone["batches"]())
    ranks = [each[f"one pass, {case}"] for each in found]
    for got, told, _ in ranks:
        assert same(got, state)
        assert [{**note, "layer": note["layer"].removeprefix("module.")} for note in told] == notes
    # Each rank keeps the moments of the layers that it owns, and together they keep each once.
    shares = [share for _, _, share in ranks]
    assert sum(shares) == kept and max(shares) < 0.7 * kept


def test_each_piece_goes_to_the_rank_that_holds_least_the_largest_first():
    assert Ranks(rank=0, count=2).owners([1, 9, 2, 3, 4]) == [0, 0, 1, 1, 1]
    assert ALONE.owners([3, 1]) == [0, 0]
