"""Deep Compression's LeNet-300-100 row on MNIST: a file 40 times smaller at no more error.

All choices were made on 5,000 held-out training images, which the seed draws; the test images are read once for each
seed, at the end, for the dense network and for the one that comes back from the file.
"""

from __future__ import annotations

import copy
import math
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table

from tersetorch.bench.reproduce.runs import How, Reproduction, over_seeds
from tersetorch.methods import finalize
from tersetorch.recipes.lenet import LeNetPlan, compress_lenet, full_plan, quick_plan, train_lenet
from tersetorch.storage import StoredTensor, inspect, load, save
from tersetorch.zoo import error_rate
from tersetorch.zoo import load as load_data

# Han, Mao, Dally, Deep Compression (2016), tables 1 and 2: error in percent, file, and for each layer the percentage of
# weights kept, bits a weight before and after Huffman coding, bits a position after it, percentage of the dense size.
PAPER: dict[str, Any] = {
    "error_dense": 1.64,
    "error_compressed": 1.58,
    "bytes_dense": 1_070_000,
    "bytes": 27_000,
    "ratio": 40,
    "layers": {
        "fc1": {"kept": 8, "bits": 6, "huffman_bits": 4.4, "position_huffman_bits": 3.7, "file_percent": 2.32},
        "fc2": {"kept": 9, "bits": 6, "huffman_bits": 4.4, "position_huffman_bits": 4.3, "file_percent": 3.04},
        "fc3": {"kept": 26, "bits": 6, "huffman_bits": 4.3, "position_huffman_bits": 3.2, "file_percent": 12.70},
    },
}


def run(how: How) -> dict[str, Any]:
    """Trains and compresses LeNet-300-100 once for each seed.

    Args:
        how: seeds, workers and the like; quick is the demo's short plan.

    Returns:
        JSON-able record, see over_seeds. A row holds errors in percent on held-out and test images, file bytes
        itemised, and the paper's columns for each layer.

    Raises:
        ValueError: there are no seeds, or no workers.
        FileNotFoundError: MNIST is not in the folder that TERSETORCH_DATA names.
    """
    plan = quick_plan(load_data("mnist", seed=0)) if how.quick else full_plan()
    figures = {
        "error_dense": "least",
        "error_compressed": "least",
        "error_rise": "least",
        "bytes": "least",
        "ratio": "most",
    }
    record: dict[str, Any] = over_seeds("lenet_300_100", partial(_one, plan), how, _plan(plan), PAPER, figures)
    return record


def table(record: dict[str, Any]) -> Table:
    """The record beside the paper's row."""
    paper, mean, worst = record["paper"], record["mean"], record["worst"]
    shown = Table("", "error dense", "error compressed", "bytes", "ratio", title="LeNet-300-100 on MNIST")
    rows = [("paper", paper["error_dense"], paper["error_compressed"], paper["bytes"], paper["ratio"])]
    rows += [
        (f"seed {row['seed']}", row["error_dense"], row["error_compressed"], row["bytes"], row["ratio"])
        for row in record["seeds"]
    ]
    rows += [
        (name, part["error_dense"], part["error_compressed"], part["bytes"], part["ratio"])
        for name, part in (("mean", mean), ("worst", worst))
    ]
    for name, dense, compressed, size, ratio in rows:
        shown.add_row(name, f"{dense:.2f} %", f"{compressed:.2f} %", f"{size:,.0f}", f"{ratio:.1f}x")
    return shown


def _one(plan: LeNetPlan, seed: int, *, progress: Progress | None) -> dict[str, Any]:
    data = load_data("mnist", seed=seed)
    dense = train_lenet(data, plan, seed=seed, progress=progress)
    compressed = finalize(compress_lenet(copy.deepcopy(dense), data, plan, seed=seed, progress=progress))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lenet300100.terse"
        save(compressed, path)
        inspection, again = inspect(path), load(path)
    stored = {tensor.name: tensor for tensor in inspection.tensors}

    def errors(images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        models = {"dense": dense, "compressed": again}
        return {name: 100 * error_rate(model, images, labels) for name, model in models.items()}

    validation = errors(data.validation_images, data.validation_labels)
    test = errors(data.test_images, data.test_labels)
    return {
        "validation": validation,
        "test": test,
        "error_dense": test["dense"],
        "error_compressed": test["compressed"],
        "error_rise": test["compressed"] - test["dense"],
        "bytes": inspection.file_bytes,
        "bytes_dense": inspection.dense_bytes,
        "ratio": inspection.ratio,
        "file": {key: value for key, value in inspection.to_dict().items() if key != "path"},
        "layers": {name: _layer(stored[f"{name}.weight"]) for name in PAPER["layers"]},
    }


def _layer(stored: StoredTensor) -> dict[str, Any]:
    """The paper's columns: percentage kept, bits a weight and a position after Huffman coding, file percentage."""
    weights = math.prod(stored.shape)
    return {
        "weights": weights,
        "kept": 100 * stored.stored / weights,
        "bits": math.ceil(math.log2(stored.entries)),
        "huffman_bits": 8 * (stored.parts["codes"] + stored.parts.get("code tables", 0)) / stored.stored,
        "position_huffman_bits": 8 * stored.parts["positions"] / stored.stored,
        "file_percent": 100 * stored.nbytes / stored.dense_bytes,
    }


def _plan(plan: LeNetPlan) -> dict[str, Any]:
    return {
        "batch_size": plan.batch_size,
        "dropout": plan.dropout,
        "dense": plan.dense.model_dump(),
        "recipe": plan.recipe.model_dump(exclude_none=True),
    }


ROWS = [Reproduction("lenet_300_100", "Deep Compression: LeNet-300-100 in a file 40 times smaller", run, table)]
