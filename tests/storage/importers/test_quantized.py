"""read_quantized and import_quantized: what they do alike for every library."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tersetorch.storage import QuantizedWeight, import_quantized, read_quantized


def naive(weight):
    flat = [
        weight.codebook[i // weight.run % weight.groups, code].item()
        for i, code in enumerate(weight.codes.flatten().tolist())
    ]
    return torch.tensor(flat).reshape(weight.shape).to(weight.dtype)


@pytest.mark.parametrize(
    ("shape", "groups", "run"),
    [
        ((3, 5), 1, 15),
        ((3, 5), 3, 5),
        ((3, 6), 9, 2),
        ((3, 6), 3, 2),
        ((3, 5), 4, 4),
        ((2, 3, 2, 2), 3, 4),
        ((1,), 1, 8),
    ],
)
def test_a_weight_is_its_formula(shape, groups, run):
    generator = torch.Generator().manual_seed(run)
    weight = QuantizedWeight(
        torch.randint(7, shape, generator=generator, dtype=torch.uint8),
        torch.randn(groups, 7, generator=generator).bfloat16().float(),
        run,
        torch.bfloat16,
    )
    weight.validate()
    assert weight.shape == shape and weight.groups == groups
    assert torch.equal(weight.to_dense(), naive(weight)) and weight.to_dense().dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("shape", "groups", "run"),
    [((6, 10), 1, 60), ((6, 10), 6, 10), ((6, 10), 3, 20), ((6, 10), 2, 5), ((4, 3, 2, 2), 4, 12), ((1, 8), 4, 2)],
)
def test_a_weight_of_rows_or_columns_has_a_format(shape, groups, run):
    generator = torch.Generator().manual_seed(run)
    codes = torch.randint(16, shape, generator=generator, dtype=torch.uint8)
    weight = QuantizedWeight(codes, torch.randn(groups, 16, generator=generator), run)
    weight.validate()
    found = weight.to_codebook_weight()
    found.validate()
    assert torch.equal(found.to_dense(), weight.to_dense().flatten(1))
    assert torch.equal(found.unpacked(), codes.flatten(1))


def test_tables_of_parts_of_rows_have_no_format():
    weight = QuantizedWeight(torch.zeros(4, 6, dtype=torch.uint8), torch.ones(8, 2), 3)
    with pytest.raises(ValueError, match="run must be whole rows of 6 weights, or tables those of blocks of columns"):
        weight.to_codebook_weight()


CODES, BOOK = torch.zeros(4, 6, dtype=torch.uint8), torch.ones(4, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ((CODES.int(), BOOK, 6), TypeError, "codes must be torch.uint8, got torch.int32"),
        ((CODES, BOOK.double(), 6), TypeError, "codebook must be torch.float32, got torch.float64"),
        ((CODES, BOOK, 6, torch.float64), TypeError, "dtype must be float32, bfloat16 or float16"),
        ((CODES, torch.ones(4), 6), ValueError, r"codebook must be \[groups, entries\]"),
        ((CODES, torch.ones(4, 257), 6), ValueError, "with 1 to 256 entries"),
        ((CODES, torch.ones(0, 2), 6), ValueError, r"codebook must be \[groups, entries\]"),
        ((CODES, BOOK, 0), ValueError, "run must give each of 4 tables as many of 24 weights, got 0"),
        ((CODES, BOOK, 5), ValueError, "run must give each of 4 tables"),
        ((CODES, BOOK / 0, 6), ValueError, "codebook must hold finite numbers"),
        ((CODES + 2, BOOK, 6), ValueError, "codes must lie below 2, got 2"),
    ],
)
def test_weights_that_do_not_fit_are_refused(arguments, error, sentence):
    with pytest.raises(error, match=f"QuantizedWeight: .*{sentence}"):
        QuantizedWeight(*arguments).validate()


def test_what_is_no_source_is_refused(tmp_path):
    with pytest.raises(TypeError, match="source must be a model, a state dict or a path, got int"):
        read_quantized(3)
    with pytest.raises(TypeError, match="source must name its tensors, got 3"):
        read_quantized({3: torch.ones(1)})
    with pytest.raises(
        ValueError, match=r"path must name a \.safetensors or \.gguf file, got 'm\.pt'; load another kind yourself"
    ):
        read_quantized("m.pt")
    with pytest.raises(FileNotFoundError, match="path must name a file that can be read"):
        read_quantized(tmp_path / "none.safetensors")
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match=r"path must name a \.safetensors file, got .*; copy it again"):
        read_quantized(tmp_path / "noise.safetensors")
    save_file({"weight": torch.ones(2)}, tmp_path / "float.safetensors")
    for source in (tmp_path / "float.safetensors", nn.Linear(2, 3), {}):
        with pytest.raises(ValueError, match="source must hold quantised weights, got none"):
            read_quantized(source)


def eight_bit():
    return {"0.weight": torch.tensor([[127, -3]], dtype=torch.int8), "0.SCB": torch.ones(1), "0.bias": torch.ones(1)}


def test_a_state_dict_goes_into_a_copy_of_its_model():
    model = nn.Sequential(nn.Linear(2, 1))
    before = model[0].weight.clone()
    imported = import_quantized(eight_bit(), model)
    assert torch.equal(model[0].weight, before)
    assert torch.equal(imported[0].weight, read_quantized(eight_bit())["0.weight"].to_dense())
    assert torch.equal(imported[0].bias, torch.ones(1))


@pytest.mark.parametrize(
    ("model", "error", "sentence"),
    [
        (None, TypeError, "model must be the float nn.Module that source belongs to, got NoneType"),
        (nn.Sequential(nn.Linear(3, 1)), ValueError, r"hold '0.weight' for model's torch.float32 \[1, 3\], got"),
        (nn.Sequential(nn.Linear(2, 1)).half(), ValueError, r"model's torch.float16 \[1, 2\], got torch.float32"),
        (nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1)), ValueError, "hold '1.weight' for model's .*, got none"),
        (nn.Sequential(nn.Linear(2, 1, bias=False)), ValueError, "hold no more than model does, got '0.bias'"),
    ],
)
def test_another_model_is_refused(model, error, sentence):
    with pytest.raises(error, match=sentence):
        import_quantized(eight_bit(), model)
