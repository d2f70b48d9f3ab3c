"""The main job on real data: train, compress, save, load, convert, and count everything on the way."""

from __future__ import annotations

import copy
import gzip
import os
import statistics
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from tersetorch.conversion import convert, report
from tersetorch.conversion.timing import ROUNDS, time_calls
from tersetorch.methods import finalize
from tersetorch.recipes.lenet import compress_lenet, quick_plan, train_lenet
from tersetorch.storage import inspect, load, save
from tersetorch.zoo import error_rate
from tersetorch.zoo.data import Name
from tersetorch.zoo.data import load as load_data

FILE_NAME = "lenet300100.terse"
BATCHES = (1, 64)

# The fully connected layers of AlexNet: out, in, and the part of the weights that Deep Compression keeps.
ALEXNET = {"fc6": (4096, 9216, 0.09), "fc7": (4096, 4096, 0.09), "fc8": (1000, 4096, 0.25)}
# Distinct non-zero weights a layer: the paper's 5 bits.
ALEXNET_VALUES = 31
HISTOGRAM_BINS = 101
CALLS = 10


def compute_demo(
    seed: int, output: str | os.PathLike[str], *, data: Name = "auto", progress: Progress | None = None
) -> dict[str, Any]:
    """Trains LeNet-300-100, prunes, shares, saves, loads and converts it, and times its kernels on AlexNet's layers.

    Args:
        seed: of everything drawn; the same seed gives the same errors and bytes on the same machine and threads.
        output: folder for the file, made where it is missing.
        data: the data set, as in tersetorch.zoo.load.
        progress: bars for the long parts are added to it.

    Returns:
        JSON-able record: seed, data, error, parameters, bytes, file (what inspect says), latency (one row for each
        layer and network), weights (fc1 before and after, as a histogram) and machine.

    Raises:
        ValueError, TypeError, FileNotFoundError: as tersetorch.zoo.load.
        RuntimeError: the loaded network does not give the very outputs of the saved one.
    """
    loaded = load_data(data, seed=seed)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    bar = progress if progress is not None else Progress(disable=True)

    plan = quick_plan(loaded)
    dense = train_lenet(loaded, plan, seed=seed, progress=bar)
    small = finalize(compress_lenet(copy.deepcopy(dense), loaded, plan, seed=seed, progress=bar))
    path = folder / FILE_NAME
    save(small, path)
    again = load(path)
    for network in (dense, small, again):
        network.eval()
    with torch.no_grad():
        if not torch.equal(again(loaded.test_images), small(loaded.test_images)):
            raise RuntimeError(f"demo: {path} must load to the outputs that were saved, got others; report this")

    task = bar.add_task("time every layer against dense", total=2 * len(BATCHES))
    latency: list[dict[str, Any]] = []
    converted = {}
    for batch in BATCHES:
        converted[batch], rows = _race("LeNet-300-100", again, loaded.test_images[:batch], seed)
        latency += rows
        bar.advance(task)
    for batch in BATCHES:
        _, rows = _race("AlexNet FC", _alexnet_layers(seed), _activations(batch, seed), seed)
        latency += rows
        bar.advance(task)

    fast = converted[BATCHES[0]]
    plain = safetensors_bytes(dict(dense.state_dict()))
    return {
        "seed": seed,
        "data": {"name": loaded.name, "source": loaded.source, "test_images": len(loaded.test_images)},
        "error": {
            "dense": error_rate(dense, loaded.test_images, loaded.test_labels),
            "compressed": error_rate(fast, loaded.test_images, loaded.test_labels),
        },
        "parameters": {
            "dense": sum(parameter.numel() for parameter in dense.parameters()),
            "compressed": sum(int(parameter.count_nonzero()) for parameter in small.parameters()),
        },
        "bytes": {"dense": len(plain), "gzip": len(gzip.compress(plain, 9)), "terse": path.stat().st_size},
        "path": str(path),
        "file": inspect(path).to_dict(),
        "latency": latency,
        "weights": _weights(dense, small),
        "machine": report(fast).machine,
    }


def _race(network: str, model: nn.Module, x: Tensor, seed: int) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Lets convert time model on x: the converted model, and a row for each layer and one for the whole."""
    fast = convert(model, x, cache=False, seed=seed)
    conversion = report(fast)
    rows = []
    for layer in conversion.layers:
        ours = next((trial.median_ms for trial in layer.trials if trial.format == layer.chosen), layer.dense_ms)
        rows.append(_row(network, layer.name, x, layer.chosen, layer.dense_ms, ours, layer.density))
    swapped = any(layer.chosen != "dense" for layer in conversion.layers)
    # Where nothing was swapped there was nothing to compare, and convert did not time the whole.
    dense_ms = conversion.dense_ms if conversion.dense_ms is not None else _dense_ms(model, x)
    ours_ms = conversion.converted_ms if swapped else dense_ms
    rows.append(_row(network, "whole", x, "converted" if swapped else "dense", dense_ms, ours_ms, None))
    return fast, rows


@torch.no_grad()
def _dense_ms(model: nn.Module, x: Tensor) -> float:
    return 1e3 * statistics.median(time_calls("dense", lambda: model(x), CALLS) for _ in range(ROUNDS))


def _row(
    network: str,
    layer: str,
    x: Tensor,
    chosen: str,
    dense_ms: float | None,
    ours_ms: float | None,
    density: float | None,
) -> dict[str, Any]:
    return {
        "network": network,
        "layer": layer,
        "batch": len(x),
        "density": density,
        "runs_as": chosen,
        "dense_ms": dense_ms,
        "ours_ms": ours_ms,
    }


def _alexnet_layers(seed: int) -> nn.Sequential:
    """AlexNet's classifier with random weights: speed depends on how many are kept and shared, not on which."""
    generator = torch.Generator().manual_seed(seed)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for name, (rows, columns, kept) in ALEXNET.items():
        values = torch.cat([torch.zeros(1), torch.linspace(-0.05, 0.05, ALEXNET_VALUES + 1)[1:]])
        codes = torch.randint(1, len(values), (rows, columns), generator=generator)
        layer = nn.Linear(columns, rows, device="meta")
        layer.weight = nn.Parameter(values[codes * (torch.rand(rows, columns, generator=generator) < kept)])
        layer.bias = nn.Parameter(torch.zeros(rows))
        layers[name], layers[f"relu_{name}"] = layer, nn.ReLU()
    layers.popitem()
    return nn.Sequential(layers).eval()


def _activations(batch: int, seed: int) -> Tensor:
    return torch.rand(batch, ALEXNET["fc6"][1], generator=torch.Generator().manual_seed(seed))


def _weights(dense: nn.Module, small: nn.Module) -> dict[str, Any]:
    """The first layer's weights: a histogram of the dense ones, and each shared value with its count."""
    before, after = (model.get_parameter("fc1.weight").detach() for model in (dense, small))
    limit = float(after.abs().max())
    counts = torch.histc(before, HISTOGRAM_BINS, -limit, limit)
    values, members = after[after != 0].unique(return_counts=True)
    return {
        "layer": "fc1",
        "limit": limit,
        "dense_counts": counts.int().tolist(),
        "shared_values": values.tolist(),
        "shared_counts": members.tolist(),
        "pruned": int((after == 0).sum()),
    }
