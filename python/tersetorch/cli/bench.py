"""tersetorch bench [SUITE...]."""

import errno
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tersetorch.bench import rates
from tersetorch.bench.cuda import rates as cuda_rates
from tersetorch.bench.options import Options
from tersetorch.bench.records import CUDA_SUITES, SUITES, Run, missing, table
from tersetorch.methods.arguments import did_you_mean

SUITES_OF = {"cpu": SUITES, "cuda": CUDA_SUITES}
NAMES = {device: (*suites, "rates") for device, suites in SUITES_OF.items()}


def bench(
    suite: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"Some of {', '.join(NAMES['cpu'])} (the machine's limits alone), with --device cuda of "
            f"{', '.join(NAMES['cuda'])}; all when left out."
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Store machine facts and records here, after every group.")
    ] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to measure; cuda needs a GPU.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, max=256, help="Threads of ours and of every peer.")] = 1,
    quick: Annotated[bool, typer.Option(help="Few cases and samples, in a minute.")] = False,
    full: Annotated[bool, typer.Option(help="Every case with every density and batch, in hours.")] = False,
    case: Annotated[
        list[str] | None, typer.Option(help="Cases whose name holds this (globs too); again for more.")
    ] = None,
    density: Annotated[list[float] | None, typer.Option(min=0, max=1, help="A density; again for more.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="A number of samples; again for more.")] = None,
    implementation: Annotated[
        list[str] | None, typer.Option(help="Implementations, ours and peers, by name or glob; again for more.")
    ] = None,
    peers: Annotated[
        str, typer.Option(help="Peers by name or glob, joined by commas, or none; all when left out.")
    ] = "",
) -> None:
    """Times our kernels beside their peers in one process and shows every row, also where we lose."""
    for name in suite or ():
        if name not in NAMES[device]:
            meant = did_you_mean(name, NAMES[device])
            raise typer.BadParameter(f"SUITE must be one of {', '.join(NAMES[device])}, got {name}{meant}")
    if json_file:  # before anything is measured
        try:
            if json_file.exists() and not json_file.is_file():  # opening a pipe would wait for its reader
                raise OSError(errno.EINVAL, "no regular file")
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.open("a").close()
        except OSError as error:
            raise typer.BadParameter(
                f"--json must name a file that can be written, got {json_file} ({error.strerror})"
            ) from None
    options = Options(
        threads=threads,
        quick=quick,
        full=full,
        cases=tuple(case or ()),
        densities=tuple(density or ()),
        batches=tuple(batch or ()),
        implementations=tuple(implementation or ()),
        peers=tuple(name.strip() for name in peers.split(",") if name.strip()),
    )
    notes = Console(stderr=True)
    with notes.status("measuring the machine"):
        measured = cuda_rates.measure(quick) if device == "cuda" else rates.measure(threads, quick)
    names = [name for name in suite or SUITES_OF[device] if name != "rates"]
    run = Run(names, options, measured, json_file, SUITES_OF[device])
    if not names:
        table_of = cuda_rates.table if isinstance(measured, cuda_rates.Rates) else rates.table
        Console().print(table_of(measured))
        return
    if not run.groups:
        raise typer.BadParameter("--case, --density and --batch must leave something to measure, got no case that fits")
    for name, reason in (missing(threads) if device == "cpu" else {}).items():
        notes.print(f"{name} is left out: {reason}", highlight=False, markup=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=notes) as progress:
        task = progress.add_task("", total=len(run.groups))
        try:
            steps = run.steps()
            for _, group in run.groups:
                progress.update(task, description=group.label)
                next(steps)
                progress.advance(task)
            next(steps, None)
        except KeyboardInterrupt:
            notes.print("interrupted; what was measured so far follows")
    shown = Console()
    Console(width=max(160, shown.width)).print(table(run.records))
    for left_out in run.left_out:
        notes.print(str(left_out), highlight=False, markup=False)
    wrong = [str(left_out) for left_out in run.left_out if left_out.wrong]
    if wrong:
        raise RuntimeError(f"bench: wrong results: {'; '.join(wrong)}")
