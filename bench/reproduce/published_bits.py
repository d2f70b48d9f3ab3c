"""Deep Compression's tables of AlexNet and VGG-16 layer by layer: bits a weight and a position, and sizes.

No published weights are needed: for each layer positions of the published density are drawn, and values whose codes,
after k-means from linear initialisation to as many values as the paper's, take about the bits that the paper prints for
them. So what is compared is accounting, positions and coders. Positions are independent here; in trained networks,
whose positions took fewer bits, they are not. Biases are left out, as in the paper.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor, nn

from tersetorch.bench.records import machine_facts
from tersetorch.bench.reproduce.accounting import fixed_bytes, gap_counts, huffman_bytes
from tersetorch.bench.reproduce.published_densities import PUBLISHED
from tersetorch.bench.reproduce.runs import How, Reproduction
from tersetorch.methods.quantize.kmeans_1d import cluster
from tersetorch.storage import inspect, save
from tersetorch.zoo import VGG16, AlexNet

Floats = NDArray[np.float32]
CONV_BITS, LINEAR_BITS = 8, 5
# Where k of _drawn is looked for, and on how many values.
HEAVY, LIGHT = 0.2, 1.0
BISECTIONS = 10
SAMPLE = 200_000


@dataclass(frozen=True)
class Bits:
    """A compressed network as the paper's table has it.

    Attributes:
        source: where.
        network: the zoo's.
        kept: percentage of each layer's weights that is left, in the network's order.
        gap_bits: bits of a position before Huffman coding.
        code_bits: of a weight after Huffman coding, for each layer.
        position_bits: of a position after it.
        shared_percent: each layer's size pruned and shared, in percent of float32.
        percent: the same after Huffman coding.
        ratios: of the whole network, pruned and shared, and after Huffman coding.
        bytes: of the whole network after it.
    """

    source: str
    network: Callable[[], nn.Module]
    kept: tuple[float, ...]
    gap_bits: int
    code_bits: tuple[float, ...]
    position_bits: tuple[float, ...]
    shared_percent: tuple[float, ...]
    percent: tuple[float, ...]
    ratios: tuple[float, float]
    bytes: int


PAPER = "Han, Mao, Dally, Deep Compression (2016)"
PUBLISHED_BITS = {
    "alexnet": Bits(
        source=f"{PAPER}, table 4",
        network=AlexNet,
        kept=PUBLISHED["alexnet_han"].kept,
        gap_bits=4,
        code_bits=(6.3, 5.5, 5.1, 5.2, 5.6, 3.9, 3.6, 4.0),
        position_bits=(1.2, 2.3, 2.6, 2.5, 2.5, 3.2, 3.7, 3.2),
        shared_percent=(32.6, 14.5, 13.1, 14.1, 14.0, 3.0, 3.0, 7.3),
        percent=(20.53, 9.43, 8.44, 9.11, 9.43, 2.39, 2.46, 5.85),
        ratios=(27, 35),
        bytes=6_900_000,
    ),
    "vgg16": Bits(
        source=f"{PAPER}, table 5",
        network=VGG16,
        kept=PUBLISHED["vgg16_han"].kept,
        gap_bits=5,
        code_bits=(6.8, 6.5, 5.6, 5.9, 4.8, 4.6, 4.6, 4.6, 4.2, 4.4, 4.7, 4.6, 4.6, 3.6, 4.0, 4.0),
        position_bits=(1.7, 2.6, 2.4, 2.3, 1.8, 2.9, 2.2, 2.6, 2.9, 2.5, 2.5, 2.7, 2.3, 3.5, 4.3, 3.4),
        shared_percent=(40.0, 9.8, 14.3, 14.7, 21.7, 9.7, 17.0, 13.1, 10.9, 14.0, 14.3, 11.7, 14.8, 1.6, 1.5, 7.1),
        percent=(
            29.97, 6.99, 8.91, 9.31, 11.15, 5.67, 8.96, 7.29, 5.93, 7.47, 8.0, 6.52, 7.79, 1.10, 1.25, 5.24,
        ),
        ratios=(31, 49),
        bytes=11_300_000,
    ),
}  # fmt: skip


def run(how: How) -> dict[str, Any]:
    """Counts each published network once; how.seeds[0] draws the weights, how.quick leaves VGG-16 out.

    Returns:
        JSON-able record: for each network, a row for each layer and the total. A row holds weights, those kept,
        fillers, bits of a code and of a position after Huffman coding (tables included, for each weight that is kept
        and each filler), bytes pruned and shared, after Huffman coding, and in our file by its best coders, and the
        published figures.

    Raises:
        ValueError: there is no seed.
    """
    if not how.seeds:
        raise ValueError("run: seeds must hold a seed, got none; pass for example [0]")
    started = time.monotonic()
    names = [name for name in PUBLISHED_BITS if not (how.quick and name.startswith("vgg16"))]
    return {
        "reproduction": "published_bits",
        "seed": how.seeds[0],
        "networks": {name: _network(PUBLISHED_BITS[name], how, name) for name in names},
        "machine": machine_facts(),
        "seconds": time.monotonic() - started,
    }


def table(record: dict[str, Any]) -> Table:
    """Every layer and the totals, the paper's figures in brackets."""
    shown = Table(
        "network", "layer", "weights", "kept", "bits", "code bits", "position bits", "pruned and shared", "Huffman",
        "our file", title="Percent of float32 (Deep Compression's figures in brackets)",
    )  # fmt: skip
    for name, network in record["networks"].items():
        for row in network["layers"]:
            paper = row["published"]
            shown.add_row(
                name,
                row["layer"],
                f"{row['weights']:,}",
                f"{100 * row['kept'] / row['weights']:.3g} %",
                f"{row['value_bits']} + {row['gap_bits']}",
                f"{row['code_bits']:.1f} ({paper['code_bits']:g})",
                f"{row['position_bits']:.1f} ({paper['position_bits']:g})",
                f"{_percent(row, 'shared_bytes'):.3g} ({paper['shared_percent']:g})",
                f"{_percent(row, 'huffman_bytes'):.3g} ({paper['percent']:g})",
                f"{_percent(row, 'file_bytes'):.3g}",
            )
        row, paper = network["total"], network["published"]
        sizes = (f"{row['dense_bytes'] / row[key]:.1f}x" for key in ("shared_bytes", "huffman_bytes", "file_bytes"))
        shared, huffman, file = sizes
        shown.add_row(
            name,
            "total",
            f"{row['weights']:,}",
            f"{100 * row['kept'] / row['weights']:.3g} %",
            "",
            f"{row['code_bits']:.1f}",
            f"{row['position_bits']:.1f}",
            f"{shared} ({paper['ratios'][0]}x)",
            f"{huffman} ({paper['ratios'][1]}x, {paper['bytes'] / 1e6:g} MB)",
            f"{file}, {row['file_bytes'] / 1e6:.2f} MB",
        )
        shown.add_section()
    return shown


