"""--coders of the verbs that write a file."""

from typing import Annotated, Literal

import typer

CodersOption = Annotated[
    Literal["smallest", "fast"],
    typer.Option(help="smallest takes whatever makes each stream smallest; fast leaves out coders that decode slowly."),
]
