"""The file that a verb starts from."""

from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file

from tersetorch import storage, zoo
from tersetorch.storage.importers.quantized import is_quantized_file


def file_bar() -> Progress:
    """For reading or writing a file: drawn on a terminal, since elsewhere nobody watches it."""
    console = Console(stderr=True)
    return Progress(console=console, disable=not console.is_terminal)


def read_model(verb: str, path: Path, network: str) -> torch.nn.Module:
    """The model in a .terse file, or the zoo's network with a state dict's weights, in evaluation mode.

    Raises:
        typer.BadParameter: path's name says something else, it is no regular file, or network is unknown.
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    if path.exists() and not path.is_file():  # reading a pipe would wait for its writer
        raise typer.BadParameter(f"MODEL must be a regular file, got {path}")
    if path.suffix == ".terse":
        with file_bar() as progress:
            return storage.load(path, progress=progress)
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
        raise FileNotFoundError(f"{verb}: MODEL must exist, got {path}; pass a file that does") from None
    except Exception as error:  # whatever torch makes of a file that holds something else
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{verb}: MODEL must hold a state dict of {network}, got {path} ({type(error).__name__}: {reason}); "
            "write it with torch.save(model.state_dict(), path)"
        ) from error
    return model.eval()
