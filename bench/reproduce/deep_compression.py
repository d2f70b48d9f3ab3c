"""Deep Compression's two LeNet rows on MNIST: a file 40 and 39 times smaller at no more error.

Both networks are pruned along a curve while they train, to fewer weights than the paper's, then share weights, train
the shared values, and are stored. Dynamic network surgery leaves fewer weights still (see dns), but at more error than
the paper's files have.

All choices were made on 5,000 held-out training images, which the seed draws; the test images are read once for each
seed, at the end, for the dense network and for the one that comes back from the file.

With a record to store, a run that is stopped goes on from its last finished training, to the same bits.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table
from torch import nn

from tersetorch.bench.reproduce.han import DROPOUT, TITLES, train_dense
from tersetorch.bench.reproduce.runs import How, Reproduction, over_seeds
from tersetorch.methods import finalize
from tersetorch.recipes.deep_compression import DeepCompressionRecipe, PruneStage, ShareStage, Training
from tersetorch.recipes.lenet import LeNetPlan, compress_lenet, full_plan, quick_plan, train_lenet
from tersetorch.recipes.run_folder import RunFolder
from tersetorch.storage import StoredTensor, inspect, load, save
from tersetorch.zoo import Dataset, error_rate
from tersetorch.zoo import load as load_data

# Han, Mao, Dally, Deep Compression (2016), tables 1 and 2: error in percent, file, and for each layer the percentage of
# weights kept, bits a weight before and after Huffman coding, bits a position after it, percentage of the dense size.
PAPER: dict[str, dict[str, Any]] = {
    "lenet_300_100": {
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
    },
    "lenet_5": {
        "error_dense": 0.80,
        "error_compressed": 0.74,
        "bytes_dense": 1_720_000,
        "bytes": 44_000,
        "ratio": 39,
        "layers": {
            "conv1": {"kept": 66, "bits": 8, "huffman_bits": 7.2, "position_huffman_bits": 1.5, "file_percent": 67.45},
            "conv2": {"kept": 12, "bits": 8, "huffman_bits": 7.2, "position_huffman_bits": 3.9, "file_percent": 5.28},
            "fc1": {"kept": 8, "bits": 5, "huffman_bits": 4.5, "position_huffman_bits": 4.5, "file_percent": 2.45},
            "fc2": {"kept": 19, "bits": 5, "huffman_bits": 5.2, "position_huffman_bits": 3.7, "file_percent": 6.13},
        },
    },
}
FIGURES = {
    "error_dense": "least",
    "error_compressed": "least",
    "error_rise": "least",
    "bytes": "least",
    "ratio": "most",
}


def lenet_5_plan() -> LeNetPlan:
    """The plan behind LeNet-5's row; LeNet-300-100's is recipes.lenet.full_plan."""
    kept = {"conv1": 0.6, "conv2": 0.12, "fc1": 0.05, "fc2": 0.19}
    retrain = Training(epochs=22, lr=0.05, weight_decay=3e-4)
    return LeNetPlan(
        batch_size=128,
        dropout=DROPOUT["lenet_5"],
        dense=Training(epochs=12, lr=0.05, weight_decay=5e-4),
        recipe=DeepCompressionRecipe(
            prune=PruneStage(
                sparsity={name: round(1 - part, 4) for name, part in kept.items()}, ramp_epochs=9, train=retrain
            ),
            share=ShareStage(bits={"conv*": 5, "fc*": 4}, train=Training(epochs=2, lr=3e-4, optimizer="adam")),
        ),
    )


def quick_lenet_5_plan() -> LeNetPlan:
    """The same with one epoch where it has more."""
    plan = lenet_5_plan()
    prune, share = plan.recipe.prune, plan.recipe.share
    assert prune is not None and prune.train is not None and share is not None and share.train is not None
    dense, pruned, shared = (each.model_copy(update={"epochs": 1}) for each in (plan.dense, prune.train, share.train))
    short = DeepCompressionRecipe(
        prune=prune.model_copy(update={"ramp_epochs": 1, "train": pruned}),
        share=share.model_copy(update={"train": shared}),
    )
    return replace(plan, dense=dense, recipe=short)


def run(network: str, how: How) -> dict[str, Any]:
    """Trains and compresses a network once for each seed.

    Args:
        network: "lenet_300_100" or "lenet_5".
        how: seeds, workers and the like; quick has short trainings.

    Returns:
        JSON-able record, see over_seeds. A row holds errors in percent on held-out and test images, file bytes
        itemised, and the paper's columns for each layer.

    Raises:
        ValueError: there are no seeds, or no workers.
        FileNotFoundError: MNIST is not in the folder that TERSETORCH_DATA names.
    """
    if network == "lenet_5":
        plan = quick_lenet_5_plan() if how.quick else lenet_5_plan()
    else:
        plan = quick_plan(load_data("mnist", seed=0)) if how.quick else full_plan()
    described = {
        "batch_size": plan.batch_size,
        "dropout": plan.dropout,
        "dense": plan.dense.model_dump(),
        "recipe": plan.recipe.model_dump(exclude_none=True),
    }
    one = partial(_one, network, plan, how.folder(described))
    record: dict[str, Any] = over_seeds(network, one, how, described, PAPER[network], FIGURES)
    return record


def table(record: dict[str, Any]) -> Table:
    """The record beside the paper's row."""
    paper, mean, worst = record["paper"], record["mean"], record["worst"]
    shown = Table(
        "", "error dense", "error compressed", "bytes", "ratio", title=f"{TITLES[record['reproduction']]} on MNIST"
    )
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