def _percent(row: dict[str, Any], key: str) -> float:
    return float(100 * row[key] / row["dense_bytes"])


def _network(published: Bits, how: How, name: str) -> dict[str, Any]:
    with torch.device("meta"):
        model = published.network()
    layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    generator = torch.Generator().manual_seed(how.seeds[0])
    task = None if how.progress is None else how.progress.add_task(name, total=len(layers))
    rows = []
    for index, (path, layer) in enumerate(layers):
        bits = CONV_BITS if isinstance(layer, nn.Conv2d) else LINEAR_BITS
        weight = _drawn(tuple(layer.weight.shape), published, index, bits, generator)
        columns = ("code_bits", "position_bits", "shared_percent", "percent")
        rows.append(
            {
                "layer": path,
                **_counted(weight, bits, published.gap_bits),
                "published": {column: getattr(published, column)[index] for column in columns},
            }
        )
        if how.progress is not None and task is not None:
            how.progress.advance(task)
    return {
        "source": published.source,
        "layers": rows,
        "total": _total(rows),
        "published": {"ratios": published.ratios, "bytes": published.bytes},
    }


def _drawn(shape: tuple[int, ...], published: Bits, index: int, bits: int, generator: torch.Generator) -> Tensor:
    """A weight as pruned and shared as layer `index` of the published network: a matrix.

    Where it is kept, |w|^k = e - log(kept) with e drawn from an exponential distribution, as if the smallest values of
    a Weibull distribution had been cut; the smaller k is, the fewer bits the codes take.
    """
    kept = published.kept[index] / 100
    alive = torch.rand(shape, generator=generator).flatten(1) < kept
    count = int(alive.sum())
    powers = torch.empty(count).exponential_(generator=generator).numpy() - np.log(kept)
    signs = np.where(torch.rand(count, generator=generator).numpy() < 0.5, -1, 1).astype(np.float32)
    fillers = gap_counts(np.flatnonzero(alive.flatten().numpy()), published.gap_bits)[1]
    size = min(count, SAMPLE)

    def values(k: float, size: int) -> Floats:
        found: Floats = signs[:size] * powers[:size] ** np.float32(1 / k)
        return found

    low, high = HEAVY, LIGHT
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        sample = values(middle, size)
        members = np.bincount(_shared(sample, bits)[1])
        if _entropy(np.append(members, fillers * size / count)) > published.code_bits[index]:
            high = middle
        else:
            low = middle
    centroids, codes = _shared(values(low, count), bits)
    weight = torch.zeros(alive.shape)
    weight[alive] = torch.from_numpy(centroids[codes])
    return weight


