import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tersetorch.storage.entry import DTYPES, Entry
from tersetorch.storage.errors import TerseFileError
from tersetorch.storage.tensors import decode_tensor, encode_tensor

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Tagged(torch.Tensor):
    pass


def random_weight(*shape, density=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    return weight, torch.rand(shape, generator=generator) < density


def encoded_bytes(streams):
    return sum(len(stream.data) for stream in streams)


def round_trip(tensor, summed=False):
    entry, streams = encode_tensor("w", tensor, True, summed)
    read = Entry.from_json(entry.to_json())
    assert read == entry
    return entry, streams, decode_tensor(read, [stream.data for stream in streams])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (0, 5), (5, 0), (3, 1, 2), (13, 11)])
def test_every_dtype_and_shape_round_trips(dtype, shape, same_bits):
    weight, mask = random_weight(*shape, density=0.3)
    tensor = torch.where(mask, weight * 8, 0).abs().to(dtype)
    same_bits(tensor, round_trip(tensor)[2])


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["f32", "bf16", "f64", "i32", "u8"]), st.data())
def test_any_bit_patterns_round_trip(name, data):
    dtype = DTYPES[name]
    size = 8 * dtype.itemsize
    special = [0, 1, 1 << (size - 1), (1 << size) - 1, 0x7F << (size - 8), 3 << (size - 2)]
    patterns = data.draw(st.lists(st.one_of(st.sampled_from(special), st.integers(0, (1 << size) - 1)), max_size=90))
    rows = data.draw(st.sampled_from([1, 2, 3]))
    patterns += [0] * (-len(patterns) % rows)
    integers = torch.tensor(np.array(patterns, dtype=f"u{dtype.itemsize}").view(f"i{dtype.itemsize}"))
    tensor = integers.view(dtype).reshape(rows, -1)
    found = round_trip(tensor)[2]
    assert found.dtype == dtype
    assert found.shape == tensor.shape
    assert torch.equal(found.view(torch.int8), tensor.contiguous().view(torch.int8))


@pytest.mark.parametrize(
    "density,levels,form",
    [(1.0, None, "raw"), (1.0, 4, "codebook"), (0.1, None, "sparse"), (0.1, 100, "sparse-codebook")],
)
def test_the_form_follows_from_the_values(density, levels, form, same_bits):
    weight, mask = random_weight(101, 97, density=density)
    if levels:
        weight = ((weight * levels).round().clamp(-levels, levels) + 0.5).atan()
    tensor = torch.where(mask, weight, 0)
    entry, _, found = round_trip(tensor)
    assert entry.form == form
    same_bits(tensor, found)


def test_nan_infinity_and_their_payloads_survive(same_bits):
    patterns = torch.tensor([0x7FC00001, -1, 0x7F800000, -(1 << 31), 0, 1], dtype=torch.int32)
    tensor = torch.cat([patterns, torch.zeros(200, dtype=torch.int32)]).view(torch.float32)
    same_bits(tensor, round_trip(tensor)[2])


def test_the_negative_zeros_of_a_masked_weight_cost_nothing(same_bits):
    weight, mask = random_weight(300, 200, density=0.1)
    product, clean = nn.Parameter(weight * mask), torch.where(mask, weight, 0)
    assert bool(product.signbit()[~mask].any())
    _, streams, found = round_trip(product, summed=True)
    same_bits(clean, found)
    assert encoded_bytes(streams) == encoded_bytes(encode_tensor("w", clean, True)[1])
    assert bool(product.signbit()[~mask].any())  # the model's own weight is as it was


def test_negative_zeros_elsewhere_are_kept(same_bits):
    tensor = torch.where(torch.arange(200) % 3 > 0, 0.0, -0.0)
    for other in (tensor, nn.Parameter(tensor), tensor.view(20, 10)):
        same_bits(other.detach(), round_trip(other, summed=True)[2])
    weight = nn.Parameter(tensor.view(20, 10))
    same_bits(weight.detach(), round_trip(weight)[2])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_constant_tensor_takes_one_value(dtype, same_bits):
    tensor = torch.ones(300, 20).to(dtype)
    for copies in (1, 30):
        whole = tensor.repeat(copies, 1)
        _, streams, found = round_trip(whole.real.contiguous() if dtype.is_complex else whole)
        same_bits(whole.real.contiguous() if dtype.is_complex else whole, found)
        assert encoded_bytes(streams) <= 32


def test_a_sparse_tensor_of_one_value_takes_its_positions(same_bits):
    tensor = torch.where(random_weight(300, 200, density=0.05)[1], 0.25, 0.0)
    _, streams, found = round_trip(tensor)
    same_bits(tensor, found)
    # The share of non-zeros is all there is to say: 0.29 bits a weight.
    assert encoded_bytes(streams) < 1.02 * 60_000 * 0.29 / 8 + 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.uint8])
