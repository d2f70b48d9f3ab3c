import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import tersetorch as tt

SCRIPT = Path(__file__).with_name("compressing_ranks.py")
ON_RANKS = runpy.run_path(str(SCRIPT))
FAST = ("untrained", "calibrated", "trained", "budget", "no recipe", "one fails", "others")


def free_ports(count):
    with ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [str(each.getsockname()[1]) for each in sockets]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    ON_RANKS["files"](folder)
    return folder


def on_ranks(folder, ranks, cases):
    """What each rank said and got, by case."""
    ports = free_ports(len(cases))
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, folder, ",".join(cases), *ports],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ
            | {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
            | {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_RESTART_COUNT": "0"},
        )
        for rank in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=300)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(said)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]


@pytest.fixture(scope="module")
def found(folder):
    return on_ranks(folder, 2, FAST)


def same_everywhere(found, case):
    """What the model became, which every rank must have to the bit, with the same record; rank 0 alone speaks."""
    assert [rank[case][0] for rank in found] == [0] * len(found), found[0][case][2]
    assert found[0][case][1] and not any(rank[case][1] for rank in found[1:])
    (first, record), *others = (rank[case][3][0] for rank in found)
    for state, told in others:
        assert told == record and state.keys() == first.keys()
        assert all(torch.equal(value, first[name]) for name, value in state.items())
    return first, json.loads(record)


@pytest.mark.parametrize("case", ["untrained", "calibrated"])
def test_ranks_write_the_bytes_of_one_process_where_nothing_is_trained(found, folder, tersetorch, monkeypatch, case):
    same_everywhere(found, case)
    monkeypatch.chdir(folder)
    alone = tersetorch(*ON_RANKS["BASE"], *ON_RANKS["CASES"][case], "-o", "alone.terse")
    assert alone.returncode == 0, alone.stderr
    assert (folder / "alone.terse").read_bytes() == (folder / f"{case}.terse").read_bytes()


def test_ranks_train_one_model_and_rank_0_stores_it(found, folder):
    """Batches of 7, which two ranks cannot halve."""
    state, record = same_everywhere(found, "trained")
    stored = tt.load(folder / "trained.terse").state_dict()
    assert all(torch.equal(stored[name], value) for name, value in state.items())
    assert [point["label"] for point in record["points"]] == ["pruned", "shared"]
    assert not (folder / "trained.run").exists()


def test_ranks_agree_on_what_a_budget_pays(found, folder):
    state, record = same_everywhere(found, "budget")
    size = (folder / "budget.terse").stat().st_size
    assert record["after"]["file_bytes"] == size <= record["before"]["file_bytes"] // 8
    assert state["fc1.weight"].count_nonzero() < state["fc1.weight"].numel()


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("no recipe", "--recipe must be one of"),
        ("one fails", "(RuntimeError: no disk); mend it, or name another (on rank 1)"),
        ("others", "compress: data must be the same on every rank, got others on rank 1 than on rank 0"),
    ],
)
def test_what_is_wrong_on_one_rank_ends_all_with_one_sentence(found, folder, case, sentence):
    assert all(rank[case][0] in (1, 2) and not rank[case][1] for rank in found)
    assert sorted(sentence in " ".join(rank[case][2].split()) for rank in found) == [False, True]
    assert sorted(bool(rank[case][2].strip()) for rank in found) == [False, True]
    assert not (folder / f"{case}.terse").exists()


@pytest.mark.slow
def test_three_ranks_agree_too(folder):
    found = on_ranks(folder, 3, ("untrained", "trained", "drop", "dry", "no budget"))
    same_everywhere(found, "untrained")
    same_everywhere(found, "trained")
    _, record = same_everywhere(found, "drop")
    assert record["after"]["error_percent"] <= record["before"]["error_percent"] + 60
    assert [bool(rank["dry"][1]) for rank in found] == [True, False, False]
    assert sum("compress: budget must be at least about" in rank["no budget"][2] for rank in found) == 1


KILLED = """
import os, signal
import tersetorch as tt

def network():
    model = tt.zoo.LeNet300100(16)
    seen = []

    def count(*_):
        seen.append(model.training)
        kill = os.environ["RANK"] == "1" and sum(seen) == 33 and not os.path.exists("killed")
        if kill:
            open("killed", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)

    model.register_forward_pre_hook(count)
    return model
"""


@pytest.mark.slow
def test_a_killed_rank_ends_all_and_the_same_command_goes_on_to_the_same_bytes(folder):
    """Each training has 20 steps, so that the 33rd is in that of the shared values: pruning is not done again."""
    (folder / "killed_code.py").write_text(KILLED)
    torch.save(tt.load(folder / "dense.terse").state_dict(), folder / "dense.pt")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tersetorch"]
    base = ["compress", "dense.pt", *ON_RANKS["BASE"][2:], "--network", "killed_code:network"]
    command = [*torchrun, *base, "-o", "killed.terse"]

    def run(more):
        return subprocess.run(more, cwd=folder, capture_output=True, text=True, timeout=300, check=False)

    first = run(command)
    assert first.returncode != 0 and (folder / "killed").exists(), first.stderr
    assert re.search(rf"exitcode\s*: {-signal.SIGKILL} ", first.stderr), first.stderr
    assert not (folder / "killed.terse").exists() and (folder / "killed.run" / "steps" / "after_1.safetensors").exists()
    again = run([*command, "--json"])
    assert again.returncode == 0, again.stderr
    whole = run([*torchrun, *base, "-o", "whole.terse", "--json"])
    assert whole.returncode == 0, whole.stderr
    assert (folder / "killed.terse").read_bytes() == (folder / "whole.terse").read_bytes()
    assert json.loads(again.stdout)["points"] == json.loads(whole.stdout)["points"]
    assert not (folder / "killed.run").exists()
