import resource

import pytest
import torch

from tersetorch.bench.allocator import can_keep_pages, kept_pages

SIZE = 1 << 24


def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(SIZE)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not can_keep_pages(), reason="glibc alone keeps pages")
def test_pages_are_kept_for_a_while():
    # What a neighbouring allocation keeps from growing back together is taken elsewhere: now and then there are faults.
    with kept_pages():
        kept = min(faults() for _ in range(5))
    assert kept < max(faults() for _ in range(5)) / 4
