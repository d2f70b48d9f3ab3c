"""tersetorch convert MODEL OUTPUT."""

import json
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from safetensors.torch import load_file

from tersetorch import conversion, storage, zoo
from tersetorch.cli.shape import parse_shape
from tersetorch.storage.importers.quantized import is_quantized_file


def convert(
    model: Annotated[
        Path, typer.Argument(help="A .terse file, or a state dict (.pt, .pth, .safetensors), quantised too.")
    ],
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
    if path.exists() and not path.is_file():  # reading a pipe would wait for its writer
        raise typer.BadParameter(f"MODEL must be a regular file, got {path}")
    if path.suffix == ".terse":
        return storage.load(path)
    if path.suffix not in (".pt", ".pth", ".safetensors"):
        raise typer.BadParameter(f"MODEL must be a .terse, .pt, .pth or .safetensors file, got {path}")
    if network not in zoo.NETWORKS:
        got = network or "none"
        raise typer.BadParameter(f"a state dict needs --network, one of {', '.join(zoo.NETWORKS)}, got {got}")
    model = zoo.NETWORKS[network]()
    if path.suffix == ".safetensors" and is_quantized_file(path):
        return storage.import_quantized(path, model).eval()
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        wide = [name for name, value in state.items() if isinstance(value, torch.Tensor) and value.is_complex()]
        if wide:
            raise ValueError(f"{wide[0]} must be real, got a complex tensor, whose imaginary part would be lost")
        model.load_state_dict(state)
    except FileNotFoundError:
        raise FileNotFoundError(f"convert: MODEL must exist, got {path}; pass a file that does") from None
    except Exception as error:  # whatever torch makes of a file that holds something else
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"convert: MODEL must hold a state dict of {network}, got {path} ({type(error).__name__}: {reason}); "
            "write it with torch.save(model.state_dict(), path)"
        ) from error
    return model.eval()
