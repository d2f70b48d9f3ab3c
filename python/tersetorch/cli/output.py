"""The file that a verb writes: told as an argument or as --output."""

import os
from pathlib import Path
from typing import Annotated

import typer

OutputArgument = Annotated[Path | None, typer.Argument(help="The .terse file to write.", metavar="OUTPUT")]
OutputOption = Annotated[Path | None, typer.Option("--output", "-o", help="The same, by name.")]


def one_output(argument: Path | None, option: Path | None) -> Path:
    """The one that was given.

    Raises:
        typer.BadParameter: none or both were.
    """
    found = [path for path in (argument, option) if path is not None]
    if len(found) != 1:
        raise typer.BadParameter(
            f"the file to write must come once, as OUTPUT or --output, got {' and '.join(map(str, found)) or 'none'}"
        )
    return found[0]


def keep_inputs(output: Path, *inputs: Path | str | None) -> None:
    """Looks whether output is one of the files that a verb reads; inputs that name no file are passed over.

    Raises:
        typer.BadParameter: it is: writing would end the only copy.
    """
    for name in inputs:
        try:
            same = bool(name) and os.path.samefile(output, str(name))
        except OSError:  # one of them does not exist
            continue
        if same:
            raise typer.BadParameter(f"the file to write must be none that is read, got {output}; name another")
