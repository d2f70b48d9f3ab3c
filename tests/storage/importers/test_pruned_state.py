import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune as torch_prune

from tersetorch.storage import read_pruned_state


def compressed(name, weight, offsets=True):
    """What compressed-tensors' BitmaskCompressor stores of a weight."""
    kept = (weight != 0).numpy()
    counts = kept.sum(-1)
    stem = name.removesuffix(".weight")
    state = {
        f"{stem}.shape": torch.tensor(weight.shape),
        f"{stem}.compressed": weight[torch.from_numpy(kept)],
        f"{stem}.bitmask": torch.from_numpy(np.packbits(kept, axis=-1, bitorder="little")),
    }
    if offsets:
        state[f"{stem}.row_offsets"] = torch.from_numpy(np.cumsum(counts) - counts)
    return state


def sparse(*shape, dtype=torch.float32, density=0.4):
    generator = torch.Generator().manual_seed(sum(shape))
    kept = torch.rand(shape, generator=generator) < density
    return torch.where(kept, torch.randn(shape, generator=generator), 0).to(dtype)


def test_masks_beside_originals():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Conv2d(2, 3, 3))
    torch_prune.l1_unstructured(model[0], "weight", amount=0.5)
    torch_prune.l1_unstructured(model[1], "bias", amount=1)
    found = read_pruned_state(model.state_dict())
    assert set(found) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert torch.equal(found["0.weight"], model[0].weight) and torch.equal(found["1.bias"], model[1].bias)
    assert not torch.signbit(found["0.weight"][found["0.weight"] == 0]).any()
    plain = nn.Sequential(nn.Linear(5, 4), nn.Conv2d(2, 3, 3))
    plain.load_state_dict(found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 8), (1, 1), (5, 17), (4, 64), (0, 8)])
def test_bit_masks(shape, dtype):
    weight = sparse(*shape, dtype=dtype)
    bias = torch.randn(shape[0])
    found = read_pruned_state({**compressed("model.layers.0.fc.weight", weight), "model.layers.0.fc.bias": bias})
    assert set(found) == {"model.layers.0.fc.weight", "model.layers.0.fc.bias"}
    assert found["model.layers.0.fc.weight"].dtype == dtype
    assert torch.equal(found["model.layers.0.fc.weight"], weight)


def test_the_two_of_four_form_and_older_names():
    weight = torch.tensor([[1.0, 0, 0, 2, 0, 3, 4, 0]])
    state = compressed("fc.weight", weight, offsets=False)
    state["fc.shape"] = state["fc.shape"].reshape(-1, 1)
    state["fc.compressed"] = state["fc.compressed"].reshape(1, 4)
    assert torch.equal(read_pruned_state(state)["fc.weight"], weight)
    older = {name.replace("fc.", "fc.weight."): tensor for name, tensor in state.items()}
    assert torch.equal(read_pruned_state(older)["fc.weight"], weight)


def test_plain_tensors_pass():
    spectral = nn.utils.spectral_norm(nn.Linear(3, 4)).state_dict()
    assert read_pruned_state(spectral) == dict(spectral)
    state = {"fc.weight": sparse(3, 4), "steps": torch.tensor(3), "a.shape": torch.tensor([1])}
    found = read_pruned_state(state)
    assert set(found) == set(state) and all(found[name] is state[name] for name in state)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_files(tmp_path, suffix):
    weight = sparse(6, 11)
    path = tmp_path / f"model.{suffix}"
    state = compressed("fc.weight", weight)
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    for each in (path, str(path)):
        assert torch.equal(read_pruned_state(each)["fc.weight"], weight)


def spoiled(**changes):
    state = compressed("fc.weight", torch.tensor([[1.0, 0, 2], [0, 3, 0]]))
    for name, tensor in changes.items():
        if tensor is None:
            del state[f"fc.{name}"]
        else:
            state[f"fc.{name}"] = tensor
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"w": torch.ones(2), "w_orig": torch.ones(2), "w_mask": torch.ones(2)},
            "hold 'w' once, got it beside 'w_orig' and 'w_mask'",
        ),
        ({"w_orig": torch.ones(2)}, "hold the mask of 'w_orig', got no 'w_mask'"),
        ({"w_orig": torch.ones(2), "w_mask": torch.ones(3)}, r"hold a mask of 'w' of shape \(2,\), got \(3,\)"),
        ({"w_orig": torch.ones(2), "w_mask": torch.full((2,), 0.5)}, "hold a mask of 'w' of 0 and 1, got other"),
        (spoiled(bitmask=None), "hold the bit mask of 'fc.compressed', got no 'fc.bitmask'"),
        (spoiled(compressed=None), "hold 'fc.compressed' beside 'fc.bitmask', got none"),
        (spoiled(shape=None), "hold 'fc.shape' beside 'fc.bitmask', got none"),
        (spoiled(shape=torch.tensor([2.0, 3.0])), "hold whole numbers in 'fc.shape', got torch.float32"),
        (spoiled(shape=torch.tensor([2, -3])), "hold whole numbers in 'fc.shape'"),
        (spoiled(shape=torch.tensor([2**40, 2**40])), "hold uint8 .* in 'fc.bitmask', got torch.uint8"),
        (spoiled(shape=torch.tensor([2, 9])), r"hold uint8 \[2, 2\] in 'fc.bitmask', got torch.uint8 \[2, 1\]"),
        (spoiled(shape=torch.tensor([2, 2])), "hold no bit behind the last column in 'fc.bitmask', got some"),
        (spoiled(bitmask=torch.tensor([[5], [2]])), "hold uint8 .* got torch.int64"),
        (spoiled(bitmask=torch.tensor([[7], [2]], dtype=torch.uint8)), "hold 4 values in 'fc.compressed', .* got 3"),
        (spoiled(row_offsets=torch.tensor([0, 1])), "hold the first value of each row in 'fc.row_offsets'"),
        (spoiled(compressed=torch.ones(3).to(torch.float8_e4m3fn)), "hold 'fc.compressed' in 16, 32 or 64-bit"),
    ],
)
def test_what_does_not_fit_is_refused(state, message):
    with pytest.raises(ValueError, match=f"read_pruned_state: source must {message}"):
        read_pruned_state(state)


@pytest.mark.parametrize("source", [3, {"a": 3}, {3: torch.ones(1)}])
def test_what_is_no_state_dict_is_refused(source):
    with pytest.raises(TypeError, match="read_pruned_state: source must"):
        read_pruned_state(source)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="read_pruned_state: source must be a file"):
        read_pruned_state(tmp_path / "missing.pt")
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    with pytest.raises(TypeError, match=r"tensor.pt must hold a state dict, got Tensor"):
        read_pruned_state(tmp_path / "tensor.pt")
