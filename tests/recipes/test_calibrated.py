import itertools

import pytest
import torch
from torch import nn

from tersetorch.recipes.calibrated import drawn_batches, fingerprint_of_batches, first_batches
from tersetorch.zoo import fit


@pytest.mark.parametrize(
    "batch",
    [
        torch.ones(4, 3),
        (torch.ones(4, 3), torch.ones(4)),
        [torch.ones(4, 3)],
        {"factor": torch.tensor(2.0), "input": torch.ones(4, 3)},
    ],
)
def test_no_more_batches_are_taken_than_hold_the_examples(batch):
    places = itertools.count()
    assert len(first_batches("here", (batch for _ in places), 9)) == 3 and next(places) == 3
    assert len(first_batches("here", [batch] * 2, 9)) == 2


def test_images_are_those_that_training_sees_first():
    seen = []

    class Seeing(nn.Linear):
        def forward(self, x):
            seen.append(x.clone())
            return super().forward(x)

    images, labels = torch.arange(40.0)[:, None], torch.zeros(40, dtype=torch.int64)
    fit(Seeing(1, 2), images / 40, labels, epochs=1, batch_size=8, seed=5)
    drawn = drawn_batches(images / 40, 20, 8, seed=5)
    assert [len(batch) for batch in drawn] == [8, 8, 4]
    assert torch.equal(torch.cat(drawn), torch.cat(seen)[:20])
    assert len(torch.cat(drawn_batches(images, 99, 8, seed=5))) == 40


def test_batches_are_told_apart_by_values_shape_and_type():
    batches = [{"x": torch.arange(6.0)}, (torch.ones(2), 3)]
    others = [
        [{"x": torch.arange(6.0) + 1}, batches[1]],
        [{"x": torch.arange(6.0).view(2, 3)}, batches[1]],
        [{"x": torch.arange(6.0).int()}, batches[1]],
        batches[:1],
        batches[::-1],
    ]
    found = {fingerprint_of_batches(each) for each in (batches, *others)}
    assert len(found) == 6 and fingerprint_of_batches([{"x": torch.arange(6.0)}, (torch.ones(2), 3)]) in found
