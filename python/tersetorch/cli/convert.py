"""tersetorch convert MODEL OUTPUT."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from tersetorch import conversion, storage
from tersetorch.cli.coders import CodersOption
from tersetorch.cli.example_input import InputOption, InputShapeOption, read_example
from tersetorch.cli.model_file import NetworkOption, file_bar, read_model
from tersetorch.cli.output import OutputArgument, OutputOption, keep_inputs, one_output
from tersetorch.methods.selection import NAMES_SHOWN, find_weights
from tersetorch.storage.arguments import target_of


def convert(
    model: Annotated[
        Path,
        typer.Argument(
            help="A .terse file, an exported program (.pt2) or a state dict (.pt, .safetensors), quantised too."
        ),
    ],
    output: OutputArgument = None,
    output_option: OutputOption = None,
    input_shape: InputShapeOption = "",
    input_file: InputOption = None,
    plan: Annotated[
        Literal[
            "measure", "sparse", "codebook", "product", "residual", "binary", "fixed", "low_rank", "multiplied_out"
        ],
        typer.Option(
            help="measure keeps, for each layer, what is fastest here; the others are told, not measured, and take an "
            "input only to say how much the outputs differ."
        ),
    ] = "measure",
    network: NetworkOption = "",
    coders: CodersOption = "smallest",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of the table.")] = False,
) -> None:
    """Moves a pruned or shared model onto the kernels that are faster on this machine, and stores it."""
    console = Console(stderr=True)
    target = one_output(output, output_option)
    target_of("convert", target)  # looked at before minutes of measuring
    keep_inputs(target, model, input_file, network)
    dense = read_model("convert", model, network)
    example = read_example("convert", input_shape, input_file, dense)
    if plan == "measure" and example is None:
        raise typer.BadParameter(
            "measuring needs --input-shape or --input; or name a --plan such as sparse, codebook or binary"
        )
    with console.status("measuring each layer" if plan == "measure" else "converting"):
        fast = conversion.convert(dense, example, plan=None if plan == "measure" else plan)
    with file_bar() as progress:
        storage.save(fast, target, coders=coders, progress=progress)
    report = conversion.report(fast)
    print(json.dumps(report.to_dict(), indent=1) if as_json else report)
    reported = {name for layer in report.layers for name in layer.names}
    others = [weight.name for weight in find_weights(dense) if reported.isdisjoint(weight.names)]
    if others:
        names = [*others[:NAMES_SHOWN], *["..."] * (len(others) > NAMES_SHOWN)]
        console.print(f"no kernels are for these, which stay dense: {', '.join(names)}", markup=False, highlight=False)
    console.print(f"{target}: {target.stat().st_size:,} bytes")
