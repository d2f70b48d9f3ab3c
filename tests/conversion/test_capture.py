import random

import pytest
import torch
from torch import nn

from tersetorch.conversion import capture as capture_module
from tersetorch.conversion.capture import Inputs, capture, uncalled, untouched_generators


@pytest.mark.parametrize(
    ("given", "args", "kwargs"),
    [
        (torch.ones(2), (torch.ones(2),), {}),
        ((torch.ones(2), 3), (torch.ones(2), 3), {}),
        ({"x": torch.ones(2)}, (), {"x": torch.ones(2)}),
        ((), (), {}),
    ],
)
def test_forms_of_example_inputs(given, args, kwargs):
    torch.testing.assert_close(Inputs.of(given).args, args)
    torch.testing.assert_close(Inputs.of(given).kwargs, kwargs)


@pytest.mark.parametrize("given", [[torch.ones(2)], "x", 3, {1: torch.ones(2)}])
def test_other_forms_are_refused(given):
    with pytest.raises(TypeError, match="example_inputs must be a tensor, a tuple of arguments or a dict"):
        Inputs.of(given)


def test_copies_reach_nested_tensors():
    x = torch.ones(2, requires_grad=True)
    copied = Inputs.of(({"deep": [x]}, None)).copy()
    assert copied.args[0]["deep"][0] is not x
    assert not copied.args[0]["deep"][0].requires_grad


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(4, 6),
        lambda: torch.randn(6, 4).t(),
        lambda: torch.randn(4, 12)[:, 3:9],
        lambda: torch.randn(4, 12)[:, ::2],
        lambda: torch.randn(1, 6).expand(4, 6),
        lambda: torch.randn(9).unfold(0, 6, 1),
        lambda: torch.randn(0, 6),
        lambda: torch.randn(6),
    ],
)
def test_inputs_keep_their_values_and_strides(make):
    x = make()
    layer = nn.Linear(6, 2)
    ((seen,),) = capture(layer, [layer], Inputs((x,))).values()
    assert torch.equal(seen, x)
    assert seen.stride() == x.stride()
    assert seen.numel() == 0 or seen.data_ptr() != x.data_ptr()


def test_every_call_is_kept_before_it_is_written_over():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.other = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            for _ in range(3):
                self.fc(input=x)
                x += 1
            return x

    model = Loop()
    x = torch.zeros(2, 3)
    calls = capture(model, [model.fc, model.other], Inputs((x,)))
    assert [float(seen[0, 0]) for seen in calls[model.fc]] == [0, 1, 2]
    assert calls[model.other] == []
    assert torch.equal(x, torch.zeros(2, 3))
    assert not model.fc._forward_pre_hooks


def test_memory_is_capped(monkeypatch):
    monkeypatch.setattr(capture_module, "MAX_BYTES", 0)
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, layer, layer)
    seen = capture(model, [layer], Inputs((torch.randn(2, 3),)))[layer]
    assert len(seen) == 3
    assert seen[0] is seen[1] is seen[2]


def test_layers_under_a_fast_path_are_reached_and_it_is_given_back():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    layer = model.layers[0].linear1
    padding = torch.tensor([[False, False, True]])
    calls = capture(model, [layer], Inputs((torch.randn(1, 3, 8),), {"src_key_padding_mask": padding}))
    assert [x.shape for x in calls[layer]] == [(1, 3, 8)]
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_other_than_plain_tensors_are_said():
    layer = nn.Linear(3, 2)
    x = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(1, 3)])
    assert capture(layer, [layer], Inputs((x,)))[layer] == "it is called with something else than a plain tensor"


def test_hooks_are_removed_when_the_model_fails():
    layer = nn.Linear(3, 2)
    with pytest.raises(RuntimeError):
        capture(layer, [layer], Inputs((torch.zeros(1, 4),)))
    assert not layer._forward_pre_hooks
    assert torch.backends.mha.get_fastpath_enabled()


def test_uncalled_sees_what_runs_in_use():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.called, self.read = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return nn.functional.linear(self.called(x), self.read.weight)

    model = Reader()
    layers = [model.called, model.read]
    assert uncalled(model, layers, Inputs((torch.zeros(1, 3),))) == {model.read}
    assert all("forward" not in vars(layer) for layer in layers)


def test_uncalled_keeps_fast_paths_on():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    assert uncalled(model, [model.linear1], Inputs((torch.randn(1, 3, 8),))) == {model.linear1}


def test_generators_are_given_back():
    torch.manual_seed(1)
    random.seed(1)
    expected = torch.get_rng_state(), random.getstate()
    with untouched_generators():
        torch.randn(3)
        random.random()
    assert torch.equal(torch.get_rng_state(), expected[0])
    assert random.getstate() == expected[1]
