"""The published SqueezeNet of Deep Compression in our file: bytes by what they hold and by coder, at 8 and at 6 bits.

The file of 8 bits holds the published weights to the bit. At 6 bits each layer's values are shared once more, 64 of
them, without training, and the answers to a hundred ImageNet images, one of every tenth class, are compared. Needs the
published file and the images in the folder that TERSETORCH_DATA names.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn

from tersetorch import _native
from tersetorch.bench.records import machine_facts
from tersetorch.bench.reproduce.runs import How, Reproduction
from tersetorch.methods import finalize
from tersetorch.methods.quantize import kmeans
from tersetorch.storage import inspect, load, save
from tersetorch.zoo import caffe_input, read_imagenet100, squeezenet_from_deep_compression

FILE = Path("models/squeezenet-deep-compression.net")
PUBLISHED_SIX_BITS = 470_000
# Images at a time.
BATCH = 10


def run(how: How) -> dict[str, Any]:
    """Stores, loads and asks both networks; how.quick asks them about ten images.

    Returns:
        JSON-able record: for 8 and 6 bits the file's bytes, its parts, the streams by coder, right answers and those
        that are the published network's; bytes of all codes and of all positions, were each coder the only one; what
        the encoding and decoding of the whole file took.

    Raises:
        FileNotFoundError: the published file or the images are not there.
    """
    folder = Path(os.environ.get("TERSETORCH_DATA", ""))
    if not (folder / FILE).is_file():
        raise FileNotFoundError(f"run: TERSETORCH_DATA must name a folder with {FILE}, got {str(folder)!r}; set it")
    started = time.monotonic()
    images, labels = read_imagenet100()
    if how.quick:
        images, labels = images[:BATCH], labels[:BATCH]
    model = squeezenet_from_deep_compression(folder / FILE).eval()
    answers = _answers(model, images)
    rows = [{"bits": 8, "bytes_published": (folder / FILE).stat().st_size, **_stored(model, images, labels, answers)}]
    by_coder = _by_coder(model)
    shared = finalize(kmeans(model, bits=6))
    rows.append({"bits": 6, "bytes_published": PUBLISHED_SIX_BITS, **_stored(shared, images, labels, answers)})
    return {
        "reproduction": "published_squeezenet",
        "images": len(images),
        "networks": rows,
        "by_coder": by_coder,
        "machine": machine_facts(),
        "seconds": time.monotonic() - started,
    }


def table(record: dict[str, Any]) -> Table:
    """Both files, and under them what single coders would take of the published one."""
    columns = ("SqueezeNet", "bytes published", "bytes", "codes", "positions", "codebooks and biases", "right answers")
    shown = Table(*columns, "as the published network", title=f"{record['images']} images")
    for row in record["networks"]:
        parts = row["parts"]
        coded = []
        for part in ("codes", "positions"):
            coders = ", ".join(f"{count} {coder}" for coder, count in row["coders"][part].items())
            coded.append(f"{parts[part]:,} ({coders})")
        sizes = (
            f"{row['bytes_published']:,}",
            f"{row['bytes']:,}",
            *coded,
            f"{parts['codebooks'] + parts['biases']:,}",
        )
        shown.add_row(f"{row['bits']} bits", *sizes, str(row["right"]), str(row["agree"]))
    for part in ("codes", "positions"):
        for coder, nbytes in record["by_coder"][part].items():
            cells = {"codes": "", "positions": ""} | {part: f"{nbytes:,}"}
            shown.add_row(f"8 bits, {coder} alone", "", "", *cells.values(), "", "", "")
    return shown


def _stored(model: nn.Module, images: Tensor, labels: Tensor, answers: Tensor) -> dict[str, Any]:
    """What the file of a network takes, and what the network that it holds answers."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.terse"
        started = time.perf_counter()
        save(model, path)
        saved = time.perf_counter()
        loaded = load(path)
        seconds = {"save": saved - started, "load": time.perf_counter() - saved}
        found = inspect(path)
    for (name, ours), theirs in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        if not torch.equal(ours, theirs):
            raise RuntimeError(f"run: {name} must come back as it was stored, got other values")
    coders: dict[str, Counter[str]] = {"codes": Counter(), "positions": Counter()}
    for tensor in found.tensors:
        if tensor.form == "sparse-codebook":
            coders["positions"][tensor.coders[0]] += 1
        if "codebook" in tensor.form:
            coders["codes"][tensor.coders[-1]] += 1
    given = _answers(loaded.eval(), images)
    return {
        "bytes": found.file_bytes,
        "parts": found.parts,
        "coders": coders,
        "right": int((given == labels).sum()),
        "agree": int((given == answers).sum()),
        "stored_seconds": seconds,
    }


def _by_coder(model: nn.Module) -> dict[str, dict[str, int]]:
    codes: Counter[str] = Counter()
    positions: Counter[str] = Counter()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            flat = layer.weight.detach().flatten().numpy()
            places = np.flatnonzero(flat)
            counts = np.unique(flat[places], return_counts=True)[1].astype(np.uint64)
            parts = counts / counts.sum()
            codes["entropy of each layer"] += round(float(-(counts * np.log2(parts)).sum()) / 8)
            codes["packed"] += -(-len(places) * max(1, (len(counts) - 1).bit_length()) // 8)
            codes["huffman"] += _native.huffman_size(counts)
            codes["rans"] += _native.rans_size(counts)
            positions["bitmap"] += -(-flat.size // 8)
            for coder in ("gaps", "gaps-huffman", "gaps-rans"):
                positions[coder] += min(len(_native.encode_gaps(places, coder, width)) for width in range(1, 9))
    return {"codes": dict(codes), "positions": dict(positions)}


def _answers(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(caffe_input(part)).argmax(1) for part in images.split(BATCH)])


ROWS = [
    Reproduction(
        "published_squeezenet", "Deep Compression's published SqueezeNet in our file, 8 and 6 bits", run, table
    )
]
