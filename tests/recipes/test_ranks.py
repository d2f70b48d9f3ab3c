import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


@pytest.mark.slow
def test_a_killed_rank_goes_on_from_the_last_checkpoint_to_the_same_bits(tmp_path):
    options = ["--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.1"]
    command = [*TORCHRUN, *options, FOLDER / "killed_ranks.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    states = []
    for rank in (0, 1):
        resumed, trained, state, whole = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert resumed == ["prune 2", "share 1"] and trained == ["prune 1", *resumed]
        states += [state, whole]
    for name, tensor in states[0].items():
        assert all(torch.equal(state[name], tensor) for state in states[1:]), name
    assert (tmp_path / "model.terse").read_bytes() == (tmp_path / "whole.terse").read_bytes()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["after_3.safetensors", "lock", "record.json"]


@pytest.mark.slow
def test_every_rank_finds_what_rank_0_measures(tmp_path):
    command = [*TORCHRUN, "--nproc-per-node=3", FOLDER / "searching_ranks.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (found, state, again), *others = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3))
    assert all(report == found for report, _, _ in others)
    assert sum(found["trials"][found["chosen"]]["sparsities"].values()) > 0
    for each in (again, *(state for _, *states in others for state in states)):
        assert all(torch.equal(value, each[name]) for name, value in state.items())
