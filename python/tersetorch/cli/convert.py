"""tersetorch convert MODEL OUTPUT."""

import json
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console

from tersetorch import conversion, storage
from tersetorch.cli.coders import CodersOption
from tersetorch.cli.model_file import file_bar, read_model
from tersetorch.cli.shape import parse_shape


def convert(
    model: Annotated[
        Path, typer.Argument(help="A .terse file, or a state dict (.pt, .pth, .safetensors), quantised too.")
    ],
    output: Annotated[Path, typer.Argument(help="The .terse file to write.")],
    input_shape: Annotated[
        str, typer.Option(help="Shape of one input, such as 1x784: what the measuring runs on.", metavar="NxM...")
    ] = "",
    plan: Annotated[
        Literal["measure", "sparse", "codebook", "product", "residual", "binary"],
        typer.Option(help="measure keeps, for each layer, what is fastest here; the others are told, not measured."),
    ] = "measure",
    network: Annotated[str, typer.Option(help="The zoo's network that a state dict belongs to.")] = "",
    coders: CodersOption = "smallest",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of the table.")] = False,
) -> None:
    """Moves a pruned or shared model onto the kernels that are faster on this machine, and stores it."""
    console = Console(stderr=True)
    dense = read_model("convert", model, network)
    if plan == "measure":
        if not input_shape:
            raise typer.BadParameter(
                "measuring needs --input-shape; or name a --plan such as sparse, codebook or binary"
            )
        example = torch.randn(parse_shape(input_shape), generator=torch.Generator().manual_seed(0))
        with console.status("measuring each layer"):
            fast = conversion.convert(dense, example)
    else:
        fast = conversion.convert(dense, plan=plan)
    with file_bar() as progress:
        storage.save(fast, output, coders=coders, progress=progress)
    report = conversion.report(fast)
    print(json.dumps(report.to_dict(), indent=1) if as_json else report)
    console.print(f"{output}: {output.stat().st_size:,} bytes")
