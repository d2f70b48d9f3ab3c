"""tersetorch demo."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from tersetorch.reports.demo import run_demo

Data = Literal["auto", "mnist", "fashion-mnist", "digits"]


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the .terse file and the picture.")] = Path("demo"),
    data: Annotated[Data, typer.Option(help="Data set; auto takes the best one that is on this machine.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of training, pruning and sharing.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON instead of the table.")] = False,
) -> None:
    """Trains, prunes, shares, stores, reloads and runs a network, and shows before and after side by side."""
    if output.exists() and not output.is_dir():
        raise typer.BadParameter(f"--output must name a folder, got the file {output}")
    figures = run_demo(seed=seed, output=output, data=data, console=Console(stderr=as_json))
    if as_json:
        print(json.dumps(figures, indent=1))
