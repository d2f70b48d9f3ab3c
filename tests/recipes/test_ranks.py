import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("killed_ranks.py")


@pytest.mark.slow
def test_a_killed_rank_goes_on_from_the_last_checkpoint_to_the_same_bits(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command = [*torchrun, "--monitor-interval=0.1", SCRIPT, tmp_path]
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
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["after_3.safetensors", "record.json"]
