"""Does truncation regularise? Test error against rank of an over-parametrised network that learnt its images by heart.

784-512-512-10 on 5,000 images of MNIST, 130 weights for each, trained without weight decay until it errs on next to
none of them; some of their labels are wrong, drawn from the other nine digits. Both hidden layers are then cut to one
rank by SVD, without training on. The rank is chosen by the error on 5,000 held-out training images of right labels,
which the seed draws with the rest; the test images are read for the dense network, for what was chosen, and for the
same network trained with weight decay, which is the usual way to the same end.
"""

from __future__ import annotations

import copy
import statistics
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from tersetorch.bench.reproduce.runs import How, Reproduction, over_seeds
from tersetorch.methods import factorize
from tersetorch.reports.figure import figure_class
from tersetorch.zoo import error_rate, fit
from tersetorch.zoo import load as load_data

# Denton et al. (2014) name it among the side benefits; their figures for it were not at hand.
PAPER = {"claim": "low rank acts as a regulariser"}
WIDTH = 512
RANKS = (8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256)
WRONG = (0.0, 0.2, 0.4)
# Of 1e-4, 1e-3, 3e-3 and 1e-2 the one of the least held-out error with 40 % wrong labels, on one seed.
DECAY = 1e-2
NETWORKS = ("dense", "truncated", "decayed")


class Plan(NamedTuple):
    """What is trained and cut.

    Attributes:
        images: how many.
        epochs: passes over them.
        wrong: shares of wrong labels; each is a network of its own.
        ranks: from the lowest.
    """

    images: int
    epochs: int
    wrong: tuple[float, ...]
    ranks: tuple[int, ...]


def run(how: How) -> dict[str, Any]:
    """Trains, cuts and measures, once for each seed.

    Returns:
        JSON-able record, see over_seeds. A row holds, for each share of wrong labels, "errors": [rank, of the images
        learnt from, of those held out] for each rank, the dense network last, errors in percent; "rank", the chosen
        one; and "ratio", dense over truncated weights. The test errors are figures of their own, see figure.

    Raises:
        ValueError: there are no seeds, or no workers.
        FileNotFoundError: MNIST is not in the folder that TERSETORCH_DATA names.
    """
    plan = Plan(500, 3, WRONG[::2], RANKS[3::5]) if how.quick else Plan(5000, 30, WRONG, RANKS)
    figures = {figure(name, share): "least" for share in plan.wrong for name in NETWORKS}
    described = plan._asdict() | {"width": WIDTH, "weight_decay": DECAY}
    one = partial(_one, plan)
    record: dict[str, Any] = over_seeds("low_rank_regularisation", one, how, described, PAPER, figures)
    return record


def figure(network: str, share: float) -> str:
    """The name of a network's test error under a share of wrong labels."""
    return f"{network}, {share:.0%} wrong"


def table(record: dict[str, Any]) -> Table:
    """Mean errors; a row for each share of wrong labels."""
    plan = record["plan"]
    shown = Table(
        "wrong labels",
        "of its own images, %",
        "dense, test, %",
        "ranks chosen",
        "weights, times fewer",
        "truncated, test, %",
        "best seed and worst, points",
        "dense with weight decay, test, %",
        caption=(
            f"{plan['images']:,} images, {plan['epochs']} epochs, means of {len(record['seeds'])} seeds. Truncated: "
            "the rank of the least held-out error, the dense network's not among them; points are over the same seed's "
            f"dense network. Weight decay of {plan['weight_decay']:g}, all else the same, from the start."
        ),
    )
    for share in plan["wrong"]:
        rows = [row["networks"][str(share)] for row in record["seeds"]]
        dense, truncated, decayed = (record["mean"][figure(name, share)] for name in NETWORKS)
        changes = [row[figure("truncated", share)] - row[figure("dense", share)] for row in record["seeds"]]
        shown.add_row(
            f"{share:.0%}",
            f"{statistics.mean(row['errors'][-1][1] for row in rows):.2f}",
            f"{dense:.2f}",
            ", ".join(str(row["rank"]) for row in rows),
            f"{statistics.mean(row['ratio'] for row in rows):.1f}x",
            f"{truncated:.2f}",
            f"{min(changes):+.2f}, {max(changes):+.2f}",
            f"{decayed:.2f}",
        )
    return shown


