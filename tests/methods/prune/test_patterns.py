import itertools
import re

import numpy as np
import pytest
import torch
from torch import nn

from tersetorch.methods import finalize, prune
from tersetorch.methods.parametrization import is_live
from tersetorch.methods.prune.patterns import BlockPattern, GroupPattern, keep, keep_together, parse


def blocks_of(shape, rows, columns):
    """The entries of each block of a weight of this shape, as index arrays into the flat weight, in order."""
    index = np.arange(np.prod(shape)).reshape(shape[0], int(np.prod(shape[1:])))
    return [
        index[top : top + rows, left : left + columns].flatten()
        for top in range(0, index.shape[0], rows)
        for left in range(0, index.shape[1], columns)
    ]


def reference_blocks(score, alive, sparsity, rows, columns):
    """Blocks in order of mean score while they fit into the number of weights to prune."""
    flat, living = score.double().numpy().flatten(), alive.numpy().flatten()
    blocks = blocks_of(score.shape, rows, columns)
    means = [(flat[block] * living[block]).sum() / len(block) if living[block].any() else -1 for block in blocks]
    kept, budget = np.ones(flat.size, bool), round(sparsity * flat.size)
    for number in sorted(range(len(blocks)), key=means.__getitem__):
        budget -= len(blocks[number])
        if budget < 0:
            break
        kept[blocks[number]] = False
    return torch.from_numpy(kept).view(score.shape)


def scores(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Few distinct values, so that there are ties.
    return torch.randint(0, 6, shape, generator=generator).float(), torch.rand(shape, generator=generator) > 0.2


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (1, 2), (1, 4), (3, 7), (4, 8)])
@pytest.mark.parametrize("shape", [(1, 56), (5, 112), (3, 56, 3, 3), (2, 56, 5), (0, 56)])
def test_the_largest_of_each_group_of_input_channels_stay(kept, group, shape):
    score, alive = scores(shape)
    mask = keep(score, alive, 0, GroupPattern(kept, group))
    for place in itertools.product(*(range(size) for axis, size in enumerate(shape) if axis != 1)):
        row = (place[0], slice(None), *place[1:])
        for start in range(0, shape[1], group):
            part = slice(start, start + group)
            found, ranks = mask[row][part], (score[row] * alive[row] - 1.0 * ~alive[row])[part]
            order = sorted(range(group), key=lambda entry, ranks=ranks: float(ranks[entry]))
            assert found.nonzero().flatten().tolist() == sorted(order[group - kept :])


@pytest.mark.parametrize("shape", [(8, 8), (7, 13), (1, 1), (5, 3, 3, 3), (4, 2, 3), (0, 4), (4, 0)])
@pytest.mark.parametrize(("rows", "columns"), [(4, 1), (1, 4), (2, 3), (16, 16)])
@pytest.mark.parametrize("sparsity", [0, 0.3, 0.5, 0.97])
def test_blocks_of_least_mean_score_go_whole(shape, rows, columns, sparsity):
    score, alive = scores(shape)
    found = keep(score, alive, sparsity, BlockPattern(rows, columns))
    assert torch.equal(found, reference_blocks(score, alive, sparsity, rows, columns))


def test_blocks_of_all_layers_are_ranked_together():
    small, large = torch.ones(4, 4), torch.full((4, 4), 2.0)
    alive = torch.ones(4, 4, dtype=torch.bool)
    first, second = keep_together([large, small], [alive, alive], 0.5, BlockPattern(4, 1))
    assert bool(first.all()) and not bool(second.any())
    first, second = keep_together([large, small], [alive, alive], 0.25, BlockPattern(4, 1))
    assert bool(first.all()) and second.sum(0).tolist() == [0, 0, 4, 4]


def test_what_a_mask_prunes_already_goes_before_zeros():
    score, alive = torch.zeros(1, 4), torch.tensor([[True, True, False, False]])
    assert keep(score, alive, 0.5).tolist() == [[True, True, False, False]]
    assert keep(score, alive, 0.5, BlockPattern(1, 1)).tolist() == [[True, True, False, False]]
    assert keep(score, alive, 0, GroupPattern(2, 4)).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_convolution_pruned_two_of_four_trains_and_keeps_the_pattern(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Conv2d(6, 4, 1)).to(dtype)
    assert prune.magnitude(model, pattern="2:4", targets="0") is model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(2, 8, 5, 5, dtype=dtype)).square().sum().backward()
    optimizer.step()
    finalize(model)
    assert torch.equal((model[0].weight != 0).unflatten(1, (2, 4)).sum(2), torch.full((6, 2, 3, 3), 2))
    assert bool((model[1].weight != 0).all())


def test_pruned_groups_lose_nothing_more_to_the_pattern():
    model = nn.Linear(4, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    prune.magnitude(model, 0.5)
    prune.magnitude(model, pattern="2:4")
    assert model.weight.tolist() == [[0, 0, 3, 4]]
    prune.magnitude(model, pattern="1:4")
    assert model.weight.tolist() == [[0, 0, 0, 4]]


@pytest.mark.parametrize(
    ("text", "form"),
    [(None, None), ("2:4", GroupPattern(2, 4)), ("4x1", BlockPattern(4, 1)), ("1x1", BlockPattern(1, 1))],
)
def test_what_each_text_says(text, form):
    assert parse("here", text) == form


@pytest.mark.parametrize("text", ["", "2", "4:2", "2:2", "0:4", "0x4", "-1x4", "2:4 ", "2 :4", "axb", "2x", "\u0662:4"])
def test_texts_that_name_no_pattern_are_refused(text, mlp):
    with pytest.raises(
        ValueError,
        match=re.escape(
            f"prune.magnitude: pattern must be 'N:M' with 0 < N < M or 'RxC' with positive sides, got {text!r}"
        ),
    ):
        prune.magnitude(mlp, 0.5, pattern=text)
    assert not is_live(mlp)


def test_a_pattern_that_is_no_text_is_refused(mlp):
    with pytest.raises(TypeError, match=r"prune.magnitude: pattern must be a str or None, got tuple"):
        prune.magnitude(mlp, 0.5, pattern=(4, 1))
    assert not is_live(mlp)
