import ctypes
import resource

import pytest
import torch

from tersetorch.bench.allocator import can_keep_pages, kept_pages

pytestmark = pytest.mark.skipif(not can_keep_pages(), reason="glibc alone has these settings")


class Noting:
    """glibc, with a note of what it was told and answered."""

    def __init__(self):
        self._libc = ctypes.CDLL(None)
        self.told = []

    def mallopt(self, which, value):
        self.told.append((which, value, self._libc.mallopt(which, value)))

    def malloc_trim(self, pad):
        self._libc.malloc_trim(pad)


def test_pages_are_kept_for_a_while(monkeypatch):
    noting = Noting()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: noting)
    with pytest.raises(RuntimeError), kept_pages():
        assert dict(told[:2] for told in noting.told) == {-4: 0, -1: 2**31 - 1}
        raise RuntimeError
    assert {told[:2] for told in noting.told[2:]} == {(-4, 1 << 16), (-3, 1 << 25), (-1, 1 << 26)}
    assert all(answer == 1 for *_, answer in noting.told)


def test_large_tensors_are_mapped_anew_afterwards():
    with kept_pages():
        torch.ones(1 << 24)

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(1 << 24)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert max(faults() for _ in range(3)) > 16  # pages of 2 MiB at the most
