"""Deep Compression's LeNet-300-100 row on MNIST: a file 40 times smaller at no more error.

All choices were made on 5,000 held-out training images, which the seed draws; the test images are read once for each
seed, at the end, for the dense network and for the one that comes back from the file.

    TERSETORCH_DATA=... python -m tersetorch.bench.reproductions.lenet_300_100 --json record.json
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tersetorch.bench.records import machine_facts
from tersetorch.methods import finalize
from tersetorch.recipes.lenet import LeNetPlan, compress_lenet, full_plan, quick_plan, train_lenet
from tersetorch.storage import StoredTensor, inspect, load, save
from tersetorch.zoo import Dataset, error_rate
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


def run(
    seeds: Sequence[int] = (0, 1, 2), quick: bool = False, progress: Progress | None = None, workers: int = 1
) -> dict[str, Any]:
    """Trains and compresses LeNet-300-100 once for each seed.

    Args:
        seeds: each draws held-out images, weights and batches.
        quick: the demo's short plan instead of the full one.
        progress: bars are added to it; with more than one worker a single one, which counts seeds.
        workers: processes that share out the seeds; the figures do not depend on it.

    Returns:
        JSON-able record: the paper's row, the plan, a row for each seed (errors in percent on held-out and test images,
        file bytes itemised, layers), their mean and worst, machine facts and seconds.

    Raises:
        ValueError: there are no seeds, or no workers.
        FileNotFoundError: MNIST is not in the folder that TERSETORCH_DATA names.
    """
    if not seeds:
        raise ValueError("run: seeds must hold at least one seed, got none; pass for example [0, 1, 2]")
    if workers < 1:
        raise ValueError(f"run: workers must be at least 1, got {workers}; pass the processes to use")
    started = time.monotonic()
    data = load_data("mnist", seed=seeds[0])
    plan = quick_plan(data) if quick else full_plan()
    if workers == 1:
        results = [_one(load_data("mnist", seed=seed), plan, seed, progress) for seed in seeds]
    else:
        results = _shared_out(seeds, plan, workers, progress)
    errors = [(row["test"]["dense"], row["test"]["compressed"]) for row in results]
    return {
        "reproduction": "lenet_300_100",
        "paper": PAPER,
        "plan": _plan(plan),
        "seeds": results,
        "mean": {
            "error_dense": statistics.mean(dense for dense, _ in errors),
            "error_compressed": statistics.mean(compressed for _, compressed in errors),
            "bytes": statistics.mean(row["bytes"] for row in results),
            "ratio": statistics.mean(row["ratio"] for row in results),
        },
        "worst": {
            "error_dense": max(dense for dense, _ in errors),
            "error_compressed": max(compressed for _, compressed in errors),
            "error_rise": max(compressed - dense for dense, compressed in errors),
            "bytes": max(row["bytes"] for row in results),
            "ratio": min(row["ratio"] for row in results),
        },
        "machine": machine_facts() | {"threads": torch.get_num_threads()},
        "seconds": time.monotonic() - started,
    }


def table(record: dict[str, Any]) -> Table:
    """The record beside the paper's row."""
    paper, mean, worst = record["paper"], record["mean"], record["worst"]
    shown = Table("", "error dense", "error compressed", "bytes", "ratio", title="LeNet-300-100 on MNIST")
    rows = [("paper", paper["error_dense"], paper["error_compressed"], paper["bytes"], paper["ratio"])]
    rows += [
        (f"seed {row['seed']}", row["test"]["dense"], row["test"]["compressed"], row["bytes"], row["ratio"])
        for row in record["seeds"]
    ]
    rows += [
        (name, part["error_dense"], part["error_compressed"], part["bytes"], part["ratio"])
        for name, part in (("mean", mean), ("worst", worst))
    ]
    for name, dense, compressed, size, ratio in rows:
        shown.add_row(name, f"{dense:.2f} %", f"{compressed:.2f} %", f"{size:,.0f}", f"{ratio:.1f}x")
    return shown


def _shared_out(seeds: Sequence[int], plan: LeNetPlan, workers: int, progress: Progress | None) -> list[dict[str, Any]]:
    bar = progress if progress is not None else Progress(disable=True)
    job = partial(_in_worker, plan=plan, threads=torch.get_num_threads())
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(bar.track(pool.map(job, seeds), total=len(seeds), description="train and compress"))


def _in_worker(seed: int, plan: LeNetPlan, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    return _one(load_data("mnist", seed=seed), plan, seed, None)


def _one(data: Dataset, plan: LeNetPlan, seed: int, progress: Progress | None) -> dict[str, Any]:
    started = time.monotonic()
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

    return {
        "seed": seed,
        "validation": errors(data.validation_images, data.validation_labels),
        "test": errors(data.test_images, data.test_labels),
        "bytes": inspection.file_bytes,
        "bytes_dense": inspection.dense_bytes,
        "ratio": inspection.ratio,
        "file": {key: value for key, value in inspection.to_dict().items() if key != "path"},
        "layers": {name: _layer(stored[f"{name}.weight"]) for name in PAPER["layers"]},
        "seconds": time.monotonic() - started,
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the reproduction, prints its table and stores its record."""
    parser = argparse.ArgumentParser(prog="python -m tersetorch.bench.reproductions.lenet_300_100", description=__doc__)
    parser.add_argument("--json", type=Path, help="store the record here")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1, help="the figures depend on it in the last digits")
    parser.add_argument("--workers", type=int, default=1, help="processes that share out the seeds")
    parser.add_argument("--quick", action="store_true", help="the demo's short plan")
    chosen = parser.parse_args(arguments)
    before = torch.get_num_threads()
    torch.set_num_threads(chosen.threads)
    console = Console()
    try:
        with Progress(console=console) as progress:
            record = run(chosen.seeds, chosen.quick, progress, chosen.workers)
    finally:
        torch.set_num_threads(before)
    console.print(table(record))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
