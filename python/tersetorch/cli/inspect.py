"""tersetorch inspect FILE."""

import json
from pathlib import Path
from typing import Annotated

import typer

from tersetorch.cli.output import columns
from tersetorch.storage import inspect as inspect_file


def inspect(
    file: Annotated[Path, typer.Argument(help="A .terse file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the items as JSON instead of the table.")] = False,
) -> None:
    """Itemises every byte of a .terse file; the items add up to the file's size."""
    inspection = inspect_file(file)
    print(json.dumps(inspection.to_dict(), indent=1) if as_json else inspection.text(columns()))
