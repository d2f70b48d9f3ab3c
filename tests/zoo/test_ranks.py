import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tersetorch as tt
from tersetorch.methods.distributed import check_device
from tersetorch.zoo.ranks import from_rank_0, rank, ranks, start

SCRIPT = Path(__file__).with_name("training_ranks.py")


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def states(request, tmp_path_factory):
    """What each rank trained, by case."""
    count = request.param
    folder = tmp_path_factory.mktemp("ranks")
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(place), str(count), folder], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for place in range(count)
    ]
    try:
        said = [process.communicate(timeout=300)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * count, "\n".join(said)
    return [torch.load(folder / f"{place}.pt", weights_only=True) for place in range(count)]


def differing(states, case):
    """Names of what is not the same on all ranks, and which of them there are."""
    first, *others = (state[case] for state in states)
    assert all(first.keys() == other.keys() for other in others)
    return [name for name in first if not all(torch.equal(first[name], other[name]) for other in others)]


@pytest.mark.parametrize("case", ["pruned", "noisy", "wrapped", "binary", "binary_activations", "phases"])
def test_all_ranks_end_with_the_same_bits(states, case):
    """Batches of 7 of 50 images, which neither two nor three ranks can share evenly."""
    assert not differing(states, case)


def test_weights_are_rounded_at_random_to_the_same_bits(states):
    """How many activations had random bits may differ, of which each rank has its own."""
    assert all(name.endswith("fixed_activations._extra_state") for name in differing(states, "fixed"))
    weights = states[0]["fixed"]["body.0.parametrizations.weight.original"] * 256
    assert torch.equal(weights, weights.round())


def test_every_phase_leaves_masks_and_codes(states):
    found = states[0]["phases"]
    for phase in ("magnitude", "surgery", "pruned again", "shared", "trained values"):
        mask = found[f"{phase}, mask 0"]
        assert 0 < int(mask.sum()) < mask.numel()
        assert (f"{phase}, codes 0" in found) == (phase in ("shared", "trained values"))
    assert torch.equal(found["shared, codes 0"], found["trained values, codes 0"])
    assert not torch.equal(found["shared, codebook 0"], found["trained values, codebook 0"])


def test_one_process_trains_the_same_up_to_rounding(states):
    alone = runpy.run_path(str(SCRIPT))["pruned"](0).state_dict()
    for name, tensor in states[0]["pruned"].items():
        torch.testing.assert_close(tensor, alone[name])


def test_a_process_alone_is_rank_0():
    assert (rank(), ranks(), from_rank_0(lambda: "done")) == (0, 1, "done")
    with pytest.raises(ValueError, match="invalid literal"):
        from_rank_0(lambda: int("one"))


def test_a_process_of_torchrun_must_start_before_it_trains_beside_the_others(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"as one of 2, got none; call tersetorch\.zoo\.ranks\.start\(\) first"):
        tt.zoo.fit(torch.nn.Linear(3, 2), torch.rand(4, 3), torch.tensor([0, 1, 1, 0]), epochs=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="backend must be 'gloo' where there is no CUDA device, got 'nccl'"):
        start("nccl")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert ranks() == 1


def test_a_model_on_the_cpu_is_not_sent_by_nccl(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_backend", lambda group: "nccl")
    with pytest.raises(ValueError, match="must lie on a CUDA device where the backend is 'nccl', got one on cpu"):
        check_device(None, torch.device("cpu"))
    check_device(None, torch.device("cuda"))
