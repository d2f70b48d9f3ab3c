"""tt.save."""

from __future__ import annotations

import json
from os import PathLike
from typing import Any, Literal

import torch
from rich.progress import Progress
from torch import nn

from tersetorch.conversion.swap import deep_copy
from tersetorch.methods.arguments import check_choice
from tersetorch.methods.finalize import finalize
from tersetorch.methods.parametrization import is_live, release_graphs
from tersetorch.storage.arguments import target_of, write_whole
from tersetorch.storage.container import pack
from tersetorch.storage.describe import Describer
from tersetorch.storage.streams import CODERS

PROVENANCE_CAP = 64 << 10


def save(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    coders: Literal["smallest", "fast"] = "smallest",
    provenance: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes model to one file, every tensor in its smallest lossless form; the same model gives the same bytes.

    A tensor is stored raw, as codes with a codebook or one for each row or block of columns, as codes of sub-vectors
    that its rows share, as signs with a scale for each row, as integers with a scale, and perhaps an offset, for all,
    each row or each group of a row, or as the positions of its non-zeros with their values or codes; which one follows
    from its values, not from how a layer happens to run. Rows that are sums of shared ones, as quantize.residual makes
    them, are stored by their codes as long as nobody changes the weight after finalize.

    The -0.0 that a product with a mask leaves comes back as 0.0 in the weights of linear, convolutional, recurrent and
    attention layers, which only enter sums; every other bit of every tensor is kept. SparseLinear and
    SparseCodebookLinear are stored as they are. Parameters and modules that are shared are stored once. A model that is
    still being compressed is stored as tersetorch.finalize would leave it, and does not change.

    The file is written beside path under another name and moved into place whole, so a failure leaves what was there.
    A link stays, and what it names is replaced. A model that decodes to more than 64 MiB and more than 4096 times its
    file needs max_bytes= at load.

    Args:
        model: any module. tersetorch.load builds zoo networks and trees of torch.nn modules and our layers by itself,
            and puts everything else into an instance that it is given.
        path: the file to write; its folder must exist.
        coders: what each stream is written by: "smallest", whatever makes it smallest, or "fast", the same
            without contexts. Contexts decode 4 to 10 million codes or 30 to 40 million places of positions a second
            and write streams of at most 2^23 bits, a quarter of a second each; without them codes decode at more than
            200 million a second. The published SqueezeNet is 2 % larger by them and loads in a seventh of the time.
            Files of both kinds are read alike; tersetorch.inspect names each stream's coder.
        provenance: what reports should know of the model (accuracy, latency, sensitivity), JSON of at most 64 KiB.
        progress: a bar of the tensors' bytes is added to it.

    Raises:
        TypeError: model is no nn.Module, path no path, or provenance no dict.
        ValueError: coders is none of these, path names a folder, a device or nothing that a file can be called, a
            tensor is no plain tensor with values or of an unknown dtype, a module keeps state outside its tensors or
            contains itself, provenance is not JSON, or a model that is still being compressed cannot be copied.
        OSError: the file cannot be written; FileNotFoundError where the folder of path does not exist.

    Source:
        Han, Mao and Dally, Deep Compression (2015), sections 2 (relative positions), 3 (codebooks) and 4 (Huffman
        codes), lossless here and with fillers that store no value.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"save: model must be an eager nn.Module, got {type(model).__name__}; pass the Python module")
    check_choice("save", "coders", coders, CODERS)
    target = target_of("save", path)
    header: dict[str, Any] = {}
    if provenance is not None:
        header["p"] = _checked_provenance(provenance)
    if is_live(model):
        release_graphs(model)
        model = finalize(deep_copy(model, verb="save"))
    describer = Describer(model, progress, in_context=coders == "smallest")
    header["m"] = describer.node(model)
    _check_complete(model)
    header["t"] = [entry.to_json() for entry in describer.entries]
    packed = pack(header, [stream.data for streams in describer.streams for stream in streams])
    write_whole("save", target, packed)


def _check_complete(model: nn.Module) -> None:
    """Refuses a model whose state dict holds more than the parameters and persistent buffers that were stored."""
    stored = sum(
        tensor is not None and name not in module._non_persistent_buffers_set
        for _, module in model.named_modules(remove_duplicate=False)
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
    )
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(
                f"save: model must keep its state in tensors, got {type(value).__name__} as {name} in its state dict; "
                "save the model it was made from, or register the state as buffers"
            )
    if len(state) > stored:
        raise ValueError(
            f"save: model must keep its state in parameters and buffers, got {stored} and a state dict of {len(state)};"
            " register the rest as buffers"
        )


def _checked_provenance(provenance: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(provenance, dict):
        raise TypeError(f"save: provenance must be a dict, got {type(provenance).__name__}; name what you store")
    try:
        text = json.dumps(provenance, allow_nan=False)
        kept = json.loads(text) == provenance
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"save: provenance must be JSON, got {error}; keep to numbers, strings and lists") from error
    if not kept:
        raise ValueError(
            "save: provenance must come back from JSON as it is, got other keys or values; "
            "use string keys, and lists instead of tuples"
        )
    if len(text) > PROVENANCE_CAP:
        raise ValueError(f"save: provenance must fit {PROVENANCE_CAP} bytes as JSON, got {len(text)}; store less")
    return provenance
