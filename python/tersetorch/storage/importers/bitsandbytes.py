"""What bitsandbytes keeps in a state dict: 4-bit weights (NF4, FP4) and 8-bit ones, read without the library or a GPU.

layer.weight                                u8 [ceil(n / 2), 1]: two codes a byte, the first in the high half
layer.weight.absmax                         f32 [blocks], or u8 where it is quantised itself
layer.weight.quant_map                      f32 [16], the numbers of the type
layer.weight.quant_state.bitsandbytes__nf4  u8: JSON of quant_type, blocksize, dtype, shape and nested_*
layer.weight.nested_absmax, nested_quant_map    f32 [blocks of absmax], f32 [256]

weight.flatten()[i] = dtype(quant_map[code i] absmax[i // blocksize]), the product in float32
absmax[b] = nested_quant_map[absmax byte b] nested_absmax[b // nested_blocksize] + nested_offset

layer.weight, layer.SCB    i8 [out, in], f32 [out]: weight[r, c] = weight[r, c] SCB[r] (1 / 127), from the left
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor

from tersetorch.storage.importers.quantized_weight import QuantizedWeight
from tersetorch.storage.importers.refusal import refuse

STATE = ".quant_state.bitsandbytes__"
SCALES, FORMAT = "SCB", "weight_format"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
FIELDS = {"quant_type", "blocksize", "dtype", "shape"}
NESTED_FIELDS = {"nested_blocksize", "nested_dtype", "nested_offset"}
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# Bytes of JSON that a state may have; bitsandbytes writes fewer than 200.
STATE_CAP = 4096
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HALF_FP4 = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
# Quantiles of the normal distribution, from QLoRA's appendix E.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
TABLES = {"nf4": NF4, "fp4": (*HALF_FP4, *(-value for value in HALF_FP4))}


def is_mark(name: str) -> bool:
    """Whether only bitsandbytes names an entry of a state dict so."""
    return STATE in name or name.rpartition(".")[2] == SCALES


def read_state(state: Mapping[str, object]) -> tuple[dict[str, QuantizedWeight], set[str]]:
    """The quantised weights of a state dict by their names, and the names that were read.

    Raises:
        ValueError: a part is missing or does not fit the others.
    """
    found: dict[str, QuantizedWeight] = {}
    used: set[str] = set()
    for name in state:
        if STATE in name:
            stem, kind = name.rsplit(STATE, 1)
            if kind not in TABLES:
                refuse(f"hold weights of type nf4 or fp4 in {stem!r}", kind)
            if stem in found:
                refuse(f"hold one state of {stem!r}", "two")
            found[stem] = _read_4bit(stem, kind, state)
            used |= {name, stem, *(f"{stem}.{part}" for part in PARTS)}
        elif name.rpartition(".")[2] == SCALES:
            prefix = name.removesuffix(SCALES)
            found[f"{prefix}weight"] = _read_8bit(prefix, state)
            used |= {name, f"{prefix}weight", f"{prefix}{FORMAT}"}
    for name in state:
        stem, _, part = name.rpartition(".")
        if name not in used and part in PARTS and isinstance(state.get(stem), Tensor):
            refuse(f"hold {stem + STATE!r} with its type behind it, beside {name!r}", "none")
    return found, used & set(state)


def _read_4bit(stem: str, kind: str, state: Mapping[str, object]) -> QuantizedWeight:
    fields = _fields(stem, kind, state)
    shape, block, dtype = fields["shape"], fields["blocksize"], DTYPES[fields["dtype"]]
    weights = prod(shape)
    packed = _tensor(state, stem, None, None).contiguous().flatten().view(torch.uint8)
    if packed.numel() != -(-weights // 2):
        refuse(f"hold {-(-weights // 2)} bytes in {stem!r}, as its shape {shape} says", packed.numel())
    blocks = -(-weights // block)
    table = _tensor(state, f"{stem}.quant_map", torch.float32, 16)
    if not torch.equal(table, torch.tensor(TABLES[kind])):
        refuse(f"hold the numbers of {kind} in {stem + '.quant_map'!r}", "others, which bitsandbytes does not read")
    if "nested_offset" in fields:
        inner = fields["nested_blocksize"]
        coded = _tensor(state, f"{stem}.absmax", torch.uint8, blocks)
        outer = _tensor(state, f"{stem}.nested_absmax", torch.float32, -(-blocks // inner))
        inner_table = _tensor(state, f"{stem}.nested_quant_map", torch.float32, 256)
        scale = inner_table[coded.long()] * outer[torch.arange(blocks) // inner] + torch.tensor(fields["nested_offset"])
    else:
        for part in PARTS[2:]:
            if f"{stem}.{part}" in state:
                refuse(f"hold no {stem + '.' + part!r} where its state names no nested_offset", "it")
        scale = _tensor(state, f"{stem}.absmax", torch.float32, blocks)
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[:weights].reshape(shape)
    codebook = (table * scale[:, None]).to(dtype).float()
    if not bool(codebook.isfinite().all()):
        refuse(f"hold finite scales of {stem!r}", "NaN or infinity")
    return QuantizedWeight(codes, codebook, block, dtype)


def _fields(stem: str, kind: str, state: Mapping[str, object]) -> dict[str, Any]:
    """The JSON of a weight's state, every field of it checked."""
    name = f"{stem}{STATE}{kind}"
    raw = _tensor(state, name, torch.uint8, None)
    if not 0 < raw.numel() <= STATE_CAP:
        refuse(f"hold 1 to {STATE_CAP} bytes in {name!r}", raw.numel())
    try:
        fields: dict[str, Any] = json.loads(bytes(raw.flatten().tolist()))
    except (ValueError, RecursionError):
        refuse(f"hold JSON in {name!r}", "something else")
    names = set(fields) if isinstance(fields, dict) else set()
    if names not in (FIELDS, FIELDS | NESTED_FIELDS):
        refuse(f"name {sorted(FIELDS)} and all or none of {sorted(NESTED_FIELDS)} in {name!r}", sorted(names))
    shape, block = fields["shape"], fields["blocksize"]
    if fields["quant_type"] != kind:
        refuse(f"say {kind} in {name!r}", repr(fields["quant_type"]))
    if not isinstance(shape, list) or not shape or not all(type(size) is int and 0 < size < 2**31 for size in shape):
        refuse(f"hold the weight's shape in {name!r}", f"{shape!r:.80}")
    if type(block) is not int or block not in BLOCKS:
        refuse(f"hold a blocksize of {BLOCKS} in {name!r}", repr(block))
    if not isinstance(fields["dtype"], str) or fields["dtype"] not in DTYPES:
        refuse(f"hold a dtype of {tuple(DTYPES)} in {name!r}", repr(fields["dtype"]))
    if names != FIELDS:
        inner, offset = fields["nested_blocksize"], fields["nested_offset"]
        if type(inner) is not int or not 0 < inner < 2**31 or fields["nested_dtype"] != "float32":
            refuse(f"hold a nested_blocksize and float32 in {name!r}", f"{inner!r} and {fields['nested_dtype']!r}")
        if type(offset) not in (int, float) or not isfinite(offset):
            refuse(f"hold a finite nested_offset in {name!r}", repr(offset))
    return fields


