"""Models and training steps that the room's tests share."""

import pytest
import torch
from torch import nn


class Tied(nn.Module):
    """Two layers and an embedding with one weight."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12)
        self.twin = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight
        self.twin.weight = self.embedding.weight

    def forward(self, tokens):
        hidden = self.inner(self.embedding(tokens))
        return self.head(hidden) + self.twin(hidden)


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small are slower on two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tied():
    torch.manual_seed(0)
    return Tied()


@pytest.fixture
def make_mlp():
    def make(seed=0):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(20, 17), nn.ReLU(), nn.Linear(17, 5))

    return make


@pytest.fixture
def mlp(make_mlp):
    return make_mlp()


@pytest.fixture
def train():
    """Takes `steps` steps on seeded data; returns the optimizer."""

    def run(model, optimizer=None, steps=3, seed=0, scheduler=None, after=None):
        if optimizer is None:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            x = torch.randn(16, 20, generator=generator)

            def closure(x=x):
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)
            if scheduler is not None:
                scheduler.step()
            if after is not None:
                after()
        return optimizer

    return run
