import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tersetorch.zoo.ranks import from_rank_0, rank, ranks

RANKS = 2
SCRIPT = Path(__file__).with_name("training_ranks.py")


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """What each rank trained, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(place), str(RANKS), folder], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for place in range(RANKS)
    ]
    try:
        said = [process.communicate(timeout=300)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * RANKS, "\n".join(said)
    return [torch.load(folder / f"{place}.pt", weights_only=True) for place in range(RANKS)]


@pytest.mark.parametrize("case", ["pruned", "noisy", "wrapped"])
def test_all_ranks_end_with_the_same_bits(states, case):
    one, other = (state[case] for state in states)
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def test_one_process_trains_the_same_up_to_rounding(states):
    alone = runpy.run_path(str(SCRIPT))["pruned"](0).state_dict()
    for name, tensor in states[0]["pruned"].items():
        torch.testing.assert_close(tensor, alone[name])


def test_a_process_alone_is_rank_0():
    assert (rank(), ranks(), from_rank_0(lambda: "done")) == (0, 1, "done")
    with pytest.raises(ValueError, match="invalid literal"):
        from_rank_0(lambda: int("one"))
