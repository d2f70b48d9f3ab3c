"""Where the tests of CUDA ops run: on a GPU, or on the pretend device of `make test-cuda`."""

import os

import pytest
import torch

# The plugin of the pretend device has these fixtures too.
if "TERSETORCH_PRETEND_CUDA" not in os.environ:

    @pytest.fixture
    def device():
        """The GPU."""
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device; `make test-cuda` runs this on a pretend one")
        return "cuda"

    @pytest.fixture
    def emulator(device):
        """What shows how kernels were launched."""
        pytest.skip("only the pretend device of `make test-cuda` can show this")