@pytest.mark.parametrize("common", [-1, 0.3])
def test_what_differs_from_the_most_frequent_value_is_stored(dtype, common, same_bits):
    weight, mask = random_weight(300, 200, density=0.02)
    tensor = torch.where(mask, weight * 50, common).to(dtype)
    entry, streams, found = round_trip(tensor)
    same_bits(tensor, found)
    assert entry.is_sparse
    with_zeros = encode_tensor("w", torch.where(mask, weight * 50, 0).to(dtype), True)[1]
    assert encoded_bytes(streams) <= 1.1 * encoded_bytes(with_zeros)


def test_a_mask_that_is_mostly_true_is_stored_like_its_opposite(same_bits):
    mask = random_weight(300, 200, density=0.02)[1]
    _, streams, found = round_trip(~mask)
    same_bits(~mask, found)
    assert encoded_bytes(streams) == encoded_bytes(encode_tensor("w", mask, True)[1])


def test_columns_that_are_all_zero_are_used(same_bits, monkeypatch):
    monkeypatch.setattr("tersetorch.storage.streams.MAX_CONTEXT_BITS", 0)
    # Border pixels of an image: whole inputs that no unit looks at.
    weight, mask = random_weight(300, 784, density=0.15)
    mask &= random_weight(784, density=0.4, seed=1)[1]
    tensor = torch.where(mask, weight, 0)
    entry, streams, found = round_trip(tensor)
    same_bits(tensor, found)
    assert entry.down_columns
    by_rows = encode_tensor("w", tensor.flatten(), True)[1]
    assert len(streams[0].data) < 0.9 * len(by_rows[0].data)


def test_a_pruned_convolution_is_stored_sparse(same_bits):
    weight, mask = random_weight(32, 16, 3, 3, density=0.1)
    tensor = torch.where(mask, weight, 0)
    entry, streams, found = round_trip(tensor)
    assert entry.form == "sparse"
    assert encoded_bytes(streams) < 0.15 * tensor.nbytes
    same_bits(tensor, found)


@pytest.mark.parametrize("density", [1.0, 0.1])
def test_memory_layout_is_restored(density, same_bits):
    weight, mask = random_weight(8, 6, 3, 5, density=density)
    tensor = torch.where(mask, weight, 0)
    for laid_out in (
        tensor.to(memory_format=torch.channels_last),
        tensor.permute(3, 1, 0, 2),
        tensor[0, 0].t(),
        tensor[:1].to(memory_format=torch.channels_last),
    ):
        same_bits(laid_out, round_trip(laid_out)[2])


def test_views_with_holes_become_contiguous():
    tensor = random_weight(10, 12)[0][:, ::2]
    found = round_trip(tensor)[2]
    assert torch.equal(found, tensor)
    assert found.is_contiguous()


def test_sizes_come_close_to_the_entropy():
    weight, mask = random_weight(400, 500, density=0.08)
    tensor = torch.where(mask, (weight * 2).round() / 2 + 0.25, 0)
    values, counts = tensor[mask].unique(return_counts=True)
    share = counts / counts.sum()
    density = float(mask.float().mean())
    position_bits = -(density * np.log2(density) + (1 - density) * np.log2(1 - density)) * tensor.numel()
    entropy = position_bits / 8 - float((share * share.log2()).sum()) * int(counts.sum()) / 8 + 4 * len(values)
    assert encoded_bytes(encode_tensor("w", tensor, True)[1]) < 1.05 * entropy


@pytest.mark.parametrize("entries", [255, 256, 257, 65535, 65536, 65537])
def test_codebooks_around_their_limits(entries, same_bits):
    distinct = torch.arange(1, entries + 1, dtype=torch.int64) << 40
    tensor = distinct.repeat(3)[: 2 * entries + 1]
    entry, _, found = round_trip(tensor)
    assert entry.form == "raw" or entries <= 65536
    same_bits(tensor, found)
    with_zero = torch.cat([tensor, torch.zeros(1, dtype=torch.int64)])
    same_bits(with_zero, round_trip(with_zero)[2])


@pytest.mark.parametrize(
    "tensor,match",
    [
        (torch.zeros(2, device="meta"), "w must hold values, got a tensor on device meta"),
        (torch.eye(3).to_sparse(), r"plain dense tensor, got torch\.sparse_coo"),
        (torch.zeros(2).as_subclass(Tagged), "plain dense tensor, got Tagged"),
        (
            torch.zeros(2, dtype=torch.float8_e8m0fnu),
            r"w must have one of the dtypes float64, .*, got torch\.float8_e8m0fnu",
        ),
    ],
)
def test_tensors_without_plain_values_are_refused(tensor, match):
    with pytest.raises(ValueError, match=match):
        encode_tensor("w", tensor, True)


def test_a_bool_that_is_neither_is_refused():
    entry, _ = encode_tensor("w", torch.tensor([True, False, True]), True)
    with pytest.raises(TerseFileError, match="hold 0 or 1 for bool, got 2"):
        decode_tensor(entry, [b"\1\2\0"])


def test_lazy_conjugates_are_resolved(same_bits):
    tensor = torch.randn(3, 4, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)).conj()
    same_bits(tensor.resolve_conj(), round_trip(tensor)[2])