def _read_8bit(prefix: str, state: Mapping[str, object]) -> QuantizedWeight:
    name = f"{prefix}weight"
    weight = _tensor(state, name, torch.int8, None)
    layout = state.get(f"{prefix}{FORMAT}")
    if layout is not None and not (isinstance(layout, Tensor) and layout.numel() == 1 and int(layout) == 0):
        refuse(f"hold {name!r} in rows, 0 in {prefix + FORMAT!r}", "another layout")
    if weight.dim() != 2:
        refuse(f"hold [out, in] in {name!r}", list(weight.shape))
    scale = _tensor(state, f"{prefix}{SCALES}", torch.float32, weight.shape[0])
    if not bool(scale.isfinite().all()):
        refuse(f"hold finite scales of {name!r}", "NaN or infinity")
    codebook = torch.arange(-128, 128) * scale[:, None] * 7.874015718698502e-3
    return QuantizedWeight((weight.short() + 128).to(torch.uint8), codebook, max(1, weight.shape[1]))


def _tensor(state: Mapping[str, object], name: str, dtype: torch.dtype | None, count: int | None) -> Tensor:
    """The tensor of this name, on the CPU, and flat where its count is given."""
    value = state.get(name)
    if not isinstance(value, Tensor):
        refuse(f"hold the tensor {name!r}", "none" if value is None else type(value).__name__)
    if dtype is not None and value.dtype != dtype:
        refuse(f"hold {dtype} in {name!r}", value.dtype)
    if count is not None and value.numel() != count:
        refuse(f"hold {count} numbers in {name!r}", value.numel())
    value = value.detach().as_subclass(Tensor).cpu()
    return value if count is None else value.flatten()
