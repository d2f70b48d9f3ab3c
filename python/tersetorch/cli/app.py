"""The verbs of the tersetorch command; each lives in a file of its own."""

import io
import sys
import warnings
from typing import Annotated

import typer

from tersetorch import __version__
from tersetorch.cli.bench import bench
from tersetorch.cli.compress import compress
from tersetorch.cli.convert import convert
from tersetorch.cli.demo import demo
from tersetorch.cli.doctor import doctor
from tersetorch.cli.inspect import inspect
from tersetorch.cli.report import report
from tersetorch.cli.reproduce import reproduce
from tersetorch.storage.errors import printable
from tersetorch.zoo.ranks import told

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for verb in (demo, compress, convert, inspect, report, doctor, bench, reproduce):
    app.command()(verb)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tersetorch {__version__}")
        raise typer.Exit


@app.callback()
def _whole(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Makes trained PyTorch networks smaller and faster, and measures both."""


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and str(error).startswith("[Errno"):  # the system's own words name no argument
        what = error.filename or "standard output"
        return f"tersetorch: {what} must be there and have room, got {error.strerror}; mend it, or name another"
    return str(error).strip().partition("\n")[0] or f"tersetorch: {type(error).__name__}"


def main() -> None:
    """Runs the command. Exit codes: 0 done, 1 it could not be done (one sentence on stderr says why), 2 wrong usage."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # hours of work are not lost to a terminal without lines for tables
    # torch warns about its own classes wherever an exported program is copied.
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
    try:
        app()
    except Exception as error:  # a person gets the sentence, never a traceback
        sentence = _sentence(error)
        notes = (f"({note})" for note in getattr(error, "__notes__", ()))
        print(printable(" ".join([sentence, *notes])), file=sys.stderr)
        sys.exit(1)
    finally:
        told()