def draw(record: dict[str, Any], path: Path) -> None:
    """Draws the mean errors over the rank as an SVG or PNG file, a picture for each share of wrong labels.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    shares, ranks = record["plan"]["wrong"], record["plan"]["ranks"]
    sheet = figure_class("low_rank_regularisation")(figsize=(3.4 * len(shares), 3.4), layout="constrained")
    for axes, share in zip(sheet.subplots(1, len(shares), squeeze=False)[0], shares, strict=True):
        networks = [row["networks"][str(share)]["errors"] for row in record["seeds"]]
        for column, words, colour in ((2, "held-out images", "C0"), (1, "its own images", "C1")):
            for errors in networks:
                axes.plot(ranks, [error[column] for error in errors[:-1]], color=colour, linewidth=0.6, alpha=0.5)
            means = [statistics.mean(error[column] for error in each) for each in zip(*networks, strict=True)]
            axes.plot(ranks, means[:-1], color=colour, marker="o", markersize=3, label=words)
            axes.axhline(means[-1], color=colour, linewidth=1, linestyle="--")
        axes.set(
            title=f"{share:.0%} of the labels wrong", xlabel="rank of both layers", ylabel="error, %", xscale="log"
        )
        axes.xaxis.set_ticks([rank for rank in (8, 16, 32, 64, 128, 256) if ranks[0] <= rank <= ranks[-1]])
        axes.xaxis.set_ticks([], minor=True)
        axes.xaxis.set_major_formatter("{x:g}")
    axes.plot([], [], color="0.4", linewidth=1, linestyle="--", label="the dense network")
    axes.legend(fontsize="small")
    sheet.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _one(plan: Plan, seed: int, *, progress: Progress | None) -> dict[str, Any]:
    data = load_data("mnist", seed=seed)
    images = data.train_images[: plan.images]
    held_out, test = (data.validation_images, data.validation_labels), (data.test_images, data.test_labels)
    row: dict[str, Any] = {"networks": {}}
    for share in plan.wrong:
        labels = _labels(data.train_labels[: plan.images], share, seed)

        def train(weight_decay: float, labels: Tensor = labels) -> nn.Module:
            model = _network(images[0].numel(), seed)
            return fit(
                model,
                images,
                labels,
                epochs=plan.epochs,
                weight_decay=weight_decay,
                seed=seed,
                progress=progress,
                description="train",
            ).eval()

        dense = train(0.0)
        errors: list[tuple[int | None, float, float]] = []
        best, least = dense, float("inf")
        for rank in plan.ranks:
            model = copy.deepcopy(dense)
            factorize.svd(model, rank, targets=["1", "3"])
            errors.append((rank, _error(model, images, labels), _error(model, *held_out)))
            if errors[-1][2] < least:
                best, least = model, errors[-1][2]
        errors.append((None, _error(dense, images, labels), _error(dense, *held_out)))
        row["networks"][str(share)] = {
            "errors": errors,
            "rank": next(rank for rank, _, error in errors if error == least),
            "ratio": _weights(dense) / _weights(best),
        }
        for name, model in zip(NETWORKS, (dense, best, train(DECAY)), strict=True):
            row[figure(name, share)] = _error(model, *test)
    return row


def _labels(labels: Tensor, share: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(len(labels), generator=generator) < share
    drawn = (labels + torch.randint(1, 10, labels.shape, generator=generator)) % 10
    return torch.where(wrong, drawn, labels)


def _network(inputs: int, seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(inputs, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, 10),
        )


def _weights(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _error(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    error: float = error_rate(model, images, labels)
    return 100 * error


ROWS = [
    Reproduction(
        "low_rank_regularisation",
        "Denton et al. 2014, a side benefit: what truncation does to a network that learnt too few images by heart",
        run,
        table,
        draw,
    )
]
