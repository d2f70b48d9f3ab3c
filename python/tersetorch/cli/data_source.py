"""The examples that a verb trains on and counts errors on."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, get_args

import typer
from torch import nn

from tersetorch import zoo
from tersetorch.cli.importable import call_importable, is_importable
from tersetorch.zoo.data import Name
from tersetorch.zoo.own_data import SUFFIXES

NAMES = [name for name in get_args(Name) if name != "auto"]


def _complete_data(typed: str) -> list[str]:
    return [name for name in NAMES if name.startswith(typed)]


DataOption = Annotated[
    str,
    typer.Option(
        help=f"What to retrain on, and to count errors on: {', '.join(NAMES)}, a .npz or .safetensors file with images "
        "and labels, or a function of yours that gives a tersetorch.zoo.Dataset, as package.module:function.",
        autocompletion=_complete_data,
    ),
]


def in_dtype(data: zoo.Dataset, model: nn.Module) -> zoo.Dataset:
    """The same examples in model's floating-point type, such as bfloat16; whole numbers stay."""
    dtype = next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), None)
    parts = {name: getattr(data, name) for name in ("train_images", "validation_images", "test_images")}
    return replace(data, **{name: part.to(dtype) for name, part in parts.items() if part.is_floating_point()})


def read_data(verb: str, name: str, seed: int) -> zoo.Dataset:
    """The data set.

    Raises:
        typer.BadParameter: name is none of these.
        ValueError, FileNotFoundError: it cannot be read.
    """
    if name in NAMES:
        return zoo.load(name, seed=seed)  # type: ignore[arg-type]  # one of Name's
    if Path(name).suffix in SUFFIXES:
        return zoo.read_dataset(name, seed=seed)
    if not is_importable(name):
        raise typer.BadParameter(
            f"--data must be one of {', '.join(NAMES)}, a {' or '.join(SUFFIXES)} file, or package.module:function, "
            f"got {name}"
        )
    data = call_importable(verb, "--data", name)
    if not isinstance(data, zoo.Dataset):
        raise ValueError(f"{verb}: --data must give a tersetorch.zoo.Dataset, got {type(data).__name__}; return one")
    return data
