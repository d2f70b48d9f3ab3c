"""State dicts in which others keep pruned weights: masks beside originals, and bit masks beside values."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from tersetorch.storage.archives import check_stored

WHERE = "read_pruned_state"
ORIGINAL, MASK = "_orig", "_mask"
VALUES, BITS, SHAPE, OFFSETS = ".compressed", ".bitmask", ".shape", ".row_offsets"


def read_pruned_state(source: Mapping[str, Tensor] | str | Path) -> dict[str, Tensor]:
    """The plain state dict, zeros in place, of one in which pruned weights are kept in another form.

    - torch.nn.utils.prune: `weight_orig` and `weight_mask` become `weight` = where(weight_mask, weight_orig, 0).
    - compressed-tensors "sparse-bitmask" and "sparse-24-bitmask": `layer.shape`, `layer.compressed` (the values that
      are not pruned, in the tensor's order), `layer.bitmask` (uint8, a bit for each place of the last dimension, least
      significant first) and, of the first form, `layer.row_offsets` become `layer.weight`.
    - every other tensor, plain weights with zeros too, is passed on as it is.

    prune.keep_zeros then makes masks of the zeros.

    Args:
        source: a state dict, or the path of a .safetensors file or of a file that torch.load reads as a state dict,
            written by torch 1.6 or later, without pickled bytes.

    Raises:
        TypeError: source is neither, or holds something else than tensors by name.
        ValueError: a part is missing or does not fit the others: nothing is guessed. Weights in float8 are refused.
        OSError: the file cannot be read.

    Source:
        torch.nn.utils.prune's custom_from_mask for the names; the bitmask layout is that of
        github.com/vllm-project/compressed-tensors before its sparse formats were removed in 2026.
    """
    state = _load(Path(source)) if isinstance(source, str | Path) else source
    if not isinstance(state, Mapping):
        raise TypeError(f"{WHERE}: source must be a state dict or a path, got {type(source).__name__}; pass one")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(
                f"{WHERE}: source must hold tensors by name, got {type(tensor).__name__} under {name!r}; pass "
                "model.state_dict()"
            )
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stem = name.removesuffix(ORIGINAL)
        if name.endswith(ORIGINAL) and stem + MASK in state:
            if stem in state:
                _refuse(f"hold {stem!r} once", f"it beside {name!r} and {stem + MASK!r}")
            plain[stem] = _masked(stem, tensor, state[stem + MASK])
        elif name.endswith(MASK) and name.removesuffix(MASK) + ORIGINAL in state:
            continue
        elif name.endswith(ORIGINAL) and f"{stem}_u" not in state:  # which torch's spectral norm keeps beside it
            _refuse(f"hold the mask of {name!r}", f"no {name.removesuffix(ORIGINAL) + MASK!r}")
        elif name.endswith(BITS):
            stem = name.removesuffix(BITS)
            plain[stem if stem.endswith("weight") else f"{stem}.weight"] = _from_bits(stem, state)
        elif any(name.endswith(part) and name.removesuffix(part) + BITS in state for part in (VALUES, SHAPE, OFFSETS)):
            continue
        elif name.endswith(VALUES):
            _refuse(f"hold the bit mask of {name!r}", f"no {name.removesuffix(VALUES) + BITS!r}")
        else:
            plain[name] = tensor
    return plain


def _load(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{WHERE}: source must be a file, got {path}; pass one that exists")
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        check_stored(path)
    except ValueError as error:
        raise ValueError(f"{WHERE}: {path} {error}") from error
    found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, Mapping):
        raise TypeError(f"{WHERE}: {path} must hold a state dict, got {type(found).__name__}; save model.state_dict()")
    return found


def _masked(name: str, original: Tensor, mask: Tensor) -> Tensor:
    if mask.shape != original.shape:
        _refuse(f"hold a mask of {name!r} of shape {tuple(original.shape)}", f"{tuple(mask.shape)}")
    if not bool(((mask == 0) | (mask == 1)).all()):
        _refuse(f"hold a mask of {name!r} of 0 and 1", "other numbers")
    return torch.where(mask.bool(), original, 0)


def _from_bits(stem: str, state: Mapping[str, Tensor]) -> Tensor:
    parts = {part: state.get(stem + part) for part in (VALUES, SHAPE)}
    for part, tensor in parts.items():
        if tensor is None:
            _refuse(f"hold {stem + part!r} beside {stem + BITS!r}", "none")
    values, given, bits = parts[VALUES], parts[SHAPE], state[stem + BITS]
    assert values is not None and given is not None
    if given.is_floating_point() or given.dtype == torch.bool or bool((given < 0).any()) or given.numel() < 1:
        _refuse(f"hold whole numbers in {stem + SHAPE!r}", f"{given.dtype} {given.flatten().tolist()[:8]}")
    shape = [int(size) for size in given.flatten()]
    if values.element_size() == 1:
        _refuse(f"hold {stem + VALUES!r} in 16, 32 or 64-bit floating point", f"{values.dtype}")
    packed = [*shape[:-1], (shape[-1] + 7) // 8]
    # Compared before anything of that shape is made.
    if bits.dtype != torch.uint8 or bits.numel() != prod(packed):
        _refuse(f"hold uint8 {packed} in {stem + BITS!r}", f"{bits.dtype} {list(bits.shape)}")
    raw = np.unpackbits(bits.cpu().contiguous().view(packed).numpy(), axis=-1, bitorder="little")
    kept = torch.from_numpy(raw[..., : shape[-1]].astype(bool))
    if raw[..., shape[-1] :].any():
        _refuse(f"hold no bit behind the last column in {stem + BITS!r}", "some")
    count = int(kept.sum())
    if values.numel() != count:
        _refuse(f"hold {count} values in {stem + VALUES!r}, as its bit mask says", f"{values.numel()}")
    offsets = state.get(stem + OFFSETS)
    if offsets is not None:
        lengths = kept.sum(-1).flatten()
        if not torch.equal(offsets.flatten().cpu().long(), lengths.cumsum(0) - lengths):
            _refuse(f"hold the first value of each row in {stem + OFFSETS!r}, as its bit mask says", "others")
    weight = torch.zeros(shape, dtype=values.dtype, device=values.device)
    weight[kept.to(values.device)] = values.flatten()
    return weight


def _refuse(rule: str, came: str) -> NoReturn:
    raise ValueError(f"{WHERE}: source must {rule}, got {came}; export it again")
