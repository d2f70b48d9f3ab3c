"""tersetorch bench [SUITE]."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tersetorch.bench.records import SUITES, machine_facts, run_suite, table


def bench(
    suite: Annotated[str, typer.Argument(help=f"One of {', '.join(SUITES)}; all when left out.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Store machine facts and records here.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of ours and of every peer.")] = 1,
    quick: Annotated[bool, typer.Option(help="Fewer shapes and rounds.")] = False,
) -> None:
    """Times our kernels beside their peers in one process and shows every row, also where we lose."""
    if suite and suite not in SUITES:
        raise typer.BadParameter(f"SUITE must be one of {', '.join(SUITES)}, got {suite}")
    if json_file:  # before anything is measured
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.touch()
    records = []
    for name in [suite] if suite else SUITES:
        records += run_suite(name, threads=threads, quick=quick)
    Console().print(table(records))
    if json_file:
        json_file.write_text(json.dumps({"machine": machine_facts(), "records": records}, indent=1) + "\n")
