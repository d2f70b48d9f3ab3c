"""tersetorch compress MODEL --recipe RECIPE --data DATA -o OUTPUT."""

import json
import math
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tersetorch import storage
from tersetorch.cli.coders import CodersOption
from tersetorch.cli.data_source import DataOption, in_dtype, read_data
from tersetorch.cli.model_file import NetworkOption, read_model
from tersetorch.cli.on_ranks import on_ranks
from tersetorch.cli.output import OutputArgument, OutputOption, columns, keep_inputs, one_output
from tersetorch.methods.arguments import did_you_mean
from tersetorch.methods.distributed import failing_together
from tersetorch.recipes.compression import CompressionPlan, check_fit, plan_compression
from tersetorch.recipes.compression import compress as run_compression
from tersetorch.recipes.compression_record import CompressionRecord, record_path
from tersetorch.recipes.deep_compression import PUBLISHED, DeepCompressionRecipe
from tersetorch.recipes.run_folder import LOCK, RECORD, locked
from tersetorch.recipes.trainer import trainer
from tersetorch.storage.arguments import target_of
from tersetorch.zoo.ranks import everyone, rank

NAMES_SHOWN = 6
UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def _complete_recipe(typed: str) -> list[str]:
    return [name for name in PUBLISHED if name.startswith(typed)]


