"""tersetorch compress MODEL OUTPUT."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress

from tersetorch import storage, zoo
from tersetorch.cli.coders import CodersOption
from tersetorch.cli.model_file import read_model
from tersetorch.recipes.deep_compression import PUBLISHED, deep_compression
from tersetorch.recipes.trainer import trainer


def compress(
    model: Annotated[Path, typer.Argument(help="A trained model: a .terse file, or a state dict (.pt, .safetensors).")],
    output: Annotated[Path, typer.Argument(help="The .terse file to write.")],
    recipe: Annotated[str, typer.Option(help=f"{', '.join(PUBLISHED)}, or a YAML file.")],
    data: Annotated[
        Literal["mnist", "fashion-mnist", "digits"], typer.Option(help="What to retrain on, and to count errors on.")
    ],
    network: Annotated[str, typer.Option(help="The zoo's network that a state dict belongs to.")] = "",
    batch_size: Annotated[int, typer.Option(min=1, help="Images a step.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Seed of held-out images and of training.")] = 0,
    coders: CodersOption = "smallest",
    folder: Annotated[
        Path | None,
        typer.Option(help="Keep the state after each training here; a run that is stopped goes on from it."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON instead of the table.")] = False,
) -> None:
    """Prunes a model, shares its weights and stores it: Deep Compression by a recipe, with retraining."""
    if recipe not in PUBLISHED and not Path(recipe).is_file():
        raise typer.BadParameter(f"--recipe must be one of {', '.join(PUBLISHED)} or a YAML file, got {recipe}")
    compressed = read_model("compress", model, network)
    loaded = zoo.load(data, seed=seed)
    held_out = loaded.validation_images, loaded.validation_labels
    errors = {"before": 100 * zoo.error_rate(compressed, *held_out)}
    with Progress(console=Console(stderr=True)) as progress:
        deep_compression(
            compressed,
            recipe,
            trainer(loaded, batch_size=batch_size, seed=seed, progress=progress),
            steps_per_epoch=zoo.steps_per_epoch(len(loaded.train_images), batch_size),
            path=output,
            coders=coders,
            folder=folder,
            progress=progress,
        )
    errors["after"] = 100 * zoo.error_rate(compressed, *held_out)
    inspection = storage.inspect(output)
    if as_json:
        print(json.dumps({"held_out_error_percent": errors, "file": inspection.to_dict()}, indent=1))
        return
    print(inspection)
    print(
        f"error on {len(held_out[1]):,} held-out images: {errors['before']:.2f} % before, {errors['after']:.2f} % after"
    )
