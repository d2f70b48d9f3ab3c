import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    # Small trainings are quicker so, most of all beside other work.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
