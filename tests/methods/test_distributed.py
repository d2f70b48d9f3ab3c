import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tersetorch.methods.distributed import take_from_rank_0

RANKS = 2
SCRIPT = Path(__file__).with_name("distributed_ranks.py")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each rank got, by case: its last loss and the model's state."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), str(RANKS), folder], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in range(RANKS)
    ]
    try:
        said = [process.communicate(timeout=300)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * RANKS, "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def differing(states):
    return {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}


@pytest.mark.parametrize("case", ["magnitude", "iterative", "gradual", "gradual_unlike", "surgery", "kmeans"])
def test_every_rank_has_the_same_masks_codes_and_weights(outcomes, case):
    (one_loss, one), (other_loss, other) = (ranks[case] for ranks in outcomes)
    assert one.keys() == other.keys()
    assert not differing([one, other])
    assert one_loss != other_loss  # their data differed
    masks = [tensor for name, tensor in one.items() if name.startswith("mask")]
    assert len(masks) == (4 if case == "surgery" else 2)
    assert all(0 < int(mask.sum()) < mask.numel() for mask in masks[:1])
    assert ("codes 0" in one) == (case == "kmeans")


def test_rank_0_decides(outcomes):
    assert int(outcomes[1]["gradual_unlike"][1]["mask 0"].sum()) == round(0.3 * 340)


@pytest.mark.parametrize("case", ["each_on_its_own", "a_group_of_each"])
def test_ranks_that_train_models_of_their_own_keep_their_masks(outcomes, case):
    assert {"mask 0", "mask 1"} <= differing([ranks[case][1] for ranks in outcomes])


@pytest.mark.parametrize("case", ["rank_0_alone", "batch_norm", "any_layout"])
def test_the_rest(outcomes, case):
    assert not differing([ranks[case][1] for ranks in outcomes])


def test_nothing_happens_where_there_are_no_ranks(mlp):
    mask = torch.tensor([True, False])
    take_from_rank_0(mlp, [mask])
    assert mask.tolist() == [True, False]
