"""What a verb writes: a file, told as an argument or as --output, and text as wide as the terminal."""

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from tersetorch.cli.importable import files_of, is_importable
from tersetorch.storage.inspection import WIDE

OutputArgument = Annotated[Path | None, typer.Argument(help="The .terse file to write.", metavar="OUTPUT")]
OutputOption = Annotated[Path | None, typer.Option("--output", "-o", help="The same, by name.")]


def columns() -> int:
    """Columns that are there for text: the terminal's, or many where it goes to a file or another program."""
    return shutil.get_terminal_size((WIDE, 24)).columns


def one_output(argument: Path | None, option: Path | None) -> Path:
    """The one that was given.

    Raises:
        typer.BadParameter: none or both were, or it is named as another kind of file, which no verb would read again.
    """
    found = [path for path in (argument, option) if path is not None]
    if len(found) != 1:
        raise typer.BadParameter(
            f"the file to write must come once, as OUTPUT or --output, got {' and '.join(map(str, found)) or 'none'}"
        )
    if found[0].suffix != ".terse":
        raise typer.BadParameter(f"the file to write must end in .terse, got {found[0]}")
    return found[0]


def keep_inputs(output: Path, *inputs: Path | str | None) -> None:
    """Looks whether output is one of the files that a verb reads, or the code of a package.module:function.

    Inputs that name no file are passed over.

    Raises:
        typer.BadParameter: it is: writing would end the only copy.
    """
    names = [str(name) for name in inputs if name]
    for file in [*names, *(code for name in names if is_importable(name) for code in files_of(name))]:
        try:
            same = os.path.samefile(output, file)
        except OSError:  # one of them does not exist
            continue
        if same:
            raise typer.BadParameter(f"the file to write must be none that is read, got {output}; name another")
