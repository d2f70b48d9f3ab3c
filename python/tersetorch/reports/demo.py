"""The demo as a person sees it: progress bars, one table, one picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tersetorch.recipes.demo import compute_demo
from tersetorch.reports.figure import figure_class
from tersetorch.zoo.data import Name

PICTURE_NAME = "demo.png"
BEFORE, AFTER = "#b0b7c3", "#1f6f8b"


def run_demo(
    seed: int, output: str | os.PathLike[str], console: Console, data: Name = "auto", threads: int | None = None
) -> dict[str, Any]:
    """Runs the demo, prints its table on console, draws its picture in the folder output and returns its figures.

    Args:
        seed: of everything drawn.
        output: folder for lenet300100.terse and demo.png, made where it is missing.
        console: where bars and table go.
        data: the data set, as in tersetorch.zoo.load.
        threads: of torch while the demo runs; as they are when it is None.

    Returns:
        What tersetorch.recipes.demo.compute_demo returns, and "picture", the path of the picture.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; nothing has been trained then.
        ValueError, TypeError, FileNotFoundError: an argument is outside its range, or the data set is not there.
    """
    if threads is not None and (not isinstance(threads, int) or isinstance(threads, bool) or threads < 1):
        raise ValueError(f"run_demo: threads must be an int of at least 1, or None, got {threads!r}; pass 1 or more")
    figure_class("demo")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console) as progress:
            figures = compute_demo(seed, output, data=data, progress=progress)
    finally:
        torch.set_num_threads(before)
    picture = Path(output) / PICTURE_NAME
    draw(figures, picture)
    figures["picture"] = str(picture)
    console.print(table(figures))
    console.print(
        f"{figures['path']}: every byte of it is itemised by 'tersetorch inspect'", markup=False, highlight=False
    )
    console.print(f"{picture}: the same as a picture", markup=False, highlight=False)
    return figures


def table(figures: dict[str, Any]) -> Table:
    """Before and after side by side: error, parameters, bytes, and the time of every layer."""
    source, machine = figures["data"], figures["machine"]
    shown = Table(
        title=f"LeNet-300-100 on {source['name']} ({escape(source['source'])}), seed {figures['seed']}",
        title_justify="left",
    )
    shown.add_column("")
    for heading in ("dense", "compressed", "dense / compressed"):
        shown.add_column(heading, justify="right")
    shown.add_column("runs as")
    error, parameters, size = figures["error"], figures["parameters"], figures["bytes"]
    shown.add_row(
        f"error on {source['test_images']:,} test images",
        f"{100 * error['dense']:.2f} %",
        f"{100 * error['compressed']:.2f} %",
    )
    shown.add_row("parameters that are not zero", *_counts(parameters["dense"], parameters["compressed"]))
    shown.add_row("bytes on disk", *_counts(size["dense"], size["terse"]))
    shown.add_row("bytes on disk, dense gzipped", *_counts(size["gzip"], size["terse"]))
    group = None
    for row in figures["latency"]:
        if group != (row["network"], row["batch"]):
            group = (row["network"], row["batch"])
            shown.add_section()
        kept = "" if row["density"] is None else f" ({100 * row['density']:.3g} % kept)"
        shown.add_row(
            f"{row['network']} {row['layer']}, batch {row['batch']}{kept}",
            _time(row["dense_ms"]),
            _time(row["ours_ms"]),
            _ratio(row["dense_ms"], row["ours_ms"]),
            row["runs_as"],
        )
    shown.caption = (
        f"{machine['cpu']}, {machine['isa']}, {machine['threads']} threads, torch {machine['torch']}. "
        "AlexNet's layers hold random weights; a layer runs dense where that is faster."
    )
    return shown


def draw(figures: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draws sizes, weights before and after, and times side by side, as a PNG file.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = figure_class("demo")(figsize=(15, 4.6), layout="constrained")
    sizes, weights, times = figure.subplots(1, 3, width_ratios=(1, 1.4, 1.8))
    figure.suptitle(f"LeNet-300-100 on {figures['data']['name']}, and the same kernels on AlexNet's layers")

    size = figures["bytes"]
    bars = sizes.bar(
        ("dense", "dense\ngzipped", "tersetorch"),
        [size[name] / 1000 for name in ("dense", "gzip", "terse")],
        color=(BEFORE, BEFORE, AFTER),
    )
    sizes.bar_label(bars, fmt="%.0f")
    sizes.set(title=f"File: {size['dense'] / size['terse']:.0f} times smaller", ylabel="kB on disk")

    seen = figures["weights"]
    count = len(seen["dense_counts"])
    step = 2 * seen["limit"] / count
    centres = [-seen["limit"] + step * (index + 0.5) for index in range(count)]
    weights.bar(centres, seen["dense_counts"], width=step, color=BEFORE, label="dense")
    weights.vlines(
        seen["shared_values"], 0.5, seen["shared_counts"], color=AFTER, linewidth=2, label="pruned and shared"
    )
    weights.set(
        title=f"Weights of {seen['layer']}: {seen['pruned']:,} are zero,\n"
        f"the others share {len(seen['shared_values'])} values",
        yscale="log",
        ylim=(0.5, None),
        xlabel="weight",
        ylabel="how many",
    )
    weights.legend(loc="upper left", fontsize="small")

    rows = [row for row in figures["latency"] if row["dense_ms"] and row["ours_ms"]]
    places = range(len(rows))
    labels = [f"{row['network'].split('-')[0].split()[0]} {row['layer']}, batch {row['batch']}" for row in rows]
    times.barh([place - 0.2 for place in places], [row["dense_ms"] for row in rows], 0.4, color=BEFORE, label="dense")
    times.barh(
        [place + 0.2 for place in places], [row["ours_ms"] for row in rows], 0.4, color=AFTER, label="tersetorch"
    )
    times.set(title="Time of one call", xscale="log", xlabel="ms (log scale)", yticks=list(places), yticklabels=labels)
    times.invert_yaxis()
    times.legend()
    for axes in (sizes, weights, times):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _counts(before: int, after: int) -> tuple[str, str, str]:
    return f"{before:,}", f"{after:,}", _ratio(before, after)


def _ratio(before: float | None, after: float | None) -> str:
    return f"{before / after:.3g}x" if before and after else "-"


def _time(milliseconds: float | None) -> str:
    if milliseconds is None:
        return "-"
    return f"{milliseconds:.3g} ms" if milliseconds >= 1 else f"{1000 * milliseconds:.3g} us"
