import pytest
import torch
from torch import nn

from tersetorch.conversion.baselines import dense_forms


def test_forms_of_a_linear_layer_run_every_call(generator):
    seen = []

    class Watched(nn.Module):
        def forward(self, x):
            seen.append(x.shape[0])

    calls = [(0, torch.randn(2, 5, generator=generator)), (1, torch.randn(3, 5, generator=generator))]
    forms = dense_forms([Watched(), Watched()], calls)
    forms["dense"]()
    assert list(forms) == ["dense"]
    assert seen == [2, 3]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN")
@pytest.mark.parametrize("bias", [True, False])
def test_float32_has_a_packed_form(generator, bias):
    layer = nn.Linear(50, 20, bias=bias)
    x = torch.randn(3, 100, generator=generator)[:, ::2]
    forms = dense_forms([layer], [(0, x), (0, x[0])])
    assert list(forms) == ["dense", "dense packed"]
    with torch.no_grad():
        forms["dense packed"]()


def test_bfloat16_has_a_packed_form_only_where_this_cpu_has_one(generator):
    layer = nn.Linear(50, 20).bfloat16()
    forms = dense_forms([layer], [(0, torch.randn(3, 50, generator=generator).bfloat16())])
    assert "dense" in forms


def test_convolutions_have_a_form_in_channels_last(generator):
    layer = nn.Conv2d(3, 4, 3)
    x = torch.randn(2, 3, 8, 8, generator=generator)
    before = layer.weight.stride()
    forms = dense_forms([layer], [(0, x), (0, x[0])])
    assert list(forms) == ["dense", "dense channels_last"]
    assert layer.weight.stride() == before and x.is_contiguous()
    with torch.no_grad():
        forms["dense channels_last"]()
    assert list(dense_forms([nn.Conv1d(3, 4, 3)], [(0, x[0])])) == ["dense"]
