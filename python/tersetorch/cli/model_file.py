"""The file that a verb starts from."""

import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file
from torch import nn

from tersetorch import storage, zoo
from tersetorch.cli.importable import call_importable, is_importable
from tersetorch.methods.arguments import did_you_mean
from tersetorch.storage.archives import check_stored
from tersetorch.storage.importers.quantized import is_quantized_file

SUFFIXES = (".terse", ".pt2", ".pt", ".pth", ".safetensors")
# Under which training loops store a state dict beside the optimizer's, and what wrappers put before its names.
NESTED = ("state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")


def _complete_network(typed: str) -> list[str]:
    return [name for name in zoo.NETWORKS if name.startswith(typed)]


NetworkOption = Annotated[
    str,
    typer.Option(
        help="Whose weights MODEL holds: a network of the zoo, a function of yours that gives the module, as "
        "package.module:function, or the .pt2 file that MODEL came from.",
        autocompletion=_complete_network,
    ),
]


def file_bar() -> Progress:
    """For reading or writing a file: drawn on a terminal, since elsewhere nobody watches it."""
    console = Console(stderr=True)
    return Progress(console=console, disable=not console.is_terminal)


def read_model(verb: str, path: Path, network: str) -> nn.Module:
    """The model in a file, in evaluation mode: a .terse file, an exported program, or a network with a state dict.

    Raises:
        typer.BadParameter: path's name says something else, it is no regular file, or network is unknown.
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    if path.exists() and not path.is_file():  # reading a pipe would wait for its writer
        raise typer.BadParameter(f"MODEL must be a regular file, got {path}")
    if path.suffix not in SUFFIXES:
        raise typer.BadParameter(f"MODEL must be a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file, got {path}")
    if path.suffix == ".pt2":
        return storage.import_exported(path)
    if path.suffix == ".terse":
        with file_bar() as progress:
            return storage.load(path, model=_network(verb, network) if network else None, progress=progress)
    if not network:
        raise typer.BadParameter(
            f"a state dict needs --network: one of {', '.join(zoo.NETWORKS)}, or package.module:function, got none"
        )
    model = _network(verb, network)
    if path.suffix == ".safetensors" and is_quantized_file(path):
        return storage.import_quantized(path, model).eval()
    fix = "write it with torch.save(model.state_dict(), path)"
    try:
        if path.suffix != ".safetensors":
            check_stored(path)
        stored = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        state = _plain_state(stored, model)
        if _parametrized(state) and not _parametrized(model.state_dict()):
            fix = "call tersetorch.finalize(model) before, which leaves plain weights"
            raise ValueError("its weights have parametrizations, as masks and codebooks that still train")
        wide = [name for name, value in state.items() if isinstance(value, torch.Tensor) and value.is_complex()]
        if wide:
            raise ValueError(f"{wide[0]} must be real, got a complex tensor, whose imaginary part would be lost")
        model.load_state_dict(state)
    except FileNotFoundError:
        raise FileNotFoundError(f"{verb}: MODEL must exist, got {path}; pass a file that does") from None
    except Exception as error:  # whatever torch makes of a file that holds something else
        reason = " ".join(str(error).split())[:200]
        # torch's own words are long, and advise to run what the file holds
        if isinstance(error, pickle.UnpicklingError) and (code := re.search(r"GLOBAL ([\w.]+)", str(error))):
            reason = f"it holds {code[1]}, more than tensors and numbers"
        raise ValueError(
            f"{verb}: MODEL must hold a state dict of {network}, got {path} ({type(error).__name__}: {reason}); {fix}"
        ) from error
    return model.eval()


def _parametrized(state: Iterable[str]) -> bool:
    return any("parametrizations" in str(name).split(".") for name in state)


def _plain_state(stored: Any, model: nn.Module) -> Any:
    """The state dict in a checkpoint, without what DataParallel, torch.compile and the like put before its names."""
    if isinstance(stored, Mapping):
        stored = next((stored[name] for name in NESTED if isinstance(stored.get(name), Mapping)), stored)
    expected = model.state_dict()
    for prefix in PREFIXES * 2:  # a compiled model in DataParallel has both, in either order
        wrapped = isinstance(stored, Mapping) and bool(stored) and all(str(name).startswith(prefix) for name in stored)
        if wrapped and not any(name.startswith(prefix) for name in expected):
            stored = {name[len(prefix) :]: value for name, value in stored.items()}
    return stored


def _network(verb: str, name: str) -> nn.Module:
    if name in zoo.NETWORKS:
        return zoo.NETWORKS[name]()
    if name.endswith(".pt2"):
        return storage.import_exported(name)
    if not is_importable(name):
        raise typer.BadParameter(
            f"--network must be one of {', '.join(zoo.NETWORKS)}, package.module:function or a .pt2 file, got {name}"
            f"{did_you_mean(name, zoo.NETWORKS)}"
        )
    model = call_importable(verb, "--network", name)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{verb}: --network must give an nn.Module, got {type(model).__name__}; return the module")
    return model
