"""Time that the tests decide."""

import os

import pytest
import torch
from torch import nn

from tersetorch.conversion import timing


class FakeTimer:
    """Answers with the seconds set for the longest label that ends like the one asked for."""

    def __init__(self):
        self.seconds = {
            "dense": 1e-3,
            "dense again": 1e-3,
            "dense packed": 1e-3,
            "csr": 5e-4,
            "sparse_codebook": 9e-4,
            **dict.fromkeys(["csr16", "csr16_codebook", "bitmap", "bitmap_codebook", "bitmap_int8"], 2e-3),
            **dict.fromkeys(["bitmap_columns", "bitmap_columns_codebook"], 2e-3),
            **dict.fromkeys(["blocked", "blocked_codebook", "blocked_int8", "blocked_bfloat16"], 2e-3),
            **dict.fromkeys(["codebook_linear", "codebook_linear_bfloat16", "codebook_linear_int8"], 2e-3),
            **dict.fromkeys(["codebook_conv2d", "codebook_conv2d_bfloat16", "codebook_conv2d_int8"], 2e-3),
            **dict.fromkeys(["product_linear", "product_linear_int8", "product_conv2d"], 2e-3),
            **dict.fromkeys(["residual_linear", "residual_linear_int8", "residual_conv2d"], 2e-3),
            **dict.fromkeys(["binary_linear", "binary_linear_real", "binary_conv2d", "binary_conv2d_real"], 2e-3),
            **dict.fromkeys(["the chains: as decided", "the chains: whole"], 1e-3),
            **dict.fromkeys(["binary_linear_pixels", "binary_linear_signed_pixels"], 2e-3),
            **dict.fromkeys(["multiplied_out_linear", "multiplied_out_conv2d", "multiplied_out_clusters"], 2e-3),
            "the model: dense model": 1e-2,
            "the model: dense model channels_last": 1e-2,
            "the model: dense model with ReLU in place": 1e-2,
            "the model: dense model channels_last with ReLU in place": 1e-2,
            "dense channels_last": 1e-3,
            **dict.fromkeys(
                ["sparse_conv2d", "sparse_codebook_conv2d", "sparse_conv1d", "sparse_codebook_conv1d"], 4e-4
            ),
            "the model: dense again": 1e-2,
            "the model: converted model": 5e-3,
            "the model: converted model in channels_last": 6e-3,
        }
        self.asked = []

    def __call__(self, label, run, repeats):
        self.asked.append(label)
        ending = max((key for key in self.seconds if label.endswith(key)), key=len)
        seconds = self.seconds[ending]
        return seconds() if callable(seconds) else seconds

    def count(self, ending):
        return sum(label.endswith(ending) for label in self.asked)


@pytest.fixture
def timer(monkeypatch, tmp_path):
    """Real time and load are never asked, and the user's cache never touched."""
    fake = FakeTimer()
    monkeypatch.setattr(timing, "time_calls", fake)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setenv("TERSETORCH_CACHE", str(tmp_path / "cache"))
    return fake


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def sparse_linear(generator):
    """Makes an nn.Linear with about density non-zeros, of as many distinct values as asked for."""

    def make(inputs=40, outputs=30, density=0.1, distinct=None, bias=True):
        layer = nn.Linear(inputs, outputs, bias=bias)
        weight = torch.randn(outputs, inputs, generator=generator)
        if distinct is not None:
            weight = torch.linspace(0.1, 1, distinct)[
                torch.randint(0, distinct, (outputs, inputs), generator=generator)
            ]
        weight[torch.rand(outputs, inputs, generator=generator) >= density] = 0
        with torch.no_grad():
            layer.weight.copy_(weight)
            if bias:
                layer.bias.copy_(torch.randn(outputs, generator=generator))
        return layer

    return make
