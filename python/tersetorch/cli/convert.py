"""tersetorch convert MODEL OUTPUT."""

import json
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console

from tersetorch import conversion, storage, zoo
from tersetorch.cli.shape import parse_shape


def convert(
    model: Annotated[Path, typer.Argument(help="A .terse file, or a state dict (.pt, .pth, .safetensors).")],
    output: Annotated[Path, typer.Argument(help="The .terse file to write.")],
    input_shape: Annotated[
        str, typer.Option(help="Shape of one input, such as 1x784: what the measuring runs on.", metavar="NxM...")
    ] = "",
    plan: Annotated[
        Literal["measure", "sparse", "codebook"],
        typer.Option(help="measure keeps, for each layer, what is fastest here; the others are told, not measured."),
    ] = "measure",
    network: Annotated[str, typer.Option(help="The zoo's network that a state dict belongs to.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of the table.")] = False,
) -> None:
    """Moves a pruned or shared model onto the kernels that are faster on this machine, and stores it."""
    console = Console(stderr=True)
    dense = _read(model, network)
    if plan == "measure":
        if not input_shape:
            raise typer.BadParameter("measuring needs --input-shape; or name --plan sparse or codebook")
        example = torch.randn(parse_shape(input_shape), generator=torch.Generator().manual_seed(0))
        with console.status("measuring each layer"):
            fast = conversion.convert(dense, example)
    else:
        fast = conversion.convert(dense, plan=plan)
    storage.save(fast, output)
    report = conversion.report(fast)
    print(json.dumps(report.to_dict(), indent=1) if as_json else report)
    console.print(f"{output}: {output.stat().st_size:,} bytes")


def _read(path: Path, network: str) -> torch.nn.Module:
    if path.suffix == ".terse":
        return storage.load(path)
    if not network:
        raise typer.BadParameter(f"a state dict needs --network, one of {', '.join(zoo.NETWORKS)}")
    if network not in zoo.NETWORKS:
        raise typer.BadParameter(f"--network must be one of {', '.join(zoo.NETWORKS)}, got {network}")
    model = zoo.NETWORKS[network]()
    model.load_state_dict(_read_state(path))
    return model.eval()


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if path.suffix not in (".pt", ".pth"):
        raise typer.BadParameter(f"MODEL must end in .terse, .pt, .pth or .safetensors, got {path.name}")
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True, map_location="cpu")
    return state
