"""tersetorch report FILE."""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import nn

from tersetorch import conversion, costs, storage
from tersetorch._native import cpu_active
from tersetorch.bench import rates
from tersetorch.cli.example_input import Example, InputOption, InputShapeOption, in_words, read_example
from tersetorch.cli.model_file import NetworkOption, read_model
from tersetorch.cli.output import keep_inputs
from tersetorch.recipes.compression_record import CompressionRecord, record_path
from tersetorch.reports.page import Measurements, Rates, build_page
from tersetorch.storage.arguments import target_of, write_whole

L2 = 2**20


def report(
    file: Annotated[Path, typer.Argument(help="A .terse file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write, such as report.html.")],
    input_shape: InputShapeOption = "",
    input_file: InputOption = None,
    network: NetworkOption = "",
    record: Annotated[
        Path | None,
        typer.Option(help="What 'tersetorch compress' left; FILE's own, beside it, where there is one."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the page shows as JSON too.")] = False,
) -> None:
    """Writes one page of HTML about a file: size, accuracy, time and energy, before and after, layer by layer."""
    console = Console(stderr=True)
    target = target_of("report", output)  # looked at before minutes of measuring
    found = record or record_path(file)
    keep_inputs(output, file, found, input_file, network)
    if output.suffix not in (".html", ".htm"):
        raise typer.BadParameter(f"--output must end in .html, got {output}")
    inspection = storage.inspect(file)
    story = CompressionRecord.read(found) if record is not None or found.exists() else None
    if story is not None and not story.is_of(file):
        if record is not None:
            raise typer.BadParameter(f"--record must be of {file}, got one of another file; compress leaves it beside")
        console.print(f"{found} is of another file, and left out", markup=False, highlight=False)
        story = None
    measured = None
    if input_shape or input_file is not None:
        model = read_model("report", file, network)
        example = read_example("report", input_shape, input_file, model)
        assert example is not None
        with console.status("measuring each layer"):
            measured = measure(model, example)
    page = build_page(inspection, measured=measured, record=story)
    write_whole("report", target, page.encode(errors="replace"))  # a file's name may be no UTF-8
    if as_json:
        plain = {
            "page": str(output),
            "file": inspection.to_dict(),
            "record": None if story is None else story.model_dump(),
            "conversion": None if measured is None else measured.conversion.to_dict(),
            "picojoules": None
            if measured is None
            else {"before": measured.energy_before.total, "after": measured.energy_after.total},
        }
        print(json.dumps(plain, indent=1))
    console.print(f"{output}: {output.stat().st_size:,} bytes", markup=False, highlight=False)


def measure(model: nn.Module, example: Example) -> Measurements:
    """Times and counts the model that runs fastest here, beside its dense form, and the machine."""
    fast = conversion.convert(model, example)
    found = conversion.report(fast)
    dense = conversion.convert(model, plan={layer.name: "dense" for layer in found.layers})
    threads = torch.get_num_threads()
    machine = rates.measure(threads, quick=True)
    reached = machine.arithmetic[cpu_active()]
    arithmetic = {mode: reached[mode] for mode in ("float32", "int8") if mode in reached}
    return Measurements(
        inputs=in_words(example),
        conversion=found,
        energy_before=costs.energy(dense, example),
        energy_after=costs.energy(fast, example),
        rates=Rates(arithmetic, {"L2": machine.read(L2), "memory": machine.memory}, threads),
    )