def _shared(values: Floats, bits: int) -> tuple[Floats, NDArray[np.uint8]]:
    """2^bits - 1 values, since zero is one too, and the code of each number."""
    clusters = cluster(values, (1 << bits) - 1, "linear")
    return clusters.centroids.astype(np.float32), clusters.codes(values)


def _entropy(counts: NDArray[Any]) -> float:
    parts = counts[counts > 0] / counts.sum()
    return float(-(parts * np.log2(parts)).sum())


def _counted(weight: Tensor, bits: int, gap_bits: int) -> dict[str, Any]:
    """What a shared layer takes, by the paper's accounting and in our file."""
    flat = weight.flatten().numpy()
    positions = np.flatnonzero(flat)
    gaps, fillers = gap_counts(positions, gap_bits)
    members = np.unique(flat[positions], return_counts=True)[1]
    codes = huffman_bytes(np.concatenate(([fillers], members)))
    codebook = 4 << bits
    kept = len(positions)
    return {
        "weights": flat.size,
        "kept": kept,
        "fillers": fillers,
        "value_bits": bits,
        "gap_bits": gap_bits,
        "code_bits": 8 * codes / (kept + fillers),
        "position_bits": 8 * huffman_bytes(gaps) / (kept + fillers),
        "dense_bytes": 4 * flat.size,
        "shared_bytes": fixed_bytes(kept + fillers, bits, gap_bits, 1 << bits),
        "huffman_bytes": codes + huffman_bytes(gaps) + codebook,
        "file_bytes": _file_bytes(weight),
    }


def _file_bytes(weight: Tensor) -> int:
    holder = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    holder.weight = nn.Parameter(weight)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.terse"
        save(holder, path)
        (tensor,) = inspect(path).tensors
    return tensor.nbytes


def _total(rows: list[dict[str, Any]]) -> dict[str, Any]:
    summed = ("weights", "kept", "fillers", "dense_bytes", "shared_bytes", "huffman_bytes", "file_bytes")
    total: dict[str, Any] = {name: sum(row[name] for row in rows) for name in summed}
    mean = {
        name: sum(row[name] * row["kept"] for row in rows) / total["kept"] for name in ("code_bits", "position_bits")
    }
    return total | mean


ROWS = [
    Reproduction(
        "published_bits", "Deep Compression 2016, tables 4 and 5: AlexNet and VGG-16 layer by layer", run, table
    )
]
