"""Packages a small converted network for run_model: python export_model.py MODEL.pt2."""

import sys

import torch
from torch import nn

import tersetorch as tt


def build_model() -> nn.Module:
    """A convolution and two linear layers for images of 12x12, pruned and shared, in three formats; seeded weights."""
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    model = nn.Sequential(*features, nn.Linear(400, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    tt.prune.magnitude(model, sparsity=0.8)
    tt.quantize.kmeans(model, bits=4)
    return tt.convert(model, plan={"0": "sparse_conv2d", "4": "sparse_codebook", "6": "codebook_linear"})


def package(model: nn.Module, inputs: tuple[torch.Tensor, ...], path: str, any_batch: bool = True) -> None:
    """Writes the model, for any number of samples or for that of inputs, to path."""
    batch = {0: torch.export.Dim("batch")}
    with torch.no_grad():
        exported = torch.export.export(
            model, inputs, dynamic_shapes=tuple(batch for _ in inputs) if any_batch else None
        )
    torch._inductor.aoti_compile_and_package(exported, package_path=path)


if __name__ == "__main__":
    package(build_model(), (torch.randn(3, 3, 12, 12),), sys.argv[1])
