"""AlexNet and VGG-16 layer by layer from the papers' densities: weights, bits, bytes and operations in our own formats.

No published weights are needed: a pattern of the published density is drawn for each layer, with normal values; what a
format takes depends on little else. Biases are left out, as in the papers' tables.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from tersetorch.bench.records import machine_facts
from tersetorch.bench.reproduce.runs import How, Reproduction
from tersetorch.costs import count
from tersetorch.formats import BitmapWeight, CsrWeight
from tersetorch.storage import inspect, save
from tersetorch.zoo import VGG16, AlexNet


@dataclass(frozen=True)
class Published:
    """A pruned network as a paper's table has it.

    Attributes:
        source: where.
        network: the zoo's.
        side: of its images.
        kept: percentage of each layer's weights that is left, in the network's order.
        operations: percentage of each layer's operations that is left, or None.
        activations: percentage of each layer's outputs that is not zero, or None.
        total: percentage of all weights that is left.
    """

    source: str
    network: Callable[[], nn.Module]
    side: int
    kept: tuple[float, ...]
    operations: tuple[float, ...] | None
    activations: tuple[float, ...] | None
    total: float


HAN = "Han, Pool, Tran, Dally, Learning both weights and connections (2015)"
PUBLISHED = {
    "alexnet_han": Published(
        f"{HAN}, table 4",
        AlexNet,
        227,
        (84, 38, 35, 37, 37, 9, 9, 25),
        (84, 33, 18, 14, 14, 3, 3, 10),
        (88, 52, 37, 40, 34, 36, 40, 100),
        11,
    ),
    "vgg16_han": Published(
        f"{HAN}, table 5",
        VGG16,
        224,
        (58, 22, 34, 36, 53, 24, 42, 32, 27, 34, 35, 29, 36, 4, 4, 23),
        (58, 12, 30, 29, 43, 16, 29, 21, 14, 15, 12, 9, 11, 1, 2, 9),
        None,
        7.5,
    ),
    "alexnet_dns": Published(
        "Guo, Yao, Chen, Dynamic network surgery (2016), table 4",
        AlexNet,
        227,
        (53.8, 40.6, 29.0, 32.3, 32.5, 3.7, 6.6, 4.6),
        None,
        None,
        5.7,
    ),
}


def run(how: How) -> dict[str, Any]:
    """Counts every published network once; how.seeds[0] draws the patterns, how.quick leaves VGG-16 out.

    Returns:
        JSON-able record: for each published network, a row for each layer and the total. A row holds weights, those
        kept, bits a kept weight in the file (values and positions), bytes dense, in the file, as CSR with 16-bit
        columns and as a bitmap, operations dense and left (twice the multiply-accumulates; times the activations of
        the layer before where the paper gives them), and the published percentages.

    Raises:
        ValueError: there is no seed.
    """
    if not how.seeds:
        raise ValueError("run: seeds must hold a seed, got none; pass for example [0]")
    started = time.monotonic()
    names = [name for name in PUBLISHED if not (how.quick and name.startswith("vgg16"))]
    networks = {}
    for name in names:
        published = PUBLISHED[name]
        networks[name] = _network(published, how, name)
    return {
        "reproduction": "published_densities",
        "seed": how.seeds[0],
        "networks": networks,
        "machine": machine_facts(),
        "seconds": time.monotonic() - started,
    }


def table(record: dict[str, Any]) -> Table:
    """Every network's layers and totals."""
    shown = Table(
        "network", "layer", "weights", "kept", "bits each", "file", "smaller", "csr16", "bitmap", "operations left",
        "published", title="Published densities in our formats",
    )  # fmt: skip
    for name, network in record["networks"].items():
        for row in [*network["layers"], network["total"]]:
            published = row["published_operations"]
            shown.add_row(
                name,
                row["layer"],
                f"{row['weights']:,}",
                f"{100 * row['kept'] / row['weights']:.3g} %",
                f"{row['bits']:.1f}",
                f"{row['file_bytes']:,}",
                f"{row['dense_bytes'] / row['file_bytes']:.1f}x",
                f"{row['csr16_bytes']:,}",
                f"{row['bitmap_bytes']:,}",
                f"{100 * row['operations_left'] / row['operations']:.3g} %",
                "" if published is None else f"{published:g} %",
            )
        shown.add_section()
    return shown


def _network(published: Published, how: How, name: str) -> dict[str, Any]:
    with torch.device("meta"):
        model = published.network()
        counted = count(model, torch.empty(1, 3, published.side, published.side))
    layers = [layer for layer in counted.layers if layer.macs]
    generator = torch.Generator().manual_seed(how.seeds[0])
    task = None if how.progress is None else how.progress.add_task(name, total=len(layers))
    rows = []
    for index, layer in enumerate(layers):
        shape = tuple(model.get_parameter(f"{layer.name}.weight").shape)
        kept = published.kept[index] / 100
        before = 1.0 if published.activations is None or not index else published.activations[index - 1] / 100
        operations = None if published.operations is None else published.operations[index]
        rows.append(
            {
                "layer": layer.name,
                **_stored(_pattern(shape, kept, generator)),
                "operations": 2 * layer.macs,
                "operations_left": round(2 * layer.macs * kept * before),
                "published_kept": published.kept[index],
                "published_operations": operations,
            }
        )
        if how.progress is not None and task is not None:
            how.progress.advance(task)
    return {"source": published.source, "layers": rows, "total": _total(rows, published)}


def _pattern(shape: tuple[int, ...], kept: float, generator: torch.Generator) -> Tensor:
    weight = torch.randn(shape, generator=generator)
    return weight.masked_fill_(torch.rand(shape, generator=generator) >= kept, 0)


def _stored(weight: Tensor) -> dict[str, Any]:
    """What a layer takes in the file and in two formats, biases left out."""
    matrix = weight.flatten(1)
    holder = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    holder.weight = nn.Parameter(matrix)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.terse"
        save(holder, path)
        (tensor,) = inspect(path).tensors
    kept = int(weight.count_nonzero())
    return {
        "weights": weight.numel(),
        "kept": kept,
        "bits": 8 * tensor.nbytes / kept,
        "dense_bytes": 4 * weight.numel(),
        "file_bytes": tensor.nbytes,
        "csr16_bytes": CsrWeight.from_dense(matrix).narrowed().nbytes,
        "bitmap_bytes": BitmapWeight.from_dense(matrix).nbytes,
    }


def _total(rows: list[dict[str, Any]], published: Published) -> Mapping[str, Any]:
    summed = (
        "weights", "kept", "dense_bytes", "file_bytes", "csr16_bytes", "bitmap_bytes", "operations", "operations_left",
    )  # fmt: skip
    total: dict[str, Any] = {name: sum(row[name] for row in rows) for name in summed}
    return total | {
        "layer": "total",
        "bits": 8 * total["file_bytes"] / total["kept"],
        "published_kept": published.total,
        "published_operations": None,
    }


ROWS = [
    Reproduction("published_densities", "AlexNet and VGG-16 from Han's and DNS's densities, in our formats", run, table)
]
