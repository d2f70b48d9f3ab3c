import resource
from contextlib import contextmanager

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    # Small trainings are quicker so, most of all beside other work.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def largest_file():
    """In a block of largest_file(nbytes) the system refuses to write more to any file."""

    @contextmanager
    def limited(nbytes):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited
