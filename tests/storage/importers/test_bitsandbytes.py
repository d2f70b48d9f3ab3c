import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tersetorch.storage import QuantizedWeight, import_quantized, read_quantized

NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
POSITIVE = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]
TABLES = {"nf4": np.float32(NF4), "fp4": np.float32([*POSITIVE, *(-x for x in POSITIVE)]) / np.float32(12)}


def count_of(shape):
    return int(np.prod(shape))


def write(shape, kind="nf4", block=64, dtype="float32", nested=False, fields=None):
    """A state dict as bitsandbytes writes one, by the documented layout, and the weight that it stands for."""
    rng = np.random.default_rng(count_of(shape))
    count = count_of(shape)
    blocks = -(-count // block)
    codes = rng.integers(0, 16, count + count % 2, dtype=np.uint8)
    codes[count:] = 0
    state = {"fc.weight": torch.from_numpy(codes[::2] << 4 | codes[1::2])[:, None]}
    state["fc.weight.quant_map"] = torch.from_numpy(TABLES[kind].copy())
    about = {"quant_type": kind, "blocksize": block, "dtype": dtype, "shape": list(shape)}
    if nested:
        inner, offset = 256, float(np.float32(rng.random()))
        coded, table = rng.integers(0, 256, blocks, dtype=np.uint8), np.sort(rng.standard_normal(256)).astype("f4")
        outer = rng.random(-(-blocks // inner)).astype("f4")
        scale = table[coded] * outer[np.arange(blocks) // inner] + np.float32(offset)
        about |= {"nested_blocksize": inner, "nested_dtype": "float32", "nested_offset": offset}
        state["fc.weight.nested_absmax"] = torch.from_numpy(outer)
        state["fc.weight.nested_quant_map"] = torch.from_numpy(table)
        state["fc.weight.absmax"] = torch.from_numpy(coded)
    else:
        scale = rng.random(blocks).astype("f4")
        state["fc.weight.absmax"] = torch.from_numpy(scale)
    text = json.dumps(about | (fields or {})).encode()
    state[f"fc.weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(text), dtype=torch.uint8)
    weight = TABLES[kind][codes[:count]] * scale[np.arange(count) // block]
    return state, torch.from_numpy(weight).reshape(shape).to(getattr(torch, dtype))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("shape", "block"), [((10, 100), 64), ((7, 13), 64), ((1, 1), 32), ((32, 64), 64), ((300, 70), 32)]
)
def test_four_bits(tmp_path, shape, block, kind, dtype, nested):
    state, expected = write(shape, kind, block, dtype, nested)
    state["fc.bias"] = torch.ones(shape[0], dtype=expected.dtype)
    save_file(state, tmp_path / "m.safetensors")
    for source in (state, tmp_path / "m.safetensors", str(tmp_path / "m.safetensors")):
        found = read_quantized(source)
        assert set(found) == {"fc.weight", "fc.bias"}
        weight = found["fc.weight"]
        assert isinstance(weight, QuantizedWeight) and weight.dtype == expected.dtype
        assert torch.equal(weight.to_dense(), expected) and weight.to_dense().dtype == expected.dtype
        assert weight.run == block and weight.codebook.shape == (-(-expected.numel() // block), 16)
    model = nn.Module()
    model.fc = nn.Linear(shape[1], shape[0]).to(expected.dtype)
    assert torch.equal(import_quantized(tmp_path / "m.safetensors", model).fc.weight, expected)


def test_other_storage_dtypes_hold_the_same_bytes():
    state, expected = write((8, 64))
    state["fc.weight"] = state["fc.weight"].flatten().view(torch.bfloat16)[:, None]
    assert torch.equal(read_quantized(state)["fc.weight"].to_dense(), expected)


def test_eight_bits():
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (5, 9), generator=rng, dtype=torch.int8)
    scale = torch.rand(5, generator=rng)
    state = {"fc.weight": codes, "fc.SCB": scale, "fc.weight_format": torch.tensor(0, dtype=torch.uint8)}
    found = read_quantized(state)
    assert set(found) == {"fc.weight"} and found["fc.weight"].run == 9
    assert torch.equal(found["fc.weight"].to_dense(), codes * scale[:, None] * 7.874015718698502e-3)


def spoiled(change, nested=False, **fields):
    state, _ = write((10, 100), nested=nested, fields=fields)
    change(state)
    return state


JSON = "fc.weight.quant_state.bitsandbytes__nf4"


def text(raw):
    return lambda state: state.update({JSON: torch.tensor(list(raw), dtype=torch.uint8)})


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        (spoiled(lambda s: s.pop("fc.weight")), "hold the tensor 'fc.weight', got none"),
        (spoiled(lambda s: s.pop("fc.weight.absmax")), "hold the tensor 'fc.weight.absmax', got none"),
        (spoiled(lambda s: s.pop("fc.weight.quant_map")), "hold the tensor 'fc.weight.quant_map', got none"),
        (spoiled(lambda s: s.pop(JSON)), "hold 'fc.weight.quant_state.bitsandbytes__' with its type .* got none"),
        (spoiled(lambda s: s.pop("fc.weight.nested_absmax"), nested=True), "hold the tensor 'fc.weight.nested_absmax'"),
        (spoiled(lambda s: s.update({"fc.weight.nested_absmax": torch.ones(1)})), "hold no 'fc.weight.nested_absmax'"),
        (spoiled(lambda s: s.update({"fc.weight": s["fc.weight"][1:]})), r"hold 500 bytes in 'fc.weight', .* got 499"),
        (spoiled(lambda s: s.update({"fc.weight.absmax": torch.ones(17)})), "hold 16 numbers in 'fc.weight.absmax'"),
        (
            spoiled(lambda s: s.update({"fc.weight.absmax": torch.ones(16).half()})),
            "hold torch.float32 in 'fc.weight.a",
        ),
        (spoiled(lambda s: s["fc.weight.absmax"].fill_(float("nan"))), "hold finite scales of 'fc.weight', got NaN"),
        (spoiled(lambda s: s["fc.weight.quant_map"].mul_(2)), "hold the numbers of nf4 in 'fc.weight.quant_map', got"),
        (spoiled(text(b"")), "hold 1 to 4096 bytes in"),
        (spoiled(text(b" " * 5000)), "hold 1 to 4096 bytes in .*, got 5000"),
        (spoiled(text(b"{")), "hold JSON in"),
        (spoiled(text(b"\xff\xfe")), "hold JSON in"),
        (spoiled(text(b"[" * 4000)), "hold JSON in"),
        (spoiled(text(b"[1]")), "name .*'blocksize'.* and all or none of"),
        (spoiled(lambda s: None, extra=1), "name .*'blocksize'.* and all or none of"),
        (spoiled(lambda s: None, nested_offset=1.0), "name .*'blocksize'.* and all or none of"),
        (spoiled(lambda s: None, quant_type="fp4"), "say nf4 in .*, got 'fp4'"),
        (spoiled(lambda s: None, blocksize=48), r"hold a blocksize of \(32, .* got 48"),
        (spoiled(lambda s: None, blocksize=True), r"hold a blocksize of \(32, .* got True"),
        (spoiled(lambda s: None, dtype="float64"), "hold a dtype of .* got 'float64'"),
        (spoiled(lambda s: None, dtype=3), "hold a dtype of .* got 3"),
        (spoiled(lambda s: None, shape=[]), r"hold the weight's shape in .* got \[\]"),
        (spoiled(lambda s: None, shape=[10, -100]), r"hold the weight's shape in .* got \[10, -100\]"),
        (spoiled(lambda s: None, shape=[10, 100.0]), "hold the weight's shape in"),
        (spoiled(lambda s: None, shape=[2**30] * 40), "hold .* bytes in 'fc.weight', as its shape"),
        (spoiled(lambda s: None, nested=True, nested_offset=float("nan")), "hold a finite nested_offset"),
        (spoiled(lambda s: None, nested=True, nested_offset=1e300), "hold finite scales of 'fc.weight'"),
        (spoiled(lambda s: None, nested=True, nested_blocksize=0), "hold a nested_blocksize and float32"),
        (spoiled(lambda s: None, nested=True, nested_dtype="float16"), "hold a nested_blocksize and float32"),
        ({"fc.weight": torch.ones(2, 3), "fc.SCB": torch.ones(2)}, "hold torch.int8 in 'fc.weight', got torch.float32"),
        ({"fc.weight": torch.ones(2, 3).char(), "fc.SCB": torch.ones(3)}, "hold 2 numbers in 'fc.SCB', got 3"),
        ({"fc.weight": torch.ones(2).char(), "fc.SCB": torch.ones(2)}, r"hold \[out, in\] in 'fc.weight', got \[2\]"),
        ({"fc.SCB": torch.ones(2)}, "hold the tensor 'fc.weight', got none"),
        (
            {"fc.weight": torch.ones(2, 3).char(), "fc.SCB": torch.ones(2), "fc.weight_format": torch.tensor(2)},
            "hold 'fc.weight' in rows, 0 in 'fc.weight_format', got another layout",
        ),
        ({"w.quant_state.bitsandbytes__int3": torch.ones(2)}, "hold weights of type nf4 or fp4 in 'w', got int3"),
    ],
)
def test_what_does_not_fit_is_refused(state, sentence):
    with pytest.raises(ValueError, match=f"read_quantized: source must {sentence}"):
        read_quantized(state)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_library_agrees(kind, nested):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    # Not rows of a multiple of 16 that is none of the block: bitsandbytes 0.50's AVX-512 code takes wrong scales there.
    for rows, columns in ((32, 64), (10, 100), (5, 37)):
        model = nn.Sequential(bnb.nn.Linear4bit(columns, rows, quant_type=kind, compress_statistics=nested))
        weight = bnb.nn.Params4bit(
            torch.randn(rows, columns), requires_grad=False, quant_type=kind, compress_statistics=nested
        )
        model[0].weight = weight.to("cpu")
        floating = import_quantized(model)
        expected = bnb.functional.dequantize_4bit(model[0].weight.data, model[0].weight.quant_state)
        assert type(floating[0]) is nn.Linear and torch.equal(floating[0].weight, expected)
