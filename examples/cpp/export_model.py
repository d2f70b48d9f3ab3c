"""Packages a small sparse network for run_model: python export_model.py MODEL.pt2."""

import sys

import torch

import tersetorch as tt


def build_model() -> torch.nn.Module:
    """Two sparse layers, 100 -> 16 -> 7, with seeded weights."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(100, 16), torch.nn.ReLU(), torch.nn.Linear(16, 7))
    tt.prune.magnitude(model, sparsity=0.8)
    return tt.convert(model, plan="sparse").eval()


def package(path: str) -> None:
    """Writes the model, for any batch, to path."""
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        exported = torch.export.export(build_model(), (torch.randn(3, 100),), dynamic_shapes=({0: batch},))
    torch._inductor.aoti_compile_and_package(exported, package_path=path)


if __name__ == "__main__":
    package(sys.argv[1])
