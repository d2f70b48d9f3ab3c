import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tersetorch.storage import import_quantized, read_quantized

HOME = "torchao.quantization"


def pretend(kind, shape, dtype, parts, home=HOME, cls=None):
    """A tensor like those of torchao: no storage of its own, parts as attributes."""

    def dispatch(cls, func, types, args=(), kwargs=None):
        assert func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default), func
        return pretend(kind, shape, dtype, parts, home, cls)

    cls = cls or type(kind, (torch.Tensor,), {"__module__": home, "__torch_dispatch__": classmethod(dispatch)})
    tensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)
    for name, value in parts.items():
        if name != "dtype":
            setattr(tensor, name, value)
    return tensor


def affine(shape, block, bits=8, dtype=torch.float32, scale_dtype=torch.float32, zero=True, seed=0):
    """Parts of an Int8Tensor or IntxUnpackedToInt8Tensor, and its weight, spread block by block."""
    rng = torch.Generator().manual_seed(seed)
    grid = [whole // size for whole, size in zip(shape, block, strict=True)]
    low = -(1 << bits - 1)
    parts = {
        "qdata": torch.randint(low, -low, shape, generator=rng, dtype=torch.int8),
        "scale": (torch.rand(grid, generator=rng) + 0.01).to(scale_dtype),
        "block_size": list(block),
        "dtype": dtype,
    }
    if zero:
        parts["zero_point"] = torch.randint(low, -low, grid, generator=rng, dtype=torch.int8)
    if bits < 8:
        parts["target_dtype"] = getattr(torch, f"int{bits}")

    def spread(tensor):
        for dimension, size in enumerate(block):
            tensor = tensor.repeat_interleave(size, dimension)
        return tensor

    weight = parts["qdata"].to(dtype)
    if zero:
        weight = weight - spread(parts["zero_point"]).to(dtype)
    return parts, (weight * spread(parts["scale"])).to(dtype)


FLOATS = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
BLOCKS = [
    ((6, 64), (1, 64), 6, 64),
    ((6, 64), (6, 64), 1, 384),
    ((6, 64), (1, 16), 24, 16),
    ((6, 64), (3, 64), 2, 192),
    ((6, 64), (6, 16), 4, 16),
    ((6, 64), (3, 16), 24, 16),
    ((4, 3, 2, 2), (1, 3, 2, 2), 4, 12),
    ((4, 3, 2, 2), (4, 1, 2, 2), 3, 4),
    ((4, 3, 2, 2), (2, 1, 2, 1), 48, 1),
]


@pytest.mark.parametrize(("dtype", "scale_dtype"), FLOATS)
@pytest.mark.parametrize("bits", [8, 4, 1])
@pytest.mark.parametrize(("shape", "block", "groups", "run"), BLOCKS)
def test_integers(shape, block, groups, run, bits, dtype, scale_dtype):
    parts, expected = affine(shape, block, bits, dtype, scale_dtype)
    kind = "Int8Tensor" if bits == 8 else "IntxUnpackedToInt8Tensor"
    found = read_quantized({"w": pretend(kind, shape, dtype, parts)})["w"]
    assert torch.equal(found.to_dense(), expected) and found.to_dense().dtype == dtype
    assert (found.groups, found.run, found.codebook.shape[1]) == (groups, run, 1 << bits)


def test_no_zero_point():
    parts, expected = affine((4, 8), (1, 8), zero=False)
    assert torch.equal(
        read_quantized({"w": pretend("Int8Tensor", (4, 8), torch.float32, parts)})["w"].to_dense(), expected
    )


CODEBOOK = {"home": "torchao.prototype.quantization.codebook.codebook_quantized_tensor"}
COREML = {"home": "torchao.prototype.quantization.codebook_coreml.codebook_quantized_tensor"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", [1, 4])
def test_codebooks_with_scales(blocks, dtype):
    rng = torch.Generator().manual_seed(1)
    parts = {
        "codes": torch.randint(16, (6, 32), generator=rng, dtype=torch.uint8),
        "codebook": torch.randn(16, 1, 1, generator=rng).to(dtype),
        "scales": torch.rand(6, blocks, 1, generator=rng).to(dtype),
        "dtype": dtype,
    }
    plain = parts["codebook"].flatten()[parts["codes"].long()].view(6, blocks, -1)
    found = read_quantized({"w": pretend("CodebookQuantizedTensor", (6, 32), dtype, parts, **CODEBOOK)})["w"]
    assert torch.equal(found.to_dense(), (plain * parts["scales"]).view(6, 32)) and found.groups == 6 * blocks


@pytest.mark.parametrize("block", [(6, 8), (2, 32), (-1, -1)])
def test_codebooks_of_blocks(block):
    rng = torch.Generator().manual_seed(2)
    rows, columns = (6 if block[0] == -1 else block[0]), (32 if block[1] == -1 else block[1])
    grid = (6 // rows, 32 // columns)
    parts = {
        "codes": torch.randint(8, (6, 32), generator=rng, dtype=torch.uint8),
        "codebook": torch.randn(*grid, 8, 1, generator=rng),
        "block_size": list(block),
        "dtype": torch.float32,
    }
    expected = torch.tensor(
        [
            [parts["codebook"][r // rows, c // columns, int(parts["codes"][r, c]), 0].item() for c in range(32)]
            for r in range(6)
        ]
    )
    found = read_quantized({"w": pretend("CodebookQuantizedTensor", (6, 32), torch.float32, parts, **COREML)})["w"]
    assert torch.equal(found.to_dense(), expected) and found.groups == grid[0] * grid[1]


def opaque(rows=32, columns=64, group=32, dtype=torch.bfloat16, **changes):
    rng = torch.Generator().manual_seed(3)
    codes = torch.randint(16, (rows, columns), generator=rng, dtype=torch.int32)
    parts = {
        "qdata": torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1),
        "scale_and_zero": torch.randn(columns // group, rows, 2, generator=rng).to(dtype),
        "block_size": [1, group],
    }
    return pretend("Int4OpaqueTensor", (rows, columns), dtype, parts | changes), codes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns", "group"), [(32, 64, 32), (48, 96, 32), (64, 256, 128)])
def test_int4_packed_for_this_machine(rows, columns, group, dtype):
    tensor, codes = opaque(rows, columns, group, dtype)
    found = read_quantized({"w": tensor})["w"]
    assert torch.equal(found.codes.int(), codes) and found.codebook.shape == (rows * columns // group, 16)
    scale, zero = tensor.scale_and_zero.double().repeat_interleave(group, 0).transpose(0, 1).unbind(-1)
    assert torch.equal(found.to_dense(), ((codes - 8) * scale + zero).float())
    product = torch.ops.aten._weight_int4pack_mm_for_cpu(
        torch.eye(columns, dtype=dtype), tensor.qdata, group, tensor.scale_and_zero
    )
    torch.testing.assert_close(product.T, found.to_dense().to(dtype))


def test_a_live_model_becomes_a_float_one():
    parts, expected = affine((6, 64), (1, 32), 4)
    model = nn.Sequential(nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 2))
    model[0].weight = nn.Parameter(
        pretend("IntxUnpackedToInt8Tensor", (6, 64), torch.float32, parts), requires_grad=False
    )
    floating = import_quantized(model)
    assert type(floating[0].weight) is nn.Parameter and torch.equal(floating[0].weight, expected)
    assert torch.equal(floating[2].weight, model[2].weight) and floating[2].weight is not model[2].weight
    assert floating(torch.randn(3, 64)).shape == (3, 2)


def flatten(name, kind, parts):
    """What torchao's prototype.safetensors makes of a tensor: parts by name, the rest as JSON."""
    owner, _, own = name.rpartition(".")
    tensors = {part: value for part, value in parts.items() if isinstance(value, torch.Tensor)}
    others = {
        part: {"_type": "torch.dtype", "_data": str(value).removeprefix("torch.")}
        if isinstance(value, torch.dtype)
        else value
        for part, value in parts.items()
        if part not in tensors
    }
    about = {"_type": kind, "_data": others, "_tensor_data_names": list(tensors)}
    return {f"{owner}._{own}_{part}": value for part, value in tensors.items()}, json.dumps(about)


def file_of(parts, change=lambda tensors, metadata: None, kind="IntxUnpackedToInt8Tensor"):
    tensors, about = flatten("fc.weight", kind, parts)
    metadata = {"fc.weight": about, "fc.bias": json.dumps({"_type": "Tensor"})}
    metadata["tensor_names"] = json.dumps(list(metadata))
    tensors["fc.bias"] = torch.ones(6)
    change(tensors, metadata)
    return tensors, metadata


@pytest.mark.parametrize(("kind", "bits"), [("Int8Tensor", 8), ("IntxUnpackedToInt8Tensor", 4)])
def test_files(tmp_path, kind, bits):
    parts, expected = affine((6, 64), (1, 32), bits)
    tensors, metadata = file_of(parts, kind=kind)
    save_file(tensors, tmp_path / "m.safetensors", metadata)
    found = read_quantized(tmp_path / "m.safetensors")
    assert set(found) == {"fc.weight", "fc.bias"} and torch.equal(found["fc.bias"], torch.ones(6))
    assert torch.equal(found["fc.weight"].to_dense(), expected)


def about(**changes):
    def change(tensors, metadata):
        fields = json.loads(metadata["fc.weight"])
        for name, value in changes.items():
            (fields if name.startswith("_") else fields["_data"])[name] = value
        metadata["fc.weight"] = json.dumps(fields)

    return change


def tensor(name, value):
    return lambda tensors, metadata: tensors.pop(name) if value is None else tensors.update({name: value})


def meta(name, value):
    return lambda tensors, metadata: metadata.update({name: value})


SCALE, ZERO, CODES = "fc._weight_scale", "fc._weight_zero_point", "fc._weight_qdata"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (about(_type="Int4Tensor"), "hold only Int8Tensor, .*, got Int4Tensor as 'fc.weight'; others are packed"),
        (about(_type="os.system"), "hold only Int8Tensor, .*, got os.system as 'fc.weight'"),
        (about(_type=["Tensor"]), "hold only Int8Tensor, .*"),
        (about(_type="coreml"), "hold only Int8Tensor, .*"),
        (about(_data=3), "hold _data and _tensor_data_names of 'fc.weight'"),
        (about(_tensor_data_names=["qdata", "scale", "missing"]), "hold the tensor 'fc._weight_missing', got none"),
        (
            about(_tensor_data_names=["qdata", "scale"]),
            "name each tensor in its metadata, got none for 'fc._weight_zero",
        ),
        (about(block_size=[1, 24]), r"hold a block_size of 'fc.weight' that divides \[6, 64\], got \[1, 24\]"),
        (about(block_size=[1, 0]), "hold a block_size of 'fc.weight' that divides"),
        (about(block_size=[32]), "hold a block_size of 2 numbers for 'fc.weight'"),
        (about(block_size="ab"), "hold a block_size of 2 numbers for 'fc.weight'"),
        (about(block_size=[1, 32.0]), "hold a block_size of 2 numbers for 'fc.weight'"),
        (about(block_size=[1, 16]), "hold 24 zero points of 'fc.weight', one a block, got 12"),
        (about(dtype={"_type": "torch.dtype", "_data": "float64"}), "hold 'fc.weight' in one of .* got float64"),
        (about(dtype=None), "hold 'fc.weight' in one of .* got None"),
        (about(target_dtype={"_type": "torch.dtype", "_data": "int3"}), "hold int3 in 'fc.weight', got values from -8"),
        (about(target_dtype={"_type": "torch.dtype", "_data": "uint4"}), "hold int1 to int8 in 'fc.weight', got uint4"),
        (about(act_pre_scale=[1.0]), "scale no activations before 'fc.weight', got act_pre_scale"),
        (tensor(SCALE, None), "hold the tensor 'fc._weight_scale', got none"),
        (tensor(SCALE, torch.ones(6, 3)), "hold 12 scales of 'fc.weight', one a block, got 18"),
        (
            tensor(SCALE, torch.ones(6, 2).double()),
            "hold scale of 'fc.weight' in torch.float32 or .* got torch.float64",
        ),
        (tensor(SCALE, torch.full((6, 2), float("inf"))), "hold finite scales of 'fc.weight'"),
        (tensor(ZERO, torch.ones(5).char()), "hold 12 zero points of 'fc.weight', one a block, got 5"),
        (tensor(CODES, torch.ones(6, 64)), "hold qdata of 'fc.weight' in torch.int8, got torch.float32"),
        (tensor("fc.bias", None), "hold the tensor 'fc.bias', got none"),
        (tensor("more", torch.ones(1)), "name each tensor in its metadata, got none for 'more'"),
        (meta("fc.weight", "{"), "hold JSON of 'fc.weight' in the metadata"),
        (meta("fc.weight", "[" * 5000), "hold JSON of 'fc.weight' in the metadata"),
        (meta("fc.weight", " " * 70000), "hold JSON of 'fc.weight' in the metadata"),
        (meta("tensor_names", "3"), "name each tensor once in the metadata's 'tensor_names'"),
        (meta("tensor_names", '["fc.bias", "fc.bias"]'), "name each tensor once in the metadata's 'tensor_names'"),
        (meta("tensor_names", "[[]]"), r"hold only Int8Tensor, .*, got None as \[\]"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, change, sentence):
    tensors, metadata = file_of(affine((6, 64), (1, 32), 4)[0], change)
    save_file(tensors, tmp_path / "m.safetensors", metadata)
    with pytest.raises(ValueError, match=f"read_quantized: source must {sentence}"):
        read_quantized(tmp_path / "m.safetensors")


def codebook(home, **changes):
    parts = {
        "codes": torch.zeros(4, 8, dtype=torch.uint8),
        "codebook": torch.ones(16, 1, 1),
        "scales": torch.ones(4, 2, 1),
        "block_size": [4, 4],
        "dtype": torch.float32,
    }
    return pretend("CodebookQuantizedTensor", (4, 8), torch.float32, parts | changes, **home)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (pretend("Int4Tensor", (2, 2), torch.bfloat16, {}), "hold only Int8Tensor, .* got Int4Tensor as 'w'"),
        (pretend("NF4Tensor", (2, 2), torch.bfloat16, {}), "hold only Int8Tensor, .* got NF4Tensor as 'w'"),
        (opaque(act_mapping_type="symmetric")[0], "leave activations as they are before 'w', got"),
        (opaque(act_pre_scale=torch.ones(64))[0], "leave activations as they are before 'w', got"),
        (opaque(qdata=torch.ones(31, 32, dtype=torch.uint8))[0], "hold half a byte for each weight of 'w', .* got 992"),
        (opaque(block_size=[32, 64])[0], "hold half a byte for each weight of 'w', in groups along a row"),
        (opaque(scale_and_zero=torch.ones(2, 31, 2))[0], r"hold \[2, 32, 2\] scales and zeros of 'w'"),
        (codebook(CODEBOOK, codebook=torch.ones(16, 1, 2)), "hold at most 256 single numbers in the codebook of 'w'"),
        (codebook(CODEBOOK, codebook=torch.ones(257, 1, 1)), "hold at most 256 single numbers in the codebook of 'w'"),
        (codebook(CODEBOOK, scales=torch.ones(4, 3, 1)), r"hold scales \[4, blocks, 1\] of 'w'"),
        (codebook(CODEBOOK, scales=torch.ones(4, 0, 1)), r"hold scales \[4, blocks, 1\] of 'w'"),
        (codebook(CODEBOOK, codes=None), "hold a code for each weight of 'w', got NoneType"),
        (codebook(CODEBOOK, codes=torch.full((4, 8), 16, dtype=torch.uint8)), "hold codes of 'w' below 16"),
        (codebook(CODEBOOK, codes=torch.full((4, 8), -1)), "hold codes of 'w' below 16"),
        (codebook(COREML, codebook=torch.ones(1, 4, 8, 1)), r"hold \[1, 2, 'entries', 1\] single numbers"),
        (codebook(COREML, codebook=torch.ones(1, 2, 8, 3)), r"hold \[1, 2, 'entries', 1\] single numbers"),
        (codebook(COREML, codebook=torch.ones(1, 2, 300, 1)), "hold at most 256 numbers in each table of 'w', got 300"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(value, sentence):
    with pytest.raises(ValueError, match=f"read_quantized: source must {sentence}"):
        read_quantized({"w": value})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_library_agrees(tmp_path, dtype):
    torchao = pytest.importorskip("torchao")
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    assert torchao
    torch.manual_seed(0)
    opaque = nn.Sequential(nn.Linear(64, 32)).to(dtype)
    quantize_(opaque, PrototypeInt4WeightOnlyConfig(group_size=32))
    floating, outputs = import_quantized(opaque), opaque(torch.eye(64, dtype=dtype))
    torch.testing.assert_close(outputs, floating[0].weight.T.to(dtype) + opaque[0].bias)
    for config in (Int8WeightOnlyConfig(), IntxWeightOnlyConfig(torch.int4, PerGroup(32))):
        model = nn.Sequential(nn.Linear(64, 6)).to(dtype)
        quantize_(model, config)
        floating = import_quantized(model)
        assert torch.equal(floating[0].weight, model[0].weight.dequantize())
        tensors, metadata = flatten_tensor_state_dict(
            {"0.weight": model[0].weight.data, "0.bias": model[0].bias.detach()}
        )
        save_file(tensors, tmp_path / "m.safetensors", metadata)
        again = read_quantized(tmp_path / "m.safetensors")
        assert torch.equal(again["0.weight"].to_dense(), floating[0].weight)