def _one(network: str, plan: LeNetPlan, folder: Path | None, seed: int, *, progress: Progress | None) -> dict[str, Any]:
    data = load_data("mnist", seed=seed)
    own = None if folder is None else folder / f"seed_{seed}"
    with RunFolder("run", own, {}) as run:
        state = run.kept("dense")
        training = plan.dense if state is None else plan.dense.model_copy(update={"epochs": 0})
        dense: nn.Module
        if network == "lenet_5":
            dense = train_dense(network, training, plan.batch_size, data, seed, progress)
        else:
            dense = train_lenet(data, replace(plan, dense=training), seed=seed, progress=progress)
        if state is None:
            run.keep(dense, "dense")
            run.store()
        else:
            dense.load_state_dict(state)
    kept = None if own is None else own / "recipe"
    compressed = compress_lenet(copy.deepcopy(dense), data, plan, seed=seed, progress=progress, folder=kept)
    return _measured(dense, compressed, data, PAPER[network]["layers"])


def _measured(dense: nn.Module, compressed: nn.Module, data: Dataset, layers: Iterable[str]) -> dict[str, Any]:
    """What a seed's row says of a dense network and of the compressed one as it comes back from its file."""
    # As the file has it, not in the order that training is fastest in.
    finalize(compressed).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lenet.terse"
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
        "layers": {name: _layer(stored[f"{name}.weight"], _kept(again, name)) for name in layers},
    }


def _kept(model: nn.Module, name: str) -> int:
    return int(model.get_parameter(f"{name}.weight").count_nonzero())


def _layer(stored: StoredTensor, kept: int) -> dict[str, Any]:
    """The paper's columns: percentage kept, bits of a kept weight's code and position in the file, file percentage.

    Where codes are stored for pruned weights too, without positions, those take no bits and the codes take more.
    """
    weights = math.prod(stored.shape)
    return {
        "weights": weights,
        "kept": 100 * kept / weights,
        "bits": math.ceil(math.log2(stored.entries)),
        "huffman_bits": 8 * (stored.parts["codes"] + stored.parts.get("code tables", 0)) / kept,
        "position_huffman_bits": 8 * stored.parts.get("positions", 0) / kept,
        "file_percent": 100 * stored.nbytes / stored.dense_bytes,
    }


ROWS = [
    Reproduction(
        network,
        f"Deep Compression: {TITLES[network]} in a file {PAPER[network]['ratio']} times smaller",
        partial(run, network),
        table,
    )
    for network in PAPER
]
