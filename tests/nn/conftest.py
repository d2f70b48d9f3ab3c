"""What the tests of layers share."""

import pytest
import torch


@pytest.fixture
def fresh_compiler():
    """torch.compile counts how often one forward() was compiled over all layers, and stops at 8."""
    torch.compiler.reset()