@on_ranks()
def compress(
    model: Annotated[
        Path,
        typer.Argument(
            help="A trained model: an exported program (.pt2), a .terse file, or a state dict (.pt, .safetensors)."
        ),
    ],
    recipe: Annotated[
        str, typer.Option(help=f"{', '.join(PUBLISHED)}, or a YAML file.", autocompletion=_complete_recipe)
    ],
    data: DataOption,
    output: OutputArgument = None,
    output_option: OutputOption = None,
    network: NetworkOption = "",
    budget: Annotated[
        str, typer.Option(help="Most bytes of the file, such as 30000, 500kB, 1.5MB, or 20x for a 20th of it.")
    ] = "",
    max_drop: Annotated[
        float | None,
        typer.Option(min=0, max=100, help="Most percentage points by which the error on held-out examples may rise."),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Say what would be done, and how large the file would be.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples a step.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Seed of held-out examples, of training and of calibration.")] = 0,
    coders: CodersOption = "smallest",
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Keep the state after each training here; a run that is stopped goes on from it. Without it, a folder "
            "beside OUTPUT that goes when all is done."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON instead of the table.")] = False,
) -> None:
    """Prunes a model, shares its weights and stores it: Deep Compression by a recipe, with retraining or without.

    With --budget or --max-drop the recipe gives the trainings, and the sparsities are found. A run that is stopped goes
    on where it was when the same command is given again.

    On several ranks, which share out the trainings: torchrun --nproc-per-node RANKS -m tersetorch compress ...
    """
    with failing_together(everyone()):  # before hours of training, what is wrong is said
        target = target_of("compress", one_output(output, output_option))
        keep_inputs(target, model, recipe, data, network)
        run = folder or target.with_suffix(".run")
        if folder is None and not dry_run:
            _check_own(run)
        if recipe not in PUBLISHED and not Path(recipe).is_file():
            raise typer.BadParameter(
                f"--recipe must be one of {', '.join(PUBLISHED)} or a YAML file, got {recipe}"
                f"{did_you_mean(recipe, PUBLISHED)}"
            )
        plan = DeepCompressionRecipe.named(recipe) if recipe in PUBLISHED else DeepCompressionRecipe.from_yaml(recipe)
        compressed = read_model("compress", model, network)
        limited = bool(budget) or max_drop is not None
        planned = plan_compression(compressed, plan, limited=limited)
        most = _bytes(budget, planned.dense_bytes) if budget else None
        loaded = in_dtype(read_data("compress", data, seed), compressed)
        check_fit(compressed, loaded, None if limited else plan)
    if planned.untouched and rank() == 0:
        Console(stderr=True).print(_untouched(planned), markup=False, highlight=False)
    if dry_run and rank() == 0:
        print(json.dumps(planned.to_dict(), indent=1) if as_json else _text(planned))
    if dry_run:
        return
    with Progress(console=Console(stderr=True), disable=rank() > 0) as progress:
        record = run_compression(
            compressed,
            plan,
            loaded,
            trainer(loaded, batch_size=batch_size, seed=seed, progress=progress),
            path=target,
            budget=most,
            max_drop=max_drop,
            batch_size=batch_size,
            seed=seed,
            coders=coders,
            folder=run,
            progress=progress,
        )
    if rank() > 0:
        return
    if folder is None:
        with suppress(ValueError), locked("compress", run):  # which another run keeps where one has begun since
            shutil.rmtree(run)
    inspection = storage.inspect(target)
    if as_json:
        print(json.dumps({"file": inspection.to_dict(), **record.model_dump()}, indent=1))
        return
    print(inspection.text(columns()))
    print(_summary(record, target))


def _check_own(run: Path) -> None:
    """Looks at the folder beside the output that keeps a run, and goes with all that is in it when the run is done.

    Raises:
        ValueError: there is something else of this name: a link, a file, or a folder that no run of this user made.
    """
    if run.is_symlink() or run.exists():
        ours = not run.is_symlink() and run.is_dir() and run.stat().st_uid == os.getuid()
        # A run that was stopped at once has left a lock, and perhaps a part of its record.
        begun = {LOCK, f"{RECORD}.partial"}
        if not ours or not ((run / RECORD).is_file() or all(each.name in begun for each in run.iterdir())):
            raise ValueError(
                f"compress: {run} must be free to keep the run in, got something else of this name; rename it, or name "
                "a --folder"
            )


def _bytes(text: str, dense: int) -> int:
    """A number of bytes as a person types it.

    Raises:
        typer.BadParameter: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    most = 0.0
    if found is not None and found[2] in (*UNITS, "x") and float(found[1]) > 0:
        most = dense / float(found[1]) if found[2] == "x" else float(found[1]) * UNITS[found[2]]
    if not 1 <= most < math.inf:
        raise typer.BadParameter(
            "--budget must be a number of bytes, 1 at least, with kB, MB, KiB or MiB where wanted, or such as 20x, got "
            f"{text if len(text) <= 60 else text[:60] + '...'}; give another"
        )
    return int(most)


def _summary(record: CompressionRecord, target: Path) -> str:
    before, after = record.before, record.after
    how = f"{record.how_pruned}\n" if record.how_pruned else ""
    return (
        f"error on {record.examples:,} held-out examples: {before.error_percent:.2f} % before, "
        f"{after.error_percent:.2f} % after\n{how}"
        f"{target}: {after.file_bytes:,} bytes, {before.file_bytes / after.file_bytes:.1f} times smaller than the "
        f"{before.file_bytes:,} of the same kind of file before; its story is in {record_path(target).name}, and "
        f"'tersetorch report {target} -o report.html' draws it"
    )


def _untouched(planned: CompressionPlan) -> str:
    """What a person may have meant to compress, such as an LSTM, which a recipe changes only by name."""
    left = sum(planned.untouched.values())
    share = left / max(left + sum(layer.weights for layer in planned.layers), 1)
    names = [*planned.untouched][:NAMES_SHOWN] + ["..."] * (len(planned.untouched) > NAMES_SHOWN)
    shown = ", ".join(names)
    return f"{100 * share:.2g} % of the weights stay as they are; name them in the recipe to change them: {shown}"


def _text(planned: CompressionPlan) -> str:
    table = Table(title="What would be done", title_justify="left")
    for heading in ("layer", "weights", "pruned", "bits"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for layer in planned.layers:
        pruned = "found within the limits" if layer.sparsity is None else f"{100 * layer.sparsity:.4g} %"
        table.add_row(layer.name, f"{layer.weights:,}", pruned, "" if layer.bits is None else str(layer.bits))
    console = Console(no_color=True, width=120)
    with console.capture() as captured:
        console.print(table, markup=False)
    size = "" if planned.file_bytes is None else f"about {planned.file_bytes:,} bytes, from "
    return "\n".join([captured.get().rstrip(), *planned.trainings, f"{size}{planned.dense_bytes:,} bytes before"])
