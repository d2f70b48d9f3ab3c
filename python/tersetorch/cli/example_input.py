"""What a verb calls the model with to measure it."""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from safetensors.torch import load_file
from torch import Tensor, nn

from tersetorch.cli.shape import parse_shape
from tersetorch.storage.archives import check_npz
from tersetorch.storage.arguments import check_regular

Example = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
SUFFIXES = (".npz", ".safetensors")
POSITIONAL = "arr_"  # as numpy.savez names arrays that were given none

InputShapeOption = Annotated[
    str, typer.Option(help="Shape of one input of random numbers, such as 1x784, to measure on.", metavar="NxM...")
]
InputOption = Annotated[
    Path | None,
    typer.Option(
        "--input",
        help="Or the inputs themselves, of any number and type: a .npz or .safetensors file with an array for each "
        "argument of the model, by its name; arrays that numpy.savez named arr_0, arr_1, ... are given in order.",
    ),
]


def read_example(verb: str, shape: str, file: Path | None, model: nn.Module) -> Example | None:
    """What model is called with: of the shape, in the type of model's weights, or from the file; None where neither.

    Raises:
        typer.BadParameter: both are given, the shape is none, or the file's name says something else.
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, inflates to more than it may, or is no regular file.
    """
    if shape and file is not None:
        raise typer.BadParameter("--input-shape and --input must not come together, got both; leave one of them out")
    if shape:
        dtype = next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), torch.float32)
        return torch.randn(parse_shape(shape), generator=torch.Generator().manual_seed(0)).to(dtype)
    if file is None:
        return None
    if file.suffix not in SUFFIXES:
        raise typer.BadParameter(f"--input must be a {' or '.join(SUFFIXES)} file, got {file}")
    arrays = _arrays(verb, file)
    if all(name.startswith(POSITIONAL) and name[len(POSITIONAL) :].isdecimal() for name in arrays):
        return tuple(arrays[name] for name in sorted(arrays, key=lambda name: int(name[len(POSITIONAL) :])))
    return arrays


def in_words(example: Example) -> str:
    """The shapes, such as 1x784, or input_ids 1x16 and attention_mask 1x16."""
    if isinstance(example, Tensor):
        return _shape(example)
    if isinstance(example, tuple):
        return " and ".join(map(_shape, example))
    return " and ".join(f"{name} {_shape(tensor)}" for name, tensor in example.items())


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "one number"


def _arrays(verb: str, file: Path) -> dict[str, Tensor]:
    check_regular(verb, "--input", file)
    try:
        if file.suffix == ".safetensors":
            arrays = load_file(file)
        else:
            check_npz(file)
            with np.load(file, allow_pickle=False) as stored:
                arrays = {name: torch.from_numpy(stored[name]) for name in stored.files}
    except FileNotFoundError:
        raise FileNotFoundError(f"{verb}: --input must exist, got {file}; pass a file that does") from None
    except Exception as error:  # whatever readers make of a damaged file
        raise ValueError(
            f"{verb}: --input must hold arrays of numbers, got {file} ({error}); write it with numpy.savez or "
            "safetensors"
        ) from error
    if not arrays:
        raise ValueError(f"{verb}: --input must hold an array for each argument, got none in {file}; store them")
    return arrays
