"""tersetorch convert MODEL OUTPUT."""

import json
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console

from tersetorch import conversion, storage
from tersetorch.cli.coders import CodersOption
from tersetorch.cli.model_file import NetworkOption, file_bar, read_model
from tersetorch.cli.output import OutputArgument, OutputOption, one_output
from tersetorch.cli.shape import parse_shape


def convert(
    model: Annotated[
        Path,
        typer.Argument(
            help="A .terse file, an exported program (.pt2) or a state dict (.pt, .safetensors), quantised too."
        ),
    ],
    output: OutputArgument = None,
    output_option: OutputOption = None,
    input_shape: Annotated[
        str, typer.Option(help="Shape of one input, such as 1x784: what the measuring runs on.", metavar="NxM...")
    ] = "",
    plan: Annotated[
        Literal["measure", "sparse", "codebook", "product", "residual", "binary"],
        typer.Option(help="measure keeps, for each layer, what is fastest here; the others are told, not measured."),
    ] = "measure",
    network: NetworkOption = "",
    coders: CodersOption = "smallest",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of the table.")] = False,
) -> None:
    """Moves a pruned or shared model onto the kernels that are faster on this machine, and stores it."""
    console = Console(stderr=True)
    target = one_output(output, output_option)
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
        storage.save(fast, target, coders=coders, progress=progress)
    report = conversion.report(fast)
    print(json.dumps(report.to_dict(), indent=1) if as_json else report)
    console.print(f"{target}: {target.stat().st_size:,} bytes")
