"""tersetorch reproduce [ROW]."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tersetorch.bench.reproduce import ROWS, runs
from tersetorch.cli.on_ranks import on_ranks
from tersetorch.methods.arguments import did_you_mean


@on_ranks()
def reproduce(
    row: Annotated[str, typer.Argument(help="The row to reproduce; a list of them when left out.")] = "",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Store the record here; a run that is stopped goes on from its seeds.")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="A seed; again for more. Default: 0, 1 and 2.")] = None,
    workers: Annotated[int, typer.Option(min=1, max=256, help="Processes that share out the seeds.")] = 1,
    threads: Annotated[int, typer.Option(min=1, max=256, help="Of each; they decide the last digits.")] = 1,
    quick: Annotated[bool, typer.Option(help="A shorter plan, to see that it runs.")] = False,
    names: Annotated[bool, typer.Option(help="Print the names of the rows alone.")] = False,
) -> None:
    """Repeats a row of the papers' tables: trains, compresses and measures, beside the published figures."""
    if names:
        print("\n".join(ROWS))
        return
    if not row:
        shown = Table("row", "what")
        for each in ROWS.values():
            shown.add_row(each.name, each.words)
        Console().print(shown)
        return
    if row not in ROWS:
        raise typer.BadParameter(f"ROW must be one of {', '.join(ROWS)}, got {row}{did_you_mean(row, ROWS)}")
    if json_file is not None and not json_file.parent.is_dir():
        raise typer.BadParameter(f"--json must name a file in a folder that exists, got {json_file}")
    if json_file is not None and json_file.exists() and not json_file.is_file():
        raise typer.BadParameter(f"--json must name a regular file, got {json_file}")
    if quick and json_file is not None and json_file.exists():
        raise typer.BadParameter(f"--json must name a new file with --quick, got {json_file}, which is there")
    runs.reproduce(ROWS[row], tuple(seed or runs.SEEDS), quick, workers, threads, json_file)
